"""Nudged elastic band: which barrier lies between two structures?

python neb.py MODEL INITIAL FINAL [--images N] [--out DIR]
"""

import argparse

from escaip import EScAIPCalculator
from escaip.properties import minimum_energy_path
from escaip.simulate import read_structure

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", help=".ckpt or .escaip file")
parser.add_argument("initial")
parser.add_argument("final", help="the same atoms in the same order and cell")
parser.add_argument("--images", type=int, default=5)
parser.add_argument("--fmax", type=float, default=0.05, help="eV/Å")
parser.add_argument("--out", default="neb")
args = parser.parse_args()

initial, final = read_structure(args.initial), read_structure(args.final)
initial.calc = EScAIPCalculator(args.model, dtype="float64")


def report(step: int, force: float) -> None:
    print(f"step {step:4d}  largest force on the band {force:.4f} eV/Å")


path = minimum_energy_path(initial, final, images=args.images, fmax=args.fmax, report=report)
path.write(args.out)
print(path.summary())
