"""How near the properties of a small trained model come to those of its teacher.

    python benchmarks/properties.py --out runs/properties/properties.json

For each teacher (EMT copper, Lennard-Jones argon): strained, rattled frames, some with a vacancy or surfaces, labelled
by the teacher; a model of less than 0.3 M parameters trained on them by ``escaip fit``; the same properties of both by
``escaip.properties`` and ``escaip.simulate``. Dynamics are random: the teacher runs twice, with
different seeds, and what its radial distribution is off from itself stands beside what the model's is off from it. The
JSON holds the curves that ``deck_figures.py`` draws. Needs phonopy (pip install 'escaip[sim]').
"""

from __future__ import annotations

import argparse
import json
import os
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import torch
from ase import Atoms
from ase.build import bulk
from common import markdown_table, provenance, write_json
from property_teachers import FACES, TEACHERS, Teacher, cpu_seconds, hop, train

from escaip import EScAIPCalculator
from escaip.errors import SimulationError
from escaip.properties import crystal_phonons, elastic_constants, fit_equation_of_state, minimum_energy_path
from escaip.properties.phonons import Bands, Phonons
from escaip.simulate import MDSettings, relax, run_md
from escaip.simulate.analysis import RadialDistribution, radial_distribution

X, L = (0.5, 0.0, 0.5), (0.5, 0.5, 0.5)
DEFAULTS = {"frames": 240, "steps": 3000, "md_steps": 2400}
# Å, of phonons. In a perfect crystal features of the surroundings vanish by symmetry, and the root of their square is
# rounded there over some 0.005 Å: smaller displacements see that, larger ones what atoms do (0.01 Å is kept beside it).
DISPLACEMENT = 0.03
BARRIER = "vacancy hop (eV)"
RADIAL = "∫|g − g_teacher| / ∫g_teacher (%)"


