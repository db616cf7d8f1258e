"""LAMMPS with an EScAIP potential: writes a data file, then runs in.escaip.

python run.py MODEL [STRUCTURE] [--ensemble nve|npt] [--temperature K] [--pressure BAR] [--steps N] [--out FILE]
"""

import argparse
from pathlib import Path

import ase.io

from escaip.calculators.lammps import LammpsDriver, open_lammps
from escaip.simulate import read_structure

here = Path(__file__).parent
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", help=".ckpt or .escaip file; with conservative forces for npt")
parser.add_argument("structure", nargs="?", default=here.parent / "structures" / "water.extxyz")
parser.add_argument("--ensemble", choices=("nve", "npt"), default="nve")
parser.add_argument("--temperature", type=float, default=300.0)
parser.add_argument("--pressure", type=float, default=0.0, help="bar")
parser.add_argument("--steps", type=int, default=1000)
parser.add_argument("--out", default="lammps.dump")
args = parser.parse_args()

atoms = read_structure(args.structure)
if not atoms.pbc.any():
    atoms.center(vacuum=3.0)  # a box to start with; boundary s follows the atoms
elements = sorted(set(atoms.symbols))
data = f"{args.out}.data"
ase.io.write(data, atoms, format="lammps-data", specorder=elements, masses=True, units="metal", atom_style="atomic")

boundary = " ".join("p" if periodic else "s" for periodic in atoms.pbc)
settings = {
    "data": data,
    "boundary": boundary,
    **{k: v for k, v in vars(args).items() if k not in ("model", "structure")},
}
arguments = [word for name, value in settings.items() for word in ("-var", name, str(value))]
# Double precision: what is left of the drift is then the potential's, not rounding's.
driver = LammpsDriver(args.model, elements, open_lammps(["-log", f"{args.out}.log", *arguments]), dtype="float64")
driver.file(here / "in.escaip")
