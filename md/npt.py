"""Constant pressure and temperature: which density does a liquid or a crystal take?

python npt.py MODEL [STRUCTURE] [--temperature K] [--pressure GPA] [--repeat N] [--steps N] [--out FILE]
"""

import argparse
from pathlib import Path

from escaip import EScAIPCalculator
from escaip.simulate import MDSettings, ProgressLine, read_log, read_structure, run_md

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", help=".ckpt or .escaip file, with conservative forces")
parser.add_argument("structure", nargs="?", default=Path(__file__).parent / "structures" / "water.extxyz")
parser.add_argument("--temperature", type=float, default=300.0)
parser.add_argument("--pressure", type=float, default=0.0)
parser.add_argument("--repeat", type=int, default=1, help="copies of the cell along each axis")
parser.add_argument("--steps", type=int, default=2000)
parser.add_argument("--out", default="npt.extxyz")
args = parser.parse_args()

atoms = read_structure(args.structure).repeat(args.repeat)
atoms.calc = EScAIPCalculator(args.model)
settings = MDSettings(
    ensemble="npt",
    barostat="isotropic",
    temperature=args.temperature,
    pressure=args.pressure,
    timestep=0.5,
    steps=args.steps,
)
result = run_md(atoms, settings, out=args.out, overwrite=True, report=ProgressLine())
print(result.summary())
log = read_log(result.log)
half = len(log["step"]) // 2
density = atoms.get_masses().sum() * 1.66053907 / log["volume_A3"][half:].mean()
print(f"second half: pressure {log['pressure_GPa'][half:].mean():.3f} GPa, density {density:.3f} g/cm³")
