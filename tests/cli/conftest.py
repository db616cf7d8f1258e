"""A model file, structures and labelled data small enough for every command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ase.build
import ase.io
import numpy as np
import pytest
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms
from tiny import make_potential

from escaip.potential import PotentialMetadata

METADATA = PotentialMetadata(elements=(1, 6, 7, 8, 29), level_of_theory="random numbers", datasets=("none",))


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny.escaip"
    make_potential(metadata=METADATA).save(path)
    return path


@pytest.fixture(scope="session")
def direct_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "direct.escaip"
    make_potential(metadata=METADATA, forces="direct").save(path)
    return path


@pytest.fixture
def second(tmp_path: Path) -> Path:
    """A further member of a committee, which supports all elements."""
    path = tmp_path / "second.escaip"
    make_potential(1).save(path)
    return path


@pytest.fixture
def molecule(tmp_path: Path) -> Path:
    path = tmp_path / "methanol.xyz"
    ase.io.write(path, ase.build.molecule("CH3OH"))
    return path


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    """Five structures: one without forces, one periodic with stress, one with a fixed atom."""
    rng = np.random.default_rng(0)
    frames = []
    for index, name in enumerate(["CH3OH", "H2O", "NH3", "CH4", "Cu"]):
        atoms = ase.build.bulk("Cu", cubic=True) if name == "Cu" else ase.build.molecule(name)
        atoms.rattle(0.05, seed=index)
        results: dict[str, Any] = {"energy": -10.0 - index}
        if name != "NH3":
            results["forces"] = rng.normal(size=(len(atoms), 3))
        if name == "Cu":
            stress = rng.normal(scale=0.01, size=(3, 3))
            results["stress"] = (stress + stress.T)[[0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1]]
        if name == "CH4":
            atoms.set_constraint(FixAtoms([0]))
        atoms.calc = SinglePointCalculator(atoms, **results)
        frames.append(atoms)
    path = tmp_path / "labelled.extxyz"
    ase.io.write(path, frames)
    return path
