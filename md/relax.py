"""Geometry optimisation, of a molecule or of a crystal with its cell.

python relax.py MODEL [STRUCTURE] [--cell] [--fmax F] [--out FILE]
"""

import argparse
from pathlib import Path

from escaip import EScAIPCalculator
from escaip.simulate import read_structure, relax, write_structure

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", help=".ckpt or .escaip file")
parser.add_argument("structure", nargs="?", default=Path(__file__).parent / "structures" / "ethanol.xyz")
parser.add_argument("--cell", action="store_true", help="relax the cell as well")
parser.add_argument("--fmax", type=float, default=0.01, help="eV/Å")
parser.add_argument("--steps", type=int, default=500)
parser.add_argument("--out", default="relaxed.extxyz")
args = parser.parse_args()

atoms = read_structure(args.structure)
atoms.calc = EScAIPCalculator(args.model, dtype="float64")


def report(step: int, energy: float, largest_force: float) -> None:
    print(f"step {step:4d}  energy {energy:.6f} eV  largest force {largest_force:.4f} eV/Å")


result = relax(atoms, cell=args.cell, fmax=args.fmax, steps=args.steps, report=report)
write_structure(args.out, result.atoms)
print(result.summary())
