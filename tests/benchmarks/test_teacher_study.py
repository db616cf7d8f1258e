"""What the teacher study says of radial distributions and vacancies, and the pictures drawn of its results."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import deck_figures
import properties
import property_teachers

from escaip.simulate.analysis import RadialDistribution


def peaked(center: float, width: float, height: float) -> RadialDistribution:
    distance = np.linspace(1.0, 6.0, 251)
    g = height * np.exp(-0.5 * ((distance - center) / width) ** 2)
    return RadialDistribution(distance, distance, {"all": g}, {}, 1)


def test_first_peak_lies_between_bins() -> None:
    found = peaked(2.5537, 0.12, 8.0)
    position, height = properties.first_peak(found.distance, found.g["all"])
    assert position == pytest.approx(2.5537, abs=1e-6)
    assert height == pytest.approx(8.0, abs=1e-5)


def test_error_of_a_radial_distribution() -> None:
    reference = peaked(2.5, 0.1, 8.0)
    assert properties.off_by(reference, reference) == 0.0
    assert properties.off_by(peaked(2.5, 0.1, 8.4), reference) == pytest.approx(5.0)  # per cent
    assert properties.off_by(peaked(4.5, 0.1, 8.0), reference) == pytest.approx(200.0)  # nothing in common


def test_a_whole_hop_fills_the_hole() -> None:
    atoms = property_teachers.TEACHERS["argon"].crystal(2)
    before = atoms.positions.copy()
    property_teachers.hop(atoms, 5, 1.0)
    (moved,) = np.flatnonzero(np.abs(atoms.positions - before).max(axis=1) > 1e-9)
    assert moved != 5
    assert atoms.get_distance(moved, 5, mic=True) == pytest.approx(0.0, abs=1e-9)
    assert np.linalg.norm(atoms.positions[moved] - before[moved]) == pytest.approx(5.33 / np.sqrt(2))


def test_every_picture_is_drawn_and_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["deck_figures.py", "--out", str(tmp_path)])
    deck_figures.main()
    drawn = {path.stem: path.stat().st_size for path in tmp_path.iterdir()}
    assert set(drawn) == {*deck_figures.STUDIES, *deck_figures.DECKS}
    assert max(drawn.values()) < 80_000
