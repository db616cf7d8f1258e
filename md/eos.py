"""Equation of state: at which volume is a crystal at rest, and how hard is it to compress?

python eos.py MODEL [STRUCTURE] [--span X] [--points N] [--out DIR]
"""

import argparse
from pathlib import Path

from escaip import EScAIPCalculator
from escaip.properties import fit_equation_of_state
from escaip.simulate import read_structure

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", help=".ckpt or .escaip file, with conservative forces")
parser.add_argument("structure", nargs="?", default=Path(__file__).parent / "structures" / "InP.cif")
parser.add_argument("--span", type=float, default=0.06, help="volumes within 1 ± SPAN of the first")
parser.add_argument("--points", type=int, default=9)
parser.add_argument("--out", default="eos")
args = parser.parse_args()

atoms = read_structure(args.structure)
atoms.calc = EScAIPCalculator(args.model, dtype="float64")
curve = fit_equation_of_state(atoms, span=args.span, points=args.points)
curve.write(args.out)
print(curve.summary())
for volume, energy in zip(curve.volumes, curve.energies, strict=True):
    print(f"{volume:10.3f} Å³  {1e3 * (energy - curve.energy) / len(atoms):8.3f} meV/atom above the minimum")
