"""Constant temperature: does a molecule keep its bonds, and which temperature does it have?

python nvt.py MODEL [STRUCTURE] [--thermostat langevin|bussi|nose-hoover] [--temperature K] [--steps N] [--out FILE]
"""

import argparse
from pathlib import Path

from escaip import EScAIPCalculator
from escaip.simulate import MDSettings, ProgressLine, read_structure, run_md

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", help=".ckpt or .escaip file")
parser.add_argument("structure", nargs="?", default=Path(__file__).parent / "structures" / "ethanol.xyz")
parser.add_argument("--thermostat", choices=("langevin", "bussi", "nose-hoover"), default="langevin")
parser.add_argument("--temperature", type=float, default=300.0)
parser.add_argument("--steps", type=int, default=4000)
parser.add_argument("--resume", action="store_true", help="continue after an interruption")
parser.add_argument("--out", default="nvt.extxyz")
args = parser.parse_args()

atoms = read_structure(args.structure)
atoms.calc = EScAIPCalculator(args.model)
settings = MDSettings(
    ensemble="nvt",
    thermostat=args.thermostat,
    temperature=args.temperature,
    timestep=0.5,
    steps=args.steps,
    restart_interval=500,
)
result = run_md(atoms, settings, out=args.out, resume=args.resume, overwrite=True, report=ProgressLine())
print(result.summary())
