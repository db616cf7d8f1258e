"""Constant energy: how well does a potential conserve it?

python nve.py MODEL [STRUCTURE] [--steps N] [--out FILE]
"""

import argparse
from pathlib import Path

from escaip import EScAIPCalculator
from escaip.simulate import MDSettings, ProgressLine, read_structure, relax, run_md

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", help=".ckpt or .escaip file")
parser.add_argument("structure", nargs="?", default=Path(__file__).parent / "structures" / "ethanol.xyz")
parser.add_argument("--steps", type=int, default=2000)
parser.add_argument("--out", default="nve.extxyz")
args = parser.parse_args()

atoms = read_structure(args.structure)
# Double precision: what is left of the drift is then the potential's, not rounding's.
atoms.calc = EScAIPCalculator(args.model, dtype="float64")
relaxed = relax(atoms, fmax=0.02)
print(relaxed.summary())

# In a relaxed structure half of the kinetic energy becomes potential energy: 600 K drawn, 300 K on average.
settings = MDSettings(ensemble="nve", temperature=600.0, velocities="draw", timestep=0.5, steps=args.steps)
result = run_md(relaxed.atoms, settings, out=args.out, overwrite=True, report=ProgressLine())
print(result.summary())