@dataclass
class Found:
    """Properties of one potential.

    Attributes:
        values: by name, with units; None where there is none.
        curves: what figures are drawn of.
        seconds: of CPU that each took.
    """

    values: dict[str, float | None] = field(default_factory=dict)
    curves: dict[str, dict[str, Any]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def timed(self, name: str, compute: Callable[[], Any]) -> Any:
        """What ``compute`` returns."""
        began = cpu_seconds()
        result = compute()
        self.seconds[name] = round(cpu_seconds() - began, 2)
        return result


def measure_statics(teacher: Teacher, calculator: Any) -> Found:
    """Everything but dynamics."""
    found = Found()
    primitive = bulk(teacher.symbol, teacher.structure, a=teacher.lattice)
    primitive.calc = calculator
    curve = found.timed("equation of state", lambda: fit_equation_of_state(primitive))
    lattice = float((4 * curve.volume) ** (1 / 3))
    found.values.update({"lattice constant (Å)": lattice, "B0 (GPa)": float(curve.bulk_modulus)})
    found.curves["equation_of_state"] = {
        "volumes_A3/atom": listed(curve.volumes), "energies_eV/atom": listed(curve.energies, 7),
    }  # fmt: skip
    elastic = found.timed("elastic constants", lambda: elastic_constants(primitive)).stiffness
    for name, entry in (("C11", (0, 0)), ("C12", (0, 1)), ("C44", (3, 3))):
        found.values[f"{name} (GPa)"] = float(elastic[entry])
    phonons = found.timed("phonons", lambda: bands_of(primitive, DISPLACEMENT))
    lowest, highest = ("transverse", "longitudinal") if len(primitive) == 1 else ("lowest", "highest")
    for name, point in (("X", X), ("L", L)):
        modes = phonons.frequencies(point)
        found.values[f"{name} {lowest} (THz)"] = float(modes[0])
        found.values[f"{name} {highest} (THz)"] = float(modes[-1])
    found.values["lowest phonon (THz)"] = float(phonons.lowest)
    found.curves["phonons"] = drawn(phonons.bands)
    found.curves["phonons_small"] = drawn(bands_of(primitive, 0.01).bands)
    found.values["vacancy (eV)"] = found.timed("vacancy", lambda: vacancy(teacher, calculator, lattice))
    for face in FACES:
        name, energy = "surface ({}{}{})".format(*face), partial(surface_energy, teacher, calculator, lattice, face)
        found.values[f"{name} (meV/Å²)"] = found.timed(name, energy)
    path = found.timed("band", lambda: vacancy_hop(teacher, calculator, lattice))
    found.values[BARRIER] = None if path is None else float(path.forward)
    if path is not None:
        found.curves["vacancy_hop"] = {
            "distances_A": listed(path.distances), "energies_eV": listed(path.energies - path.energies[0], 6),
        }  # fmt: skip
    return found


def bands_of(primitive: Atoms, displacement: float) -> Phonons:
    """In a supercell of 216 primitive cells: forces of two layers reach further than the teacher's."""
    return crystal_phonons(primitive, supercell=(6, 6, 6), displacement=displacement, mesh=30.0, path_density=12.0)


def drawn(bands: Bands) -> dict[str, Any]:
    return {
        "labels": bands.labels, "label_distances_1/A": listed(bands.positions),
        "distances_1/A": listed(bands.distances), "branches_THz": [listed(branch) for branch in bands.frequencies.T],
    }  # fmt: skip


def vacancy(teacher: Teacher, calculator: Any, lattice: float) -> float:
    """``E(N − 1) − E(N) (N − 1)/N`` of three cubic cells along each axis, ions relaxed at the lattice constant, eV."""
    perfect = teacher.crystal(3, lattice)
    perfect.calc = calculator
    energy = perfect.get_potential_energy()
    holed = perfect[1:]
    holed.calc = calculator
    return float(relax(holed, fmax=0.002).energy - energy * len(holed) / len(perfect))


def surface_energy(teacher: Teacher, calculator: Any, lattice: float, face: tuple[int, int, int]) -> float:
    """``(E_slab − N e_bulk) / 2A`` of a slab of four cubic cells, ions relaxed as they are cut, meV/Å²."""
    perfect, slab = teacher.crystal(2, lattice), teacher.slab(face, 4 * lattice, lattice)
    perfect.calc = calculator
    energy = perfect.get_potential_energy() / len(perfect)
    slab.calc = calculator
    area = np.linalg.norm(np.cross(*slab.cell[:2]))
    return float(1e3 * (relax(slab, fmax=0.002).energy - energy * len(slab)) / (2 * area))


def vacancy_hop(teacher: Teacher, calculator: Any, lattice: float) -> Any:
    """The path of a neighbor into a vacancy; None, and a line, where the potential has none.

    No image climbs: the middle one lies on the saddle by symmetry, and where a potential has two humps beside it
    instead, equal ones, they would take turns to climb.
    """
    first = teacher.crystal(2, lattice)
    last = first.copy()
    hop(last, 0, 1.0)
    del first[0], last[0]
    first.calc = calculator
    try:
        return minimum_energy_path(first, last, images=7, climb=False, fmax=teacher.fmax)
    except SimulationError as error:
        print(f"no path of the vacancy: {error}")
        return None


def dynamics(
    teacher: Teacher, calculator: Any, folder: Path, steps: int, seed: int, found: Found
) -> RadialDistribution:
    """Of 108 atoms with a Langevin thermostat; the first third is left out."""
    atoms = teacher.crystal(3)
    atoms.calc = calculator
    folder.mkdir(parents=True, exist_ok=True)
    settings = MDSettings(
        ensemble="nvt", temperature=teacher.temperature, timestep=teacher.timestep, steps=steps, trajectory_interval=5,
        thermostat_time=25 * teacher.timestep, seed=seed,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "a timestep of")  # argon's crystal is slower than molecules of its mass
        run = found.timed("dynamics", lambda: run_md(atoms, settings, out=folder / "md.extxyz", overwrite=True))
    frames: list[Atoms] = ase.io.read(run.trajectory, ":")
    radial = radial_distribution(frames[len(frames) // 3 :], 1.5 * teacher.lattice, teacher.lattice / 100)
    g = radial.g["all"]
    found.values["first peak of g(r) (Å)"], found.values["its height"] = first_peak(radial.distance, g)
    found.curves["radial"] = {"distance_A": listed(radial.distance), "g": listed(g)}
    return radial


def first_peak(distance: np.ndarray, g: np.ndarray) -> tuple[float, float]:
    """Vertex of the parabola through ``ln g`` where g is above half of its largest value."""
    top = int(g.argmax())
    near = (g > 0.5 * g[top]) & (np.abs(distance - distance[top]) < 0.2 * distance[top])
    a, b, c = np.polyfit(distance[near] - distance[top], np.log(g[near]), 2)
    return float(distance[top] - b / (2 * a)), float(np.exp(c - b**2 / (4 * a)))


def off_by(found: RadialDistribution, reference: RadialDistribution) -> float:
    """``∫|g − g_reference| dr / ∫g_reference dr``, in per cent."""
    return 100 * float(np.abs(found.g["all"] - reference.g["all"]).sum() / reference.g["all"].sum())


def listed(values: np.ndarray, decimals: int = 4) -> list[float]:
    return [float(value) for value in np.round(values, decimals)]


def study(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Trains on one teacher and measures both."""
    teacher, folder, steps = TEACHERS[name], options.folder / name, options.md_steps
    model, training = train(name, teacher, folder, options.frames, options.steps)
    truth, again = measure_statics(teacher, teacher.make()), Found()
    learned = measure_statics(teacher, EScAIPCalculator(model, dtype="float64"))
    compiled = EScAIPCalculator(model, dtype="float32", skin=0.5, compile=True)
    radial = dynamics(teacher, teacher.make(), folder / "teacher", steps, 1, truth)
    other = dynamics(teacher, teacher.make(), folder / "again", steps, 2, again)
    truth.values[RADIAL] = off_by(other, radial)
    learned.values[RADIAL] = off_by(dynamics(teacher, compiled, folder / "model", steps, 3, learned), radial)
    print(f"\n{name}: {training['parameters']} parameters, {training['steps']} steps, {training['seconds']:.0f} s")
    print(", ".join(f"{key} {value:.2f}" for key, value in training["held_out_mae"].items()))
    print(markdown_table(["property", "teacher", "learned", "off by"], rows(truth, learned)))
    for of, seconds in (("teacher", truth.seconds), ("learned", learned.seconds)):
        print(f"seconds, {of}: " + ", ".join(f"{key} {value:.1f}" for key, value in seconds.items()), flush=True)
    found = {"teacher": asdict(truth), "teacher_again": asdict(again), "learned": asdict(learned)}
    return {"training": training, **found}


def rows(truth: Found, learned: Found) -> list[list[str]]:
    """Of the table; the teacher's own error of g(r) is that of its second run."""
    found = []
    for key, value in truth.values.items():
        other = learned.values[key]
        shares = key != RADIAL and value is not None and other is not None and abs(value) > 1e-2
        off = f"{100 * (other / value - 1):+.2f} %" if shares else ""
        found.append([key, *("none" if number is None else f"{number:.4g}" for number in (value, other)), off])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/properties/properties.json"))
    parser.add_argument("--folder", type=Path, default=Path("runs/properties"), help="of data, models and runs")
    parser.add_argument("--only", choices=tuple(TEACHERS), help="one teacher")
    parser.add_argument("--frames", type=int, default=DEFAULTS["frames"], help="to train on")
    parser.add_argument("--steps", type=int, default=DEFAULTS["steps"], help="of training")
    parser.add_argument("--md-steps", type=int, default=DEFAULTS["md_steps"])
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    given = [
        f" --{key.replace('_', '-')} {vars(options)[key]}" for key in DEFAULTS if vars(options)[key] != DEFAULTS[key]
    ]
    described = {**provenance(), "command": "python benchmarks/properties.py" + "".join(given)}
    for name in TEACHERS:
        if options.only in (None, name):
            found = study(name, options)
            # After each, and what else is there is kept: the whole takes a while.
            studies = json.loads(options.out.read_text("utf-8"))["studies"] if options.out.exists() else {}
            studies[name] = {"provenance": described, **found}
            write_json(options.out, {"studies": {key: studies[key] for key in TEACHERS if key in studies}})


if __name__ == "__main__":
    main()
