"""Phonons: bands, density of states and free energy of a crystal (pip install 'escaip[sim]').

python phonons.py MODEL [STRUCTURE] [--supercell A B C] [--out DIR]
"""

import argparse
from pathlib import Path

from escaip import EScAIPCalculator
from escaip.properties import crystal_phonons
from escaip.properties.phonons import THZ_TO_CM
from escaip.simulate import read_structure

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", help=".ckpt or .escaip file, with conservative forces")
parser.add_argument("structure", nargs="?", default=Path(__file__).parent / "structures" / "InP.cif")
parser.add_argument("--supercell", type=int, nargs=3, help="repeats; by default at least 12 Å along each axis")
parser.add_argument("--mesh", type=float, default=60.0)
parser.add_argument("--out", default="phonons")
args = parser.parse_args()

atoms = read_structure(args.structure)
atoms.calc = EScAIPCalculator(args.model, dtype="float64")
phonons = crystal_phonons(atoms, supercell=args.supercell, mesh=args.mesh)
phonons.write(args.out)
print(phonons.summary())
optical = phonons.frequencies([0.0, 0.0, 0.0])[-1]
print(f"highest mode at Γ {optical:.3f} THz, {THZ_TO_CM * optical:.1f} cm⁻¹")
