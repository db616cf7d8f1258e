"""The judge of runs in benchmarks/stability.py: what it calls a failure, and what it counts."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from ase.build import molecule

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
from stability import Fate, Molecule, spread_of, summary


def moved(atom: int, toward: int, by: float) -> np.ndarray:
    """Methanol with one atom moved along the line to another, Å."""
    atoms = molecule("CH3OH")
    line = atoms.positions[toward] - atoms.positions[atom]
    atoms.positions[atom] += by * line / np.linalg.norm(line)
    return atoms.positions


def test_failures() -> None:
    judge = Molecule(molecule("CH3OH"))
    assert judge.bonds.sum() == 5
    broken = np.full((6, 3), np.nan)
    positions = np.stack([
        moved(0, 1, 0.0),
        moved(3, 1, -0.45),  # the O-H bond, stretched by less than the limit
        moved(3, 1, -0.55),
        moved(0, 1, 0.0),
        broken,
    ])  # fmt: skip
    found = judge.failures(positions, np.array([300.0, 300.0, 300.0, 901.0, 300.0]), 900.0)
    assert found == [None, None, "bond", "temperature", "not finite"]


def test_contact_without_a_broken_bond() -> None:
    atoms = molecule("CH4")
    judge, carbon = Molecule(atoms), atoms.positions[0]
    lines = atoms.positions[1:3] - carbon
    bent = lines[0] + 8.0 * lines[1]  # a hydrogen turned to within 10 degrees of the next, its bond as long as before
    atoms.positions[1] = carbon + bent * np.linalg.norm(lines[0]) / np.linalg.norm(bent)
    assert judge.failures(atoms.positions[None], np.array([300.0]), 900.0) == ["contact"]


def test_spread_is_that_of_the_committee() -> None:
    forces = np.zeros((2, 1, 3, 3))
    forces[0, 0, 1], forces[1, 0, 1] = [1.0, 0.0, 2.0], [3.0, 0.0, 2.0]
    assert spread_of(list(forces)) == pytest.approx([1.0])  # standard deviations 1, 0, 0 of one atom


def test_summary() -> None:
    fates = [Fate(), Fate(flagged=10.0, spread=2.0), Fate(500.0, "bond", 100.0, 3.0), Fate(1500.0, "contact")]
    found = summary(fates, committee=True, picoseconds=2.0)
    assert (found["runs"], found["survived"]) == (4, 2)
    assert found["mean_time_to_failure_ps"] == pytest.approx((2 + 2 + 0.5 + 1.5) / 2)
    assert found["why"] == {"bond": 1, "contact": 1}
    assert (found["flagged_before_failure"], found["survivors_flagged"]) == (1, 1)
    assert found["median_lead_fs"] == 400.0
    assert summary([Fate()], committee=False, picoseconds=2.0)["mean_time_to_failure_ps"] is None
