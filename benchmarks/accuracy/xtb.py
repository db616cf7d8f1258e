"""3BPA labelled by GFN2-xTB: the published frames at 300 K to train on, and hot and stretched ones to be tested on.

Frames of 600, 1000 and 1200 K come from Langevin dynamics with GFN2-xTB itself, begun at published frames.
Stretched ones are the scan of one bond of each kind, from 0.8 to 1.8 of its length in steps of 0.05, all else fixed.
Needs tblite. Some minutes the first time; what a folder holds is not made again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import ase.io
import numpy as np
from ase import Atoms, units
from ase.calculators.singlepoint import SinglePointCalculator
from ase.md.langevin import Langevin
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution

from escaip.distil.structures import bonds, side_of

TEMPERATURES = (600, 1000, 1200)  # K
TRAJECTORIES, FRAMES, APART, SETTLING = 4, 25, 20, 200  # of each temperature; fs
STRETCHES = np.arange(0.80, 1.81, 0.05)


def make(published: Path, folder: Path) -> dict[str, Path]:
    """Writes ``train.extxyz``, ``hot.extxyz`` and ``stretched.extxyz``; returns the files by name."""
    frames: list[Atoms] = ase.io.read(published, ":")  # type: ignore[assignment]
    makers: dict[str, Callable[[], list[Atoms]]] = {
        "train": lambda: [labelled(atoms) for atoms in frames],
        "hot": lambda: [atoms for temperature in TEMPERATURES for atoms in hot(frames, temperature)],
        "stretched": lambda: [labelled(atoms) for atoms in stretched(frames[0])],
    }
    return write(makers, folder)


def write(makers: Mapping[str, Callable[[], list[Atoms]]], folder: Path) -> dict[str, Path]:
    """Writes what is not there yet as ``NAME.extxyz``; returns the files by name."""
    files = {name: folder / f"{name}.extxyz" for name in makers}
    folder.mkdir(parents=True, exist_ok=True)
    for name, path in files.items():
        if not path.exists():
            print(f"making {path.name}", flush=True)
            aside = path.with_suffix(".part")
            ase.io.write(aside, makers[name](), format="extxyz")
            aside.rename(path)
    return files


def calculator() -> object:
    from tblite.ase import TBLite

    return TBLite(method="GFN2-xTB", verbosity=0)


def labelled(atoms: Atoms) -> Atoms:
    """A copy with energy and forces of GFN2-xTB."""
    copy = Atoms(atoms.numbers, atoms.positions)
    copy.calc = calculator()
    energy, forces = copy.get_potential_energy(), copy.get_forces()
    copy.calc = SinglePointCalculator(copy, energy=energy, forces=forces)
    return copy


def hot(frames: list[Atoms], temperature: int) -> list[Atoms]:
    """Frames of several trajectories, the first ``SETTLING`` fs of each left out."""
    found = []
    for index in range(TRAJECTORIES):
        rng = np.random.default_rng([temperature, index])
        atoms = Atoms(frames[0].numbers, frames[int(rng.integers(len(frames)))].positions)
        atoms.calc = calculator()
        MaxwellBoltzmannDistribution(atoms, temperature_K=temperature, rng=rng)
        dynamics = Langevin(atoms, units.fs, temperature_K=temperature, friction=0.02 / units.fs, fixcm=False, rng=rng)
        dynamics.run(SETTLING)
        for _ in range(FRAMES):
            dynamics.run(APART)
            results = {"energy": atoms.get_potential_energy(), "forces": atoms.get_forces()}
            frame = Atoms(atoms.numbers, atoms.positions)
            frame.calc = SinglePointCalculator(frame, **results)
            found.append(frame)
    return found


def stretched(atoms: Atoms) -> list[Atoms]:
    """Rigid scans of the first bond of each kind that is in no ring."""
    pairs, found, kinds = bonds(atoms), [], set()
    for one, other in pairs:
        kind, moved = frozenset((atoms.symbols[one], atoms.symbols[other])), side_of(pairs, other, one)
        if kind in kinds or one in moved:
            continue
        kinds.add(kind)
        vector = atoms.positions[other] - atoms.positions[one]
        for factor in STRETCHES:
            copy = atoms.copy()
            copy.positions[moved] += (factor - 1) * vector
            found.append(copy)
    return found
