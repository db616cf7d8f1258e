"""Path-integral dynamics with i-PI: nuclei as ring polymers, the potential as their force.

python run.py MODEL [STRUCTURE] [--beads N] [--temperature K] [--steps N]
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

from ase.calculators.socketio import SocketClient, actualunixsocketname

from escaip import EScAIPCalculator
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
    atoms.center(vacuum=10.0)  # i-PI needs a cell; the potential ignores it
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
name = f"escaip_{os.getpid()}"  # a socket of its own, so that runs do not meet
settings.find("ffsocket/address").text = name
settings.write("ipi.xml")

program = Path(sys.executable).with_name("i-pi")
if not program.exists():
    raise SystemExit("i-PI is not installed: pip install ipi")
# Beads are evaluated in turn: a skin that reaches from one to the others keeps one neighbor list for all.
atoms.calc = EScAIPCalculator(args.model, dtype="float64", skin=2.0)
socket = Path(actualunixsocketname(name))
with open("ipi.log", "w") as log, subprocess.Popen([program, "ipi.xml"], stdout=log, stderr=subprocess.STDOUT) as ipi:
    try:
        while not socket.exists():
            if ipi.poll() is not None:
                raise SystemExit("i-PI did not start: see ipi.log")
            time.sleep(0.05)
        time.sleep(0.5)  # from the name of the socket to somebody who listens
        SocketClient(unixsocket=name).run(atoms, use_stress=bool(atoms.pbc.any()))
        if ipi.wait():
            raise SystemExit("i-PI stopped with an error: see ipi.log")
    finally:
        ipi.terminate()
        socket.unlink(missing_ok=True)
print(f"{args.steps} steps of {args.beads} beads: energies in ipi.properties, centroids in ipi.centroid.xyz")
