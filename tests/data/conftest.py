"""Small structures for the data tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import ase.build
import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator

from escaip.data import AtomicData

MOLECULES = ("H2O", "CH4", "NH3", "CH3CH2OH", "CO2", "C6H6")


def labelled(atoms: Atoms, rng: np.random.Generator, *, stress: bool = False) -> Atoms:
    """The structure, displaced, with invented but plausible labels."""
    atoms = atoms.copy()
    atoms.positions += rng.normal(scale=0.03, size=(len(atoms), 3))
    results = {"energy": -5.0 * len(atoms) + rng.normal(), "forces": rng.normal(size=(len(atoms), 3))}
    if stress:
        results["stress"] = rng.normal(scale=0.01, size=6)
    atoms.calc = SinglePointCalculator(atoms, **results)
    return atoms


@pytest.fixture
def frames() -> list[Atoms]:
    """Sixty molecules and crystals with labels, ten of each kind."""
    rng = np.random.default_rng(0)
    molecules = [labelled(ase.build.molecule(name), rng) for name in MOLECULES[:5] for _ in range(10)]
    copper = ase.build.bulk("Cu", cubic=True)
    return molecules + [labelled(copper, rng, stress=True) for _ in range(10)]


@pytest.fixture
def structures(frames: list[Atoms]) -> list[AtomicData]:
    return [AtomicData.from_ase(atoms, structure_id=f"made:{k}") for k, atoms in enumerate(frames)]


@pytest.fixture
def xyz_file(frames: list[Atoms], tmp_path: Path) -> Path:
    path = tmp_path / "made.extxyz"
    ase.io.write(path, frames)
    return path


@pytest.fixture
def write_xyz(tmp_path: Path) -> Callable[[str, str], Path]:
    """Writes text under a name."""

    def write(name: str, text: str) -> Path:
        path = tmp_path / name
        path.write_text(text)
        return path

    return write
