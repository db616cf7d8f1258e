"""One structure and one short NVE run in every engine that carries the potential, beside ASE (docs/howto/engines.md).

    python benchmarks/engines.py [--model FILE | --preset 1m] [--dtype float64] [--steps 50] [--repeats 3] [--out FILE]

64 atoms of sheared, rattled InP with velocities of 600 K. Each engine evaluates them with the same potential, then
takes the same steps by its own velocity Verlet, in its own units. What is shown of each is the largest difference from
ASE: energy, forces and virial before the first step, energy and positions after the last, the latter modulo the cell.
An engine that is not installed is named, with the way to get it. Engines take turns; steps per second are those after
the first evaluation, medians of the turns.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import ase.build
import ase.io
import numpy as np
import torch
from ase import Atoms, units
from ase.calculators.socketio import SocketClient
from ase.md.verlet import VelocityVerlet
from common import markdown_table, provenance, write_json

from escaip import EScAIPCalculator, EScAIPConfig, Potential, load_potential
from escaip.calculators.lammps import LammpsDriver, open_lammps
from escaip.calculators.torchsim import EScAIPModel
from escaip.errors import ConfigError

TIMESTEP = 1.0  # fs
_ATOMIC_TIME = units._aut * units.s
REPLICAS = 8


@dataclass
class Run:
    """What an engine had before the first step and after the last, in eV and Å."""

    energy: float
    forces: np.ndarray
    virial: np.ndarray
    last_energy: float
    positions: np.ndarray
    seconds: float
    systems: int = 1


def structure(repeat: int) -> Atoms:
    """Sheared, in the frame of LAMMPS and i-PI (first vector along x, second in the plane of x and y)."""
    atoms = ase.build.bulk("InP", "zincblende", a=5.87, cubic=True).repeat(repeat)
    shear = [[1.0, 0.0, 0.0], [0.08, 1.02, 0.0], [-0.05, 0.06, 0.97]]
    atoms.set_cell(atoms.cell.array @ np.array(shear), scale_atoms=True)
    atoms.rattle(0.08, seed=0)
    spread = np.sqrt(600.0 * units.kB / atoms.get_masses())[:, None]
    atoms.set_velocities(np.random.default_rng(0).normal(size=atoms.positions.shape) * spread)
    return atoms


def with_ase(potential: Potential, atoms: Atoms, steps: int) -> Run:
    atoms.calc = EScAIPCalculator(potential)
    virial = -atoms.get_volume() * atoms.get_stress(voigt=False)
    energy, forces = atoms.get_potential_energy(), atoms.get_forces()
    dynamics = VelocityVerlet(atoms, TIMESTEP * units.fs)
    start = time.perf_counter()
    dynamics.run(steps)
    seconds = time.perf_counter() - start
    return Run(energy, forces, virial, atoms.get_potential_energy(), atoms.positions.copy(), seconds)


def with_lammps(potential: Potential, atoms: Atoms, steps: int) -> Run:
    elements = sorted(set(atoms.symbols))
    ase.io.write("start.data", atoms, format="lammps-data", specorder=elements, masses=True, velocities=True)
    driver = LammpsDriver(potential, elements, open_lammps(["-log", "none", "-screen", "none"]))
    driver.commands(
        "units metal\natom_style atomic\nread_data start.data\npair_style zero 3.0\npair_coeff * *\n"
        "fix escaip all external pf/callback 1 1\ncompute virial all pressure NULL virial\n"
        f"thermo_style custom step pe c_virial[*]\nthermo_modify norm no\nfix nve all nve\ntimestep {TIMESTEP / 1000.0}"
    )
    driver.commands("run 0")
    lammps = driver.lammps
    order = np.argsort(lammps.numpy.extract_atom("id", nelem=len(atoms)))
    forces = lammps.numpy.extract_atom("f", nelem=len(atoms))[order].copy()
    pressure = lammps.numpy.extract_compute("virial", 0, 1)[[0, 3, 4, 3, 1, 5, 4, 5, 2]].reshape(3, 3)
    virial = pressure * atoms.get_volume() / lammps.extract_global("nktv2p")
    energy = lammps.get_thermo("pe")
    start = time.perf_counter()
    driver.commands(f"run {steps}")
    seconds = time.perf_counter() - start
    found = Run(energy, forces, virial, lammps.get_thermo("pe"), driver.structure().positions, seconds)
    lammps.close()
    return found


def with_torch_sim(potential: Potential, atoms: Atoms, steps: int, replicas: int = 1) -> Run:
    model = EScAIPModel(potential, "cpu")
    import torch_sim

    state = torch_sim.io.atoms_to_state([atoms] * replicas, model.device, model.dtype)
    state.momenta = torch.from_numpy(np.tile(atoms.get_momenta(), (replicas, 1)))
    virial = -atoms.get_volume() * model(state)["stress"][0].numpy()
    timestep = torch.tensor(TIMESTEP * units.fs, dtype=torch.float64)
    if hasattr(torch_sim, "nve_init"):
        state = torch_sim.nve_init(state, model, kT=0.0)
    else:  # 0.3
        begin, update = torch_sim.integrators.nve(model, dt=timestep, kT=torch.tensor(0.0))
        state = begin(state)
    count = len(atoms)
    energy, forces = float(state.energy[0]), state.forces[:count].numpy().copy()
    start = time.perf_counter()
    for _ in range(steps):
        state = torch_sim.nve_step(state, model, dt=timestep) if hasattr(torch_sim, "nve_init") else update(state)
    seconds = time.perf_counter() - start
    return Run(energy, forces, virial, float(state.energy[0]), state.positions[:count].numpy(), seconds, replicas)


def with_torch_sim_batch(potential: Potential, atoms: Atoms, steps: int) -> Run:
    return with_torch_sim(potential, atoms, steps, REPLICAS)


class Watched(EScAIPCalculator):
    """Keeps when it answered, and its first forces: i-PI's own files have six digits."""

    def calculate(self, *arguments: Any, **options: Any) -> None:
        super().calculate(*arguments, **options)
        self.times = [*getattr(self, "times", []), time.perf_counter()]
        self.first = getattr(self, "first", self.results["forces"].copy())


