"""Velocity autocorrelations and spectra of oscillators whose frequencies are known."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms, units
from ase.calculators.harmonic import SpringCalculator

from escaip.errors import DataError, UsageError
from escaip.simulate import MDSettings, read_trajectory, run_md
from escaip.simulate.analysis import WAVENUMBER, Vibrations, vibrations
from escaip.simulate.report import group_weights


def wavenumber(stiffness: float, mass: float, timestep: float) -> float:
    """cm⁻¹, of a spring integrated by velocity Verlet: ``sin(ω' Δt/2) = ω Δt/2``."""
    half = 0.5 * np.sqrt(stiffness / mass) * timestep * units.fs
    return float(np.arcsin(half) / (np.pi * timestep) * WAVENUMBER)


def spectrum_of(path: Path, interval: float, **options: Any) -> Vibrations:
    frames = list(read_trajectory(path))
    groups, weights = group_weights(frames[0])
    moving = np.array([frame.get_velocities() for frame in frames]) * units.fs
    return vibrations(moving, groups, weights, frames[0].get_masses(), interval, **options)


def test_atoms_on_springs_vibrate_at_their_frequencies(tmp_path: Path) -> None:
    atoms = Atoms("Ar2Kr2", positions=6.0 * np.eye(4, 3), cell=[20.0] * 3, pbc=True)
    atoms.calc = SpringCalculator(atoms.positions, 2.0)
    asked = MDSettings(temperature=100.0, timestep=4.0, steps=752, trajectory_interval=2, log_interval=1000)
    run_md(atoms, asked, out=tmp_path / "a.traj")
    found = spectrum_of(tmp_path / "a.traj", 8.0)
    light, heavy = (wavenumber(2.0, mass, 4.0) for mass in (39.948, 83.798))
    assert found.resolution == pytest.approx(WAVENUMBER / 1512.0)
    assert sorted(found.peaks) == pytest.approx([heavy, light], abs=0.1 * found.resolution)
    for name, expected in (("Ar", light), ("Kr", heavy)):
        assert found.frequency[np.argmax(found.spectrum[name])] == pytest.approx(expected, abs=found.resolution)
        curve = found.vacf[name] / found.vacf[name][0]  # a cosine
        assert curve == pytest.approx(np.cos(2 * np.pi * expected / WAVENUMBER * found.lag), abs=0.05)
    kinetic = np.mean([frame.get_kinetic_energy() for frame in read_trajectory(tmp_path / "a.traj")])
    squares = 2 * 39.948 * found.vacf["Ar"][0] + 2 * 83.798 * found.vacf["Kr"][0]
    assert 0.5 * squares * 103.642697 == pytest.approx(kinetic, rel=1e-6)  # eV per amu Å²/fs²
    assert found.highest == pytest.approx(WAVENUMBER / 16.0)


def thermal(masses: np.ndarray, frequencies: Sequence[float], num_frames: int = 4000) -> np.ndarray:
    """``(F, N, 3)`` Å/fs: each atom at a frequency of its own, all with the same energy."""
    time = np.arange(num_frames)[:, None, None]
    phase = np.random.default_rng(0).uniform(0, 2 * np.pi, size=(1, len(masses), 3))
    turning = 2 * np.pi * np.array(frequencies)[None, :, None] / WAVENUMBER * time
    return np.cos(turning + phase) / np.sqrt(masses)[None, :, None]


def test_weighted_with_masses_every_mode_has_the_same_area() -> None:
    masses = np.array([1.0, 16.0, 16.0])
    moving = thermal(masses, [3000.0, 800.0, 800.0])
    groups, weights = group_weights(Atoms("HO2"))
    found = vibrations(moving, groups, weights, masses, 1.0, length=1000.0)
    area = {name: float(np.trapezoid(values, found.frequency)) for name, values in found.spectrum.items()}
    assert area["all"] == pytest.approx(1.0)
    assert area["H"] == pytest.approx(1 / 3, abs=0.01)
    assert area["O"] == pytest.approx(2 / 3, abs=0.01)
    assert found.spectrum["H"] + found.spectrum["O"] == pytest.approx(found.spectrum["all"], abs=1e-12)


def test_lines_are_as_wide_as_it_is_said() -> None:
    found = vibrations(thermal(np.ones(20), [1000.0] * 20), ["all"], np.full((20, 1), 0.05), np.ones(20), 1.0)
    high = found.spectrum["all"] > 0.5 * found.spectrum["all"].max()
    width = np.ptp(found.frequency[high]) + found.frequency[1]
    assert width == pytest.approx(found.resolution, abs=found.frequency[1])
    assert found.peaks == pytest.approx([1000.0], abs=0.02 * found.resolution)
    assert found.spectrum["all"].min() > -0.03 * found.spectrum["all"].max()  # lobes of the Hann window


@pytest.mark.bad_input
def test_what_has_no_spectrum_is_refused() -> None:
    moving, weights, masses = thermal(np.ones(2), [500.0, 500.0], 100), np.full((2, 1), 0.5), np.ones(2)
    with pytest.raises(DataError, match="too few frames"):
        vibrations(moving[:20], ["all"], weights, masses, 1.0)
    with pytest.raises(DataError, match="must hold momenta"):
        vibrations(0.0 * moving, ["all"], weights, masses, 1.0)
    for length in (5.0, 101.0):
        with pytest.raises(UsageError, match=r"not exceed the trajectory, 99 fs"):
            vibrations(moving, ["all"], weights, masses, 1.0, length=length)
