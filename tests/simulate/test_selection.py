"""Frames to label next: the most uncertain, none twice, none broken."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import ase.build
import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from scipy.spatial.transform import Rotation

from escaip.calculators import CommitteeCalculator
from escaip.errors import ConfigError, DataError
from escaip.potential import Potential
from escaip.simulate import select_file, select_frames
from escaip.simulate.select import FrameScores, score_frames

Make = Callable[..., Potential]


@pytest.fixture
def models(make_potential: Make, tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{seed}.escaip" for seed in (1, 2)]
    for seed, path in enumerate(paths, 1):
        make_potential(seed).save(path)
    return paths


def frames() -> list[Atoms]:
    """Twelve of methanol, one of them twice, turned and in another order; two of water; one whose atoms touch."""
    found = []
    for index in range(12):
        atoms = ase.build.molecule("CH3OH")
        atoms.rattle(0.02 * (1 + index % 4), seed=index)
        atoms.calc = SinglePointCalculator(atoms, energy=1.0, forces=np.ones((len(atoms), 3)))
        atoms.info.update(charge=0, step=index, note="kept elsewhere")
        found.append(atoms)
    turned = found[3][[3, 4, 2, 5, 1, 0]]
    turned.positions = turned.positions @ Rotation.random(random_state=0).as_matrix().T + 1.0
    water = ase.build.molecule("H2O")
    other = water.copy()
    other.rattle(0.05, seed=0)
    broken = ase.build.molecule("CH3OH")
    broken.positions[1] = broken.positions[0] + 0.05
    return [*found, turned, water, other, broken]


def test_scores_are_those_of_the_calculator(models: list[Path]) -> None:
    structures = frames()[:-1]
    scores = score_frames(structures, models)
    calculator = CommitteeCalculator(models)
    for index, atoms in enumerate(structures):
        spread = calculator.get_property("forces_spread", atoms)
        assert scores.forces_spread[index] == pytest.approx(spread.max(), rel=1e-9)
        assert scores.mean_forces_spread[index] == pytest.approx(spread.mean(), rel=1e-9)
        assert scores.energy_spread[index] == pytest.approx(calculator.get_property("energy_spread", atoms), abs=1e-9)
    np.testing.assert_allclose(scores.descriptors[12], scores.descriptors[3], atol=1e-9)


def test_frames_are_chosen_by_spread_without_duplicates(models: list[Path], tmp_path: Path) -> None:
    path, out = tmp_path / "run.extxyz", tmp_path / "next" / "chosen.extxyz"
    ase.io.write(path, frames())
    selection = select_file(path, models, out, count=6, min_distance=1e-6)
    report = json.loads(out.with_suffix(".json").read_text())
    numbers = report["chosen"]["frame"]
    assert len(set(numbers)) == 6
    assert len({3, 12} & set(numbers)) < 2
    assert 15 not in report["frames"]["frame"]
    assert (selection.num_frames, selection.num_broken, selection.num_considered) == (16, 1, 15)
    spread = dict(zip(report["frames"]["frame"], report["frames"]["max_forces_spread"], strict=True))
    assert spread[numbers[0]] == max(spread.values())
    assert report["chosen"]["distance"].count(None) == 1 + bool({13, 14} & set(numbers))
    written = ase.io.read(out, ":")
    for number, atoms in zip(numbers, written, strict=True):
        assert atoms.calc is None
        assert set(atoms.info) <= {"charge", "source_frame", "max_forces_spread"}
        assert atoms.info["source_frame"] == number
        np.testing.assert_allclose(atoms.positions, frames()[number].positions, atol=1e-7)
    assert "6 of 16 frames chosen" in selection.summary()
    assert "1 frames are broken" in selection.summary()


def test_limits_and_fewer_than_asked_for(models: list[Path], tmp_path: Path) -> None:
    path, out = tmp_path / "run.traj", tmp_path / "chosen.extxyz"
    ase.io.write(path, frames()[:12])
    spreads = np.sort(score_frames(frames()[:12], models).forces_spread)
    low, high = float(spreads[3]) - 1e-9, float(spreads[8]) + 1e-9
    selection = select_file(path, models, out, count=10, min_spread=low, max_spread=high, min_distance=0.0)
    assert len(selection.frames) == selection.num_considered == 6
    assert low < selection.spreads.min() < selection.spreads.max() < high
    one = select_file(path, models, out, count=10, min_distance=1e3)
    assert len(one.frames) == 1
    every = select_file(path, models, out, count=10, every=5, min_distance=0.0)
    assert sorted(json.loads(out.with_suffix(".json").read_text())["frames"]["frame"]) == [0, 5, 10]
    assert every.num_frames == 3


def test_spread_and_distance_both_count() -> None:
    """On a line: the most uncertain, then far before near, then by the product."""
    place = np.array([0.0, 0.001, 1.0, 2.0, 2.1])
    spread = np.array([1.0, 0.99, 0.5, 0.4, 0.3])
    scores = FrameScores(spread, spread, spread, [np.array([x]) for x in place], ["A"] * 5)
    chosen, distance = select_frames(scores, 5, np.arange(5), 0.005)
    assert chosen.tolist() == [0, 3, 2, 4]  # 0.4 · 2 > 0.3 · 2.1 > 0.5 · 1; then 0.5 · 1; 1 is 0 again
    np.testing.assert_allclose(distance, [np.inf, 2.0, 1.0, 0.1])
    assert select_frames(scores, 2, np.array([2, 4]))[0].tolist() == [2, 4]


def test_another_formula_is_far_but_its_spread_counts() -> None:
    spread = np.array([1.0, 0.4, 0.5, 0.001])
    descriptors = [np.array([0.0]), np.array([0.1]), np.zeros(2), np.zeros(3)]
    scores = FrameScores(spread, spread, spread, descriptors, ["A", "A", "B", "C"])
    chosen, distance = select_frames(scores, 4, np.arange(4))
    assert chosen.tolist() == [0, 2, 1, 3]  # 0.5 · 0.1 > 0.4 · 0.1 > 0.001 · 0.1
    np.testing.assert_allclose(distance, [np.inf, np.inf, 0.1, np.inf])


@pytest.mark.bad_input
def test_selections_that_cannot_be(models: list[Path], tmp_path: Path) -> None:
    path, out = tmp_path / "run.extxyz", tmp_path / "chosen.extxyz"
    ase.io.write(path, frames()[:3])
    for change, message in (
        ({"count": 0}, "count is 0"), ({"every": 0}, "every is 0"), ({"min_spread": -1.0}, "min_spread is -1.0"),
        ({"max_spread": 0.0}, "max_spread is 0.0"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            select_file(path, models, out, **{"count": 1, **change})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"ends in \.extxyz"):
        select_file(path, models, tmp_path / "chosen.xyz", count=1)
    with pytest.raises(ConfigError, match="at least two models"):
        select_file(path, models[:1], out, count=1)
    with pytest.raises(DataError, match="no frame is within the limits: force spreads are"):
        select_file(path, models, out, count=1, min_spread=1e6)
    with pytest.raises(DataError, match="does not exist"):
        select_file(tmp_path / "none.extxyz", models, out, count=1)
    ase.io.write(path, frames()[-1:])
    with pytest.raises(DataError, match="no frame is sound"):
        select_file(path, models, out, count=1)
    assert not out.exists()
    assert not out.with_suffix(".json").exists()