INPUT = """<simulation verbosity='low'>
  <output prefix='ipi'>
    <properties stride='1' filename='out'> [ potential{{electronvolt}}, virial_md{{atomic_unit}} ] </properties>
  </output>
  <total_steps> {steps} </total_steps>
  <ffsocket mode='unix' name='escaip' pbc='False'> <address> {address} </address> <latency> 1e-4 </latency> </ffsocket>
  <system>
    <initialize nbeads='1'>
      <file mode='xyz'> start.xyz </file> <velocities mode='xyz'> velocities.xyz </velocities>
    </initialize>
    <forces> <force forcefield='escaip'/> </forces>
    <ensemble> <temperature units='kelvin'> 300 </temperature> </ensemble>
    <motion mode='dynamics'>
      <dynamics mode='nve'> <timestep units='femtosecond'> {timestep} </timestep> </dynamics> <fixcom> False </fixcom>
    </motion>
  </system>
</simulation>
"""


def connected(address: str, ipi: subprocess.Popen[bytes]) -> SocketClient:
    """Connects to i-PI once it listens, which is a little after its socket is there."""
    while ipi.poll() is None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)  # ASE leaves the socket of a failed try open
            try:
                return SocketClient(unixsocket=address)
            except (FileNotFoundError, ConnectionRefusedError):
                pass
        time.sleep(0.05)
    raise SystemExit(f"engines: i-PI ended with status {ipi.returncode} before it could be reached")


def with_ipi(potential: Potential, atoms: Atoms, steps: int) -> Run:
    box = " ".join(str(x) for x in atoms.cell.cellpar())
    velocities = atoms.get_velocities() / units.Bohr * _ATOMIC_TIME
    for name, what, values in (
        ("start.xyz", "positions{angstrom}", atoms.positions),
        ("velocities.xyz", "velocities{atomic_unit}", velocities),
    ):
        rows = [f"{s} {x:.17g} {y:.17g} {z:.17g}" for s, (x, y, z) in zip(atoms.symbols, values, strict=True)]
        Path(name).write_text("\n".join([str(len(atoms)), f"# CELL(abcABC): {box} {what} cell{{angstrom}}", *rows, ""]))
    address = f"escaip_{os.getpid()}"
    Path("input.xml").write_text(INPUT.format(steps=steps, timestep=TIMESTEP, address=address))
    volume = atoms.get_volume() / units.Bohr**3 * units.Hartree
    atoms.calc = calculator = Watched(potential)
    with subprocess.Popen([Path(sys.executable).with_name("i-pi"), "input.xml"], stdout=subprocess.DEVNULL) as ipi:
        try:
            connected(address, ipi).run(atoms, use_stress=True)
        except BaseException:
            ipi.kill()  # it would wait for another client, and this for it
            raise
    rows = np.loadtxt("ipi.out")
    virial = rows[0, 1:][[0, 3, 4, 3, 1, 5, 4, 5, 2]].reshape(3, 3) * volume
    seconds = calculator.times[-1] - calculator.times[0]
    return Run(rows[0, 0], calculator.first, virial, rows[-1, 0], atoms.positions.copy(), seconds)


