"""The relaxations and surfaces of the real catalyst data, against ASE, and energies against the work of forces."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import ase.io
import numpy as np
import pytest

from escaip.data import open_source
from escaip.data.inspect import ForceWork

SharedData = Callable[[str], Path]


def test_relaxations_equal_ase(shared_data: SharedData) -> None:
    folder = shared_data("catalysts/oc20_dft_traj")
    work, count = ForceWork(), 0
    for path in sorted(folder.glob("*.traj")):
        expected = ase.io.read(path, ":")
        found = list(open_source(path, group_by="file"))
        assert len(found) == len(expected)
        count += len(found)
        for data, atoms in zip(found, expected, strict=True):
            assert float(data.energy) == atoms.get_potential_energy()
            assert np.array_equal(data.forces.numpy(), atoms.get_forces(apply_constraint=False))
            assert np.array_equal(data.positions.numpy(), atoms.positions)
            assert data.group == path.name
            work.add(data)
    assert count == 4019
    assert work.pairs > 500
    assert work.ratio == pytest.approx(1.0, abs=0.05)


def test_surfaces_equal_ase(shared_data: SharedData) -> None:
    path = shared_data("catalysts/w_be_surfaces.extxyz.gz")
    expected, found = ase.io.read(path, ":"), list(open_source(path))
    assert len(found) == len(expected) == 460
    for data, atoms in zip(found, expected, strict=True):
        assert float(data.energy) == atoms.get_potential_energy()
        assert np.array_equal(data.forces.numpy(), atoms.get_forces(apply_constraint=False))
        assert not data.has_label("stress")
