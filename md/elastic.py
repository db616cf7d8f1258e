"""Elastic constants: how stiff is a crystal, and is it stable against every strain?

python elastic.py MODEL [STRUCTURE] [--strain X] [--out DIR]
"""

import argparse
from pathlib import Path

from escaip import EScAIPCalculator
from escaip.properties import elastic_constants
from escaip.simulate import read_structure

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", help=".ckpt or .escaip file, with conservative forces")
parser.add_argument("structure", nargs="?", default=Path(__file__).parent / "structures" / "InP.cif")
parser.add_argument("--strain", type=float, default=0.005)
parser.add_argument("--out", default="elastic")
args = parser.parse_args()

atoms = read_structure(args.structure)
atoms.calc = EScAIPCalculator(args.model, dtype="float64")
relaxed = elastic_constants(atoms, strain=args.strain)
relaxed.write(args.out)
print(relaxed.summary())

# What the atoms inside the cell give way by: constants with clamped atoms are never smaller.
clamped = elastic_constants(relaxed.atoms, strain=args.strain, relaxation="none")
print(
    f"with clamped atoms: bulk {clamped.averages['bulk_hill']:.2f} GPa, shear {clamped.averages['shear_hill']:.2f} GPa"
)