ENGINES: dict[str, tuple[str, Callable[[Potential, Atoms, int], Run]]] = {
    "ASE": ("ase", with_ase),
    "LAMMPS": ("lammps", with_lammps),
    "torch-sim": ("torch-sim-atomistic", with_torch_sim),
    f"torch-sim, {REPLICAS} at once": ("torch-sim-atomistic", with_torch_sim_batch),
    "i-PI": ("ipi", with_ipi),
}


def differences(found: Run, reference: Run, cell: np.ndarray) -> dict[str, float]:
    fractional = (found.positions - reference.positions) @ np.linalg.inv(cell)
    return {
        "energy": abs(found.energy - reference.energy),
        "forces": float(np.abs(found.forces - reference.forces).max()),
        "virial": float(np.abs(found.virial - reference.virial).max()),
        "last_energy": abs(found.last_energy - reference.last_energy),
        "positions": float(np.abs((fractional - np.round(fractional)) @ cell).max()),
    }


def in_turns(potential: Potential, atoms: Atoms, steps: int, repeats: int) -> dict[str, list[Run] | str]:
    """Runs of each engine, each in a folder of its own; of one that is absent, why."""
    found: dict[str, Any] = {name: [] for name in ENGINES}
    here = Path.cwd()
    for _ in range(repeats):
        for name, (_, run) in ENGINES.items():
            if isinstance(found[name], str):
                continue
            with tempfile.TemporaryDirectory() as folder:
                os.chdir(folder)
                try:
                    found[name].append(run(potential, atoms.copy(), steps))
                except ConfigError as error:
                    found[name] = str(error)
                finally:
                    os.chdir(here)
    return found


def measure(potential: Potential, atoms: Atoms, steps: int, repeats: int) -> list[dict[str, Any]]:
    """One row for each engine, ASE first, which the others are compared with."""
    runs = in_turns(potential, atoms, steps, repeats)
    rows: list[dict[str, Any]] = []
    for name, found in runs.items():
        if isinstance(found, str):
            rows.append({"engine": name, "absent": found})
            continue
        row = {"engine": name, "version": metadata.version(ENGINES[name][0])}
        rates = [steps * run.systems / run.seconds for run in found]
        row.update(differences(found[0], runs["ASE"][0], atoms.cell.array))
        rows.append({**row, "steps_per_second": statistics.median(rates), "rates": sorted(rates)})
    return rows


def print_table(rows: list[dict[str, Any]]) -> None:
    shown = ("energy", "forces", "virial", "last_energy", "positions")
    header = ["engine", "energy, eV", "forces, eV/Å", "virial, eV", "energy after", "positions after, Å", "steps/s"]
    cells = [
        [f"{row['engine']} {row['version']}", *(f"{row[name]:.1e}" for name in shown), f"{row['steps_per_second']:.1f}"]
        for row in rows
        if "absent" not in row
    ]
    print(markdown_table(header, cells))
    for row in rows:
        if "absent" in row:
            print(f"{row['engine']}: absent: {row['absent']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", help=".ckpt or .escaip file; by default random weights of a preset")
    parser.add_argument("--preset", default="1m")
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float64")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--repeat", type=int, default=2, help="cells of eight atoms along each axis")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    if arguments.model:
        potential = load_potential(arguments.model, device="cpu")
    else:
        potential = Potential(EScAIPConfig.preset(arguments.preset))
    potential = potential.to(getattr(torch, arguments.dtype)).eval()
    atoms = structure(arguments.repeat)
    if not arguments.model:  # random forces as large as real ones
        potential.scale /= potential.predict([atoms])[0].forces.square().mean().sqrt().double()
    rows = measure(potential, atoms, arguments.steps, arguments.repeats)
    print_table(rows)
    if arguments.out:
        described = {"atoms": len(atoms), "steps": arguments.steps, "dtype": arguments.dtype, "timestep_fs": TIMESTEP}
        model = arguments.model or f"random weights of preset {arguments.preset}"
        write_json(arguments.out, {"provenance": provenance(), "model": model, **described, "engines": rows})


if __name__ == "__main__":
    main()
