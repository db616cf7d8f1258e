"""Path-integral dynamics with i-PI: nuclei as ring polymers, the potential as their force.

python run.py MODEL [STRUCTURE] [--beads N] [--temperature K] [--steps N]
"""

import argparse
from pathlib import Path
from xml.etree import ElementTree

from escaip import EScAIPCalculator
from escaip.calculators.ipi import run_ipi
from escaip.simulate import read_structure

here = Path(__file__).parent
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", help=".ckpt or .escaip file")
parser.add_argument("structure", nargs="?", default=here.parent / "structures" / "ethanol.xyz")
parser.add_argument("--beads", type=int, default=4)
parser.add_argument("--temperature", type=float, default=300.0)
parser.add_argument("--steps", type=int, default=200)
args = parser.parse_args()

atoms = read_structure(args.structure)
if not atoms.pbc.any():
    atoms.center(vacuum=10.0)  # i-PI wants a cell, of which the potential hears nothing
box = " ".join(f"{x:.10f}" for x in atoms.cell.standard_form()[0].cellpar())
atoms.set_cell(atoms.cell.standard_form()[0], scale_atoms=True)  # i-PI's frame: the first vector along x
rows = [f"{s} {x:.12f} {y:.12f} {z:.12f}" for s, (x, y, z) in zip(atoms.symbols, atoms.positions, strict=True)]
Path("start.xyz").write_text(
    "\n".join([str(len(atoms)), f"# CELL(abcABC): {box} positions{{angstrom}} cell{{angstrom}}", *rows, ""])
)

settings = ElementTree.parse(here / "input.xml")
settings.find("total_steps").text = str(args.steps)
settings.find("system/initialize").set("nbeads", str(args.beads))
for place in ("system/initialize/velocities", "system/ensemble/temperature"):
    settings.find(place).text = str(args.temperature)
settings.write("ipi.xml")

# Beads take turns: a skin that reaches from one to the others keeps the neighbors of all.
atoms.calc = EScAIPCalculator(args.model, dtype="float64", skin=2.0)
run_ipi("ipi.xml", atoms)
print(f"{args.steps} steps of {args.beads} beads: energies in ipi.properties, centroids in ipi.centroid.xyz")
