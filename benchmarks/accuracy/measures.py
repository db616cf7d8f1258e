"""What users look at beside errors: does hot dynamics hold, does energy drift, what do defects cost.

Each takes a potential, the stores of its set and a folder for scratch, and returns plain values by name.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import ase.data
import numpy as np
from accuracy.taught import TAUGHT
from ase import Atoms, units
from ase.data import covalent_radii
from properties import measure_statics
from stability import RUNAWAY, Molecule

from escaip import EScAIPCalculator, Potential
from escaip.data import Store
from escaip.errors import SimulationError
from escaip.simulate import MDSettings, run_md

Values = dict[str, float]
REPLICAS, PICOSECONDS, TEMPERATURES = 16, 2.0, (300.0, 600.0, 1000.0)
OURS_ONLY = ("drift", "crystal")  # need more of a potential than that it predicts
FRICTION, LOOK = 0.02, 10  # 1/fs; steps of 1 fs


def survival(potential: Potential, stores: dict[str, Path], folder: Path) -> Values:
    """Runs of 2 ps in Langevin dynamics that keep their bonds, and the mean life of a run in ps."""
    atoms = Store(stores["train"])[0].to_ase()
    if isinstance(potential, Potential):
        potential.compile()  # for 6 000 evaluations
    found: Values = {}
    for temperature in TEMPERATURES:
        lives = lives_of(potential, atoms, temperature)
        found[f"survive {temperature:.0f} K of {REPLICAS}"] = int((lives >= PICOSECONDS).sum())
        found[f"mean life at {temperature:.0f} K (ps)"] = float(lives.mean())
    return found


def lives_of(potential: Potential, atoms: Atoms, temperature: float) -> np.ndarray:
    """Picoseconds that each replica lives, all in one batch; BAOAB (Leimkuhler and Matthews, AMRX 2013)."""
    molecule, count, rng = Molecule(atoms), len(atoms), np.random.default_rng(0)
    masses = np.tile(atoms.get_masses(), REPLICAS)[:, None]
    kept, step = np.exp(-FRICTION), units.fs
    spread = np.sqrt(units.kB * temperature * masses)
    positions, momenta = np.tile(atoms.positions, (REPLICAS, 1)), spread * rng.standard_normal((len(masses), 3))

    def forces() -> np.ndarray:
        frames = [Atoms(atoms.numbers, own) for own in positions.reshape(REPLICAS, count, 3)]
        return np.concatenate([np.asarray(one.forces, float) for one in potential.predict(frames)])

    lives, force = np.full(REPLICAS, PICOSECONDS), forces()
    for now in range(1, round(1000 * PICOSECONDS) + 1):
        momenta += 0.5 * step * force
        positions = positions + 0.5 * step * momenta / masses
        momenta = kept * momenta + np.sqrt(1 - kept**2) * spread * rng.standard_normal(momenta.shape)
        positions = positions + 0.5 * step * momenta / masses
        force = forces()
        momenta += 0.5 * step * force
        if now % LOOK == 0:
            present = (momenta**2 / masses).reshape(REPLICAS, -1).sum(1) / (3 * count * units.kB)
            wrong = molecule.failures(positions.reshape(REPLICAS, count, 3), present, RUNAWAY * temperature)
            for number, why in enumerate(wrong):
                if why is not None:
                    lives[number] = min(lives[number], 1e-3 * now)
            if (lives < PICOSECONDS).all():
                break
    return lives


def worst_frames(potential: Potential, stores: dict[str, Path], folder: Path) -> Values:
    """The largest error of a frame in each part but training: of its energy, and of its forces on average."""
    found: Values = {}
    for part, path in stores.items():
        if part != "train":
            frames = list(Store(path))
            pairs = list(zip(potential.predict(frames), frames, strict=True))
            energies = [abs(one.energy - float(data.energy)) / data.num_nodes for one, data in pairs]
            forces = [np.abs(np.asarray(one.forces) - data.forces.double().numpy()).mean() for one, data in pairs]
            found[f"{part}: worst frame, energy (meV/atom)"] = 1e3 * float(max(energies))
            found[f"{part}: worst frame, forces (meV/Å)"] = 1e3 * float(max(forces))
    return found


def drift(potential: Potential, stores: dict[str, Path], folder: Path) -> Values:
    """Drift of the total energy over 2 ps at 300 K without a thermostat, meV/atom/ps."""
    atoms = Store(stores["train"])[0].to_ase()
    atoms.calc = EScAIPCalculator(potential)
    settings = MDSettings(ensemble="nve", temperature=300.0, timestep=0.5, steps=4000, log_interval=10)
    try:
        result = run_md(atoms, settings, out=folder / "nve.extxyz", overwrite=True)
    except SimulationError as error:
        print(f"drift: {error}")
        return {}
    return {} if result.drift is None else {"drift at 300 K (meV/atom/ps)": result.drift.slope}


def defects(potential: Potential, stores: dict[str, Path], folder: Path) -> Values:
    """Mean absolute error of ``E − N e_bulk`` by kind of defect, eV; ``e_bulk`` is each side's own.

    The bulk is the frame of lowest energy per atom among those of equal numbers of both elements. The last value is by
    how much the energy of a defect changes at most in a cell twice as long.
    """
    frames = [one for part in ("val", "test") for one in Store(stores[part]) if str(one.group).startswith("s_")]
    bulk = min(
        (one for one in Store(stores["train"]) if len(set(np.bincount(one.atomic_numbers)) - {0}) == 1),
        key=lambda one: float(one.energy) / one.num_nodes,
    )
    predicted = [found.energy for found in potential.predict([bulk, *frames])]
    errors: dict[str, list[float]] = defaultdict(list)
    for one, energy in zip(frames, predicted[1:], strict=True):
        share = one.num_nodes / bulk.num_nodes
        truth = float(one.energy) - share * float(bulk.energy)
        errors[str(one.group)].append(abs(energy - share * predicted[0] - truth))
    found = {f"defect {kind} (eV)": float(np.mean(values)) for kind, values in sorted(errors.items())}
    return {**found, "defects in cells twice as long, largest change (eV)": longer_cells(potential, bulk.to_ase())}


def longer_cells(potential: Potential, bulk: Atoms) -> float:
    """By how much the energies of unrelaxed defects change when their cell is twice as long, at most, eV.

    Vacancies, antisites, pairs of them and interstitials in 2 × 2 × 2 cells of zinc blende.
    """
    perfect = bulk.repeat(2)
    near = int(np.argsort(perfect.get_distances(0, range(len(perfect)), mic=True))[1])  # of the other element
    swapped = {0: perfect.numbers[near], near: perfect.numbers[0]}
    cells = []
    for gone in ([0], [near], [0, near]):
        cells.append(perfect.copy())
        del cells[-1][gone]
        cells.append(perfect.copy())
        cells[-1].numbers[gone] = [swapped[index] for index in gone]
    for index in (0, near):
        place = perfect.positions[0] + 0.5 * bulk.cell.sum(0)
        cells.append(perfect + Atoms([perfect.numbers[index]], [place]))
    long = []
    for cell in cells:
        long.append(cell.copy())
        long[-1].cell[0] *= 2
        more = perfect.copy()
        more.positions += perfect.cell[0]
        long[-1] += more
    energies = np.array([found.energy for found in potential.predict([perfect, *cells, *long])])
    return float(np.abs(energies[1 + len(cells) :] - energies[1 : 1 + len(cells)] - energies[0]).max())


def dimers(potential: Potential, stores: dict[str, Path], folder: Path) -> Values:
    """How far the energy of two atoms falls while they approach each other inside nine tenths of their bond, eV.

    A right potential never falls there; the mean over all pairs of elements, and the largest.
    """
    elements = sorted(potential.metadata.elements)
    depths = []
    for index, one in enumerate(elements):
        for other in elements[index:]:
            bond = covalent_radii[one] + covalent_radii[other]
            distances = bond * np.arange(0.90, 0.39, -0.02)
            frames = [Atoms([one, other], [[0, 0, 0], [0, 0, distance]]) for distance in distances]
            energies = np.array([found.energy for found in potential.predict(frames)])
            depths.append(float((np.maximum.accumulate(energies) - energies).max()))
    return {"dimers, mean fall (eV)": float(np.mean(depths)), "dimers, largest fall (eV)": max(depths)}


def crystal(potential: Potential, stores: dict[str, Path], folder: Path) -> Values:
    """Elastic constants, phonons, vacancy and surfaces beside the teacher's, in per cent of the teacher's."""
    teacher = next(one for one in TAUGHT.values() if ase.data.atomic_numbers[one.symbol] in potential.metadata.elements)
    try:
        truth, learned = (
            measure_statics(teacher, calculator).values for calculator in (teacher.make(), EScAIPCalculator(potential))
        )
    except SimulationError as error:
        print(f"crystal: {error}")
        return {}
    return {
        f"{name.rpartition(' (')[0]} (% off)": 100 * (learned[name] / value - 1)
        for name, value in truth.items() if value and learned[name] is not None and abs(value) > 1e-2
    }  # fmt: skip
