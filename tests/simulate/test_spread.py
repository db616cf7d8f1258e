"""Runs with a committee: what is logged, what is saved, what stops, and all of it across a restart."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ase.build
import ase.io
import numpy as np
import pytest
from ase import Atoms

from escaip.errors import ConfigError, SimulationError
from escaip.simulate import MDSettings, read_log, run_md
from escaip.simulate.output import LOG_COLUMNS

Make = Callable[..., Any]
COLUMN = "max_forces_spread_eV_A"


@pytest.fixture
def committee(argon: Make) -> Make:
    """Argon whose members would differ by half of the force on each atom."""

    class Committee(type(argon().calc)):  # type: ignore[misc]
        implemented_properties = ["energy", "free_energy", "forces", "stress", "energy_spread", "forces_spread"]  # noqa: RUF012

        def calculate(self, *args: Any, **kwargs: Any) -> None:
            super().calculate(*args, **kwargs)
            self.results["forces_spread"] = 0.5 * np.linalg.norm(self.results["forces"], axis=1)
            self.results["energy_spread"] = 0.1

    def make() -> Atoms:
        atoms = argon()
        atoms.calc = Committee()
        return atoms

    return make


def settings(**changes: Any) -> MDSettings:
    values: dict[str, Any] = {"temperature": 60.0, "timestep": 4.0, "steps": 40, "log_interval": 1}
    return MDSettings(**{**values, "trajectory_interval": 4, "restart_interval": 10, **changes})


@pytest.fixture
def spreads(committee: Make, tmp_path: Path) -> np.ndarray:
    """Largest spread at each of forty steps."""
    run_md(committee(), settings(), out=tmp_path / "plain.extxyz")
    return read_log(tmp_path / "plain.csv")[COLUMN]


def test_only_a_committee_has_a_column(committee: Make, argon: Make, tmp_path: Path, spreads: np.ndarray) -> None:
    run_md(argon(), settings(steps=2), out=tmp_path / "a.extxyz")
    assert tuple(read_log(tmp_path / "a.csv")) == LOG_COLUMNS
    assert tuple(read_log(tmp_path / "plain.csv")) == (*LOG_COLUMNS, COLUMN)
    assert not (tmp_path / "plain.uncertain.extxyz").exists()
    frame = ase.io.read(tmp_path / "plain.extxyz", 0)
    expected = 0.5 * np.linalg.norm(frame.get_forces(), axis=1).max()
    assert spreads[0] == pytest.approx(expected, abs=1e-6)


def test_frames_above_a_spread_are_saved_once_per_interval(
    committee: Make, tmp_path: Path, spreads: np.ndarray
) -> None:
    threshold = float(np.median(spreads))
    run_md(committee(), settings(save_spread=threshold), out=tmp_path / "a.extxyz")
    expected: list[int] = []
    for step, spread in enumerate(spreads):
        if spread > threshold and (not expected or step >= expected[-1] + 4):
            expected.append(step)
    assert 3 < len(expected) < 12
    frames = ase.io.read(tmp_path / "a.uncertain.extxyz", ":")
    assert [frame.info["step"] for frame in frames] == expected
    for frame in frames:
        assert frame.arrays["forces_spread"].max() == pytest.approx(spreads[frame.info["step"]], abs=1e-6)
        assert frame.info["energy_spread"] == 0.1
        assert frame.get_forces().shape == (len(frame), 3)


@pytest.mark.parametrize("killed", [15, 38])
def test_a_restart_saves_no_frame_twice(
    committee: Make, run_killed: Make, tmp_path: Path, spreads: np.ndarray, killed: int
) -> None:
    asked = settings(save_spread=float(np.median(spreads)))
    run_md(committee(), asked, out=tmp_path / "whole.extxyz")
    run_killed(committee(), asked, tmp_path / "parts.extxyz", killed)
    with (tmp_path / "parts.uncertain.extxyz").open("a") as stream:
        stream.write("32\nLattice=")  # a frame that was being written
    run_md(committee(), asked, out=tmp_path / "parts.extxyz", resume=True)
    for name in ("extxyz", "uncertain.extxyz"):
        assert (tmp_path / f"whole.{name}").read_bytes() == (tmp_path / f"parts.{name}").read_bytes()
    run_md(committee(), settings(steps=2), out=tmp_path / "parts.extxyz", overwrite=True)
    assert not (tmp_path / "parts.uncertain.extxyz").exists()  # nothing of an older run stays beside a new one


@pytest.mark.bad_input
def test_a_restart_of_another_version_is_refused(committee: Make, run_killed: Make, tmp_path: Path) -> None:
    path, asked = tmp_path / "a.extxyz", settings(save_spread=1.0)
    run_killed(committee(), asked, path, 25)
    restart = path.with_suffix(".restart.npz")
    stored = dict(np.load(restart))
    header = json.loads(stored["header"].tobytes())
    stored["header"] = np.frombuffer(json.dumps({**header, "schema": 1}).encode(), dtype=np.uint8)
    np.savez(restart, **stored)
    before = path.read_bytes()
    with pytest.raises(SimulationError, match="is of another version of escaip: resume with that version"):
        run_md(committee(), asked, out=path, resume=True)
    assert path.read_bytes() == before


def test_too_large_a_spread_stops_the_run(committee: Make, tmp_path: Path, spreads: np.ndarray) -> None:
    limit = float(np.sort(spreads)[-4])
    first = int(np.argmax(spreads > limit))
    with pytest.raises(SimulationError, match=rf"step {first}: the committee's forces on atom \d+ \(Ar\)") as caught:
        run_md(committee(), settings(max_spread=limit), out=tmp_path / "a.extxyz")
    assert "a.uncertain.extxyz: label it and train on it" in str(caught.value)
    frame = ase.io.read(tmp_path / "a.uncertain.extxyz")
    assert frame.info["step"] == first
    assert frame.arrays["forces_spread"].max() > limit
    run_md(committee(), settings(max_spread=1e3), out=tmp_path / "a.extxyz", resume=True)
    np.testing.assert_array_equal(read_log(tmp_path / "a.csv")[COLUMN], spreads)


@pytest.mark.bad_input
def test_spreads_without_a_committee(argon: Make, committee: Make, tmp_path: Path) -> None:
    for name in ("max_spread", "save_spread"):
        with pytest.raises(ConfigError, match=f"{name} is -1.0 eV/Å"):
            settings(**{name: -1.0})
        with pytest.raises(ConfigError, match="need a committee"):
            run_md(argon(), settings(**{name: 1.0}), out=tmp_path / "a.extxyz")
    assert not (tmp_path / "a.extxyz").exists()
    run_md(committee(), settings(steps=10), out=tmp_path / "b.extxyz")
    with pytest.raises(SimulationError, match="other columns"):
        run_md(argon(), settings(), out=tmp_path / "b.extxyz", resume=True)
