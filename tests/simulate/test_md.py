"""Molecular dynamics: energy conservation, temperature and pressure, guards, restart bit for bit."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ase.build
import ase.io
import numpy as np
import pytest
from ase import Atoms, units
from ase.calculators.emt import EMT
from ase.constraints import FixAtoms
from ase.io.trajectory import Trajectory

from escaip.errors import ConfigError, DataError, EscaipError, SimulationError, UsageError
from escaip.simulate import MDSettings, MDStatus, read_log, run_md

Make = Callable[..., Any]

ENSEMBLES: dict[str, dict[str, Any]] = {
    "nve": {"ensemble": "nve"},
    "langevin": {"ensemble": "nvt", "thermostat": "langevin"},
    "bussi": {"ensemble": "nvt", "thermostat": "bussi"},
    "nose-hoover": {"ensemble": "nvt", "thermostat": "nose-hoover"},
    "npt isotropic": {"ensemble": "npt", "barostat": "isotropic", "pressure": 0.1},
    "npt full": {"ensemble": "npt", "barostat": "full", "pressure": 0.1},
}


def settings(**changes: Any) -> MDSettings:
    values: dict[str, Any] = {"temperature": 60.0, "timestep": 4.0, "steps": 40, "log_interval": 1}
    return MDSettings(**{**values, **changes})


def test_our_pair_potential_is_consistent(argon: Make) -> None:
    from escaip.testing import check_potential

    check_potential(argon().calc, [argon(), argon(periodic=False)], energy_tolerance=1e-9)


@pytest.mark.parametrize("periodic", [True, False])
def test_energy_fluctuation_falls_as_the_timestep_squared(argon: Make, tmp_path: Path, periodic: bool) -> None:
    fluctuations = []
    for timestep in (6.0, 3.0):
        asked = settings(timestep=timestep, steps=int(360 / timestep))
        result = run_md(argon(periodic), asked, out=tmp_path / "a.traj", overwrite=True)
        fluctuations.append(result.drift.fluctuation)
    assert 3.3 < fluctuations[0] / fluctuations[1] < 4.7


@pytest.mark.parametrize("name", ["langevin", "bussi", "nose-hoover"])
def test_a_small_molecule_reaches_the_temperature(argon: Make, tmp_path: Path, name: str) -> None:
    """Without drift and rotation eight atoms have 18 degrees of freedom: a thermostat that forgets is 33 % too hot."""
    asked = settings(**ENSEMBLES[name], temperature=20.0, timestep=6.0, steps=1200, trajectory_interval=1200)
    result = run_md(argon(periodic=False), asked, out=tmp_path / "a.traj")
    kinetic = read_log(tmp_path / "a.csv")["kinetic_energy_eV"].mean()
    num_degrees = 24 if name == "langevin" else 18
    assert 2 * kinetic / (num_degrees * units.kB) == pytest.approx(20.0, rel=0.15)
    assert result.mean_temperature == pytest.approx(2 * kinetic / (num_degrees * units.kB))


@pytest.mark.parametrize("periodic", [True, False])
def test_drawn_velocities_have_the_temperature_and_no_drift(argon: Make, tmp_path: Path, periodic: bool) -> None:
    result = run_md(argon(periodic), settings(steps=1, timestep=1e-6), out=tmp_path / "a.traj")
    assert read_log(tmp_path / "a.csv")["temperature_K"][0] == pytest.approx(60.0, rel=1e-9)
    assert np.abs(result.atoms.get_momenta().sum(axis=0)).max() < 1e-8
    if not periodic:
        assert np.abs(result.atoms.get_angular_momentum()).max() < 1e-6


def test_lone_atoms_linear_molecules_and_fixed_atoms(argon: Make, tmp_path: Path) -> None:
    lone = run_md(Atoms("Ar", calculator=argon().calc), settings(steps=5), out=tmp_path / "c.traj")
    assert np.isfinite(lone.atoms.positions).all()
    dimer = ase.build.molecule("N2")
    dimer.calc = EMT()
    with pytest.warns(UserWarning, match="5 fs is long for N"):
        run_md(dimer, settings(timestep=5.0, temperature=300.0, steps=1), out=tmp_path / "a.traj")
    assert read_log(tmp_path / "a.csv")["temperature_K"][0] == pytest.approx(300.0)
    slab = ase.build.fcc111("Cu", (2, 2, 3), vacuum=6.0)
    slab.set_constraint(FixAtoms(range(4)))
    slab.calc = EMT()
    result = run_md(slab, settings(temperature=300.0, steps=20), out=tmp_path / "b.extxyz")
    assert (result.atoms.positions[:4] == slab.positions[:4]).all()
    assert read_log(tmp_path / "b.csv")["temperature_K"][0] == pytest.approx(300.0)


def test_velocities_of_the_structure_are_kept(argon: Make, tmp_path: Path) -> None:
    atoms = argon()
    atoms.set_momenta(np.full((len(atoms), 3), 0.5))
    before = atoms.copy()
    run_md(atoms, settings(temperature=None, steps=1), out=tmp_path / "a.traj")
    with Trajectory(tmp_path / "a.traj") as frames:
        assert (frames[0].get_momenta() == before.get_momenta()).all()
    assert atoms == before  # the caller's structure has not moved


def test_log_and_trajectory_say_the_same(argon: Make, tmp_path: Path) -> None:
    seen: list[MDStatus] = []
    asked = settings(steps=30, log_interval=10, trajectory_interval=10)
    run_md(argon(), asked, out=tmp_path / "sub" / "a.extxyz", report=seen.append)
    log = read_log(tmp_path / "sub" / "a.csv")
    frames = ase.io.read(tmp_path / "sub" / "a.extxyz", ":")
    assert log["step"].tolist() == [f.info["step"] for f in frames] == [0, 10, 20, 30] == [s.step for s in seen]
    assert log["time_fs"].tolist() == [0.0, 40.0, 80.0, 120.0]
    for index, frame in enumerate(frames):
        assert frame.get_potential_energy() == pytest.approx(log["potential_energy_eV"][index], abs=1e-6)
        assert frame.get_kinetic_energy() == pytest.approx(log["kinetic_energy_eV"][index], rel=1e-5)
        pressure = -np.trace(frame.get_stress(voigt=False, include_ideal_gas=True)) / 3 / units.GPa
        assert pressure == pytest.approx(log["pressure_GPa"][index], abs=1e-6)
    assert seen[1].seconds_left > 0


def without_speed(path: Path) -> list[str]:
    return [line.rsplit(",", 1)[0] for line in path.read_text().splitlines()]


@pytest.mark.parametrize("name", ENSEMBLES)
@pytest.mark.parametrize("suffix", [".extxyz", ".traj"])
def test_restart_continues_bit_for_bit(argon: Make, run_killed: Make, tmp_path: Path, name: str, suffix: str) -> None:
    asked = settings(**ENSEMBLES[name], steps=40, trajectory_interval=2, restart_interval=10, thermostat_time=50.0)
    whole = run_md(argon(), asked, out=tmp_path / f"whole{suffix}")
    broken = tmp_path / f"broken{suffix}"
    for step in (5, 17, 33):  # before the first interval, and twice after it
        run_killed(argon(), asked, broken, step, resume=step > 5)
    parts = run_md(argon(), asked, out=broken, resume=True)
    assert (parts.atoms.positions == whole.atoms.positions).all()
    assert (parts.atoms.get_momenta() == whole.atoms.get_momenta()).all()
    assert (parts.atoms.cell.array == whole.atoms.cell.array).all()
    assert without_speed(parts.log) == without_speed(whole.log)
    one, other = (ase.io.read(path, ":") for path in (whole.trajectory, parts.trajectory))
    assert len(one) == len(other) == 21
    for left, right in zip(one, other, strict=True):
        assert (left.positions == right.positions).all()
        assert left.info["step"] == right.info["step"]
    if suffix == ".extxyz":
        assert whole.trajectory.read_bytes() == parts.trajectory.read_bytes()


def test_a_finished_run_can_be_extended_and_resuming_it_again_changes_nothing(argon: Make, tmp_path: Path) -> None:
    run_md(argon(), settings(steps=40), out=tmp_path / "long.extxyz")
    run_md(argon(), settings(steps=25), out=tmp_path / "a.extxyz")
    run_md(argon(), settings(steps=40), out=tmp_path / "a.extxyz", resume=True)
    assert without_speed(tmp_path / "a.csv") == without_speed(tmp_path / "long.csv")
    before = (tmp_path / "a.extxyz").read_bytes()
    again = run_md(argon(), settings(steps=40), out=tmp_path / "a.extxyz", resume=True)
    assert again.steps == 40
    assert (tmp_path / "a.extxyz").read_bytes() == before


@pytest.fixture
def unfinished(argon: Make, run_killed: Make, tmp_path: Path) -> Path:
    run_killed(argon(), settings(restart_interval=10), tmp_path / "a.extxyz", 15)
    return tmp_path / "a.extxyz"


@pytest.mark.bad_input
def test_an_unfinished_run_is_not_lost(argon: Make, unfinished: Path) -> None:
    before = unfinished.read_bytes()
    with pytest.raises(UsageError, match=r"step 10 of 40.*--resume.*--overwrite"):
        run_md(argon(), settings(), out=unfinished)
    assert unfinished.read_bytes() == before
    run_md(argon(), settings(), out=unfinished, overwrite=True)
    before = unfinished.read_bytes()
    with pytest.raises(UsageError, match=r"finished run \(40 steps\).*--resume.*--overwrite"):
        run_md(argon(), settings(), out=unfinished)
    with pytest.raises(UsageError, match=r"a.extxyz has 40 steps already, 39 are asked for"):
        run_md(argon(), settings(steps=39), out=unfinished, resume=True)
    unfinished.with_suffix(".restart.npz").unlink()
    for name in ("a.extxyz", "a.traj"):  # the log is another run's as well
        with pytest.raises(UsageError, match=r"exists: choose another --out.*--overwrite"):
            run_md(argon(), settings(), out=unfinished.with_name(name))
    assert unfinished.read_bytes() == before


@pytest.mark.parametrize("suffix", [".extxyz", ".traj"])
def test_a_run_that_is_asked_to_stop_can_go_on(argon: Make, tmp_path: Path, suffix: str) -> None:
    asked = settings(**ENSEMBLES["langevin"], trajectory_interval=2)
    whole = run_md(argon(), asked, out=tmp_path / f"whole{suffix}")
    out, steps = tmp_path / f"parts{suffix}", []
    for count in (0, 7, 1):
        answers = iter([False] * count + [True])
        part = run_md(argon(), asked, out=out, resume=bool(steps), stop=lambda answers=answers: next(answers))
        steps.append(part.steps)
    assert steps == [0, 7, 8]
    parts = run_md(argon(), asked, out=out, resume=True)
    assert (parts.atoms.positions == whole.atoms.positions).all()
    assert without_speed(parts.log) == without_speed(whole.log)
    assert [f.info["step"] for f in ase.io.read(out, ":")] == list(range(0, 41, 2))


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"timestep": 2.0}, "timestep = 4.0, not 2.0"),
        ({"temperature": 80.0}, "temperature = 60.0, not 80.0"),
        ({"ensemble": "nvt"}, "ensemble = nve, not nvt"),
    ],
)
def test_resuming_with_other_settings(argon: Make, unfinished: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(SimulationError, match=message):
        run_md(argon(), settings(**change), out=unfinished, resume=True)


@pytest.mark.bad_input
def test_resuming_with_another_structure_or_potential(argon: Make, unfinished: Path) -> None:
    with pytest.raises(SimulationError, match="another structure"):
        run_md(argon(periodic=False), settings(), out=unfinished, resume=True)

    class Shifted(type(argon().calc)):  # type: ignore[misc]
        def calculate(self, *args: Any, **kwargs: Any) -> None:
            super().calculate(*args, **kwargs)
            self.results["energy"] += 1.0

    atoms = argon()
    atoms.calc = Shifted()
    with pytest.raises(SimulationError, match="another potential"):
        run_md(atoms, settings(), out=unfinished, resume=True)


@pytest.mark.bad_input
def test_resuming_from_nothing_or_from_damaged_files(argon: Make, unfinished: Path) -> None:
    with pytest.raises(SimulationError, match="no restart file"):
        run_md(argon(), settings(), out=unfinished.with_name("b.extxyz"), resume=True)
    whole = unfinished.read_bytes()
    os.truncate(unfinished, 100)
    with pytest.raises(SimulationError, match="ends before the step of the restart file"):
        run_md(argon(), settings(), out=unfinished, resume=True)
    unfinished.write_bytes(whole)
    restart = unfinished.with_suffix(".restart.npz")
    os.truncate(restart, 300)
    with pytest.raises(SimulationError, match="damaged"):
        run_md(argon(), settings(), out=unfinished, resume=True)
    with pytest.raises(UsageError, match="damaged"):
        run_md(argon(), settings(), out=unfinished)


@pytest.mark.bad_input
def test_nan_forces_stop_the_run_with_the_last_good_frame(argon: Make, tmp_path: Path) -> None:
    message = r"step 26: (forces|positions) of atom 0 \(Ar\) are NaN.*step 20"
    with pytest.raises(SimulationError, match=message) as caught:
        run_md(argon(nan_after=26), settings(), out=tmp_path / "a.extxyz")
    assert "a.last_good.extxyz" in str(caught.value)
    kept = ase.io.read(tmp_path / "a.last_good.extxyz")
    assert kept.info["step"] == 20
    assert np.isfinite(kept.get_forces()).all()


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("distance", "change", "message"),
    [
        (2.0, {}, "temperature is"),  # deep in the repulsive wall
        (0.5, {"max_temperature": 1e12}, r"atoms 0 \(Ar\) and 1 \(Ar\) are 0.50 Å apart; nothing was kept"),
    ],
)
def test_an_explosion_stops_the_run(
    argon: Make, tmp_path: Path, distance: float, change: dict[str, Any], message: str
) -> None:
    atoms = argon()
    atoms.positions[1] = atoms.positions[0] + [distance, 0.0, 0.0]
    with pytest.raises(SimulationError, match=message):
        run_md(atoms, settings(**change), out=tmp_path / "a.extxyz")


@pytest.mark.bad_input
@pytest.mark.parametrize("reason", ["the structure cannot be evaluated", "0.50 Å apart"])
def test_a_run_that_cannot_begin_changes_no_file(
    argon: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise DataError(reason)

    atoms, asked, out = argon(), settings(max_temperature=1e12), tmp_path / "folder" / "a.extxyz"
    atoms.positions[1] = atoms.positions[0] + [0.5, 0.0, 0.0]
    if "apart" not in reason:
        monkeypatch.setattr(atoms.calc, "calculate", refuse)
    with pytest.raises(EscaipError, match=reason):
        run_md(atoms, asked, out=out)
    assert not out.parent.exists()
    run_md(argon(), asked, out=out)
    before = {path: path.read_bytes() for path in out.parent.iterdir()}
    with pytest.raises(EscaipError, match=reason):
        run_md(atoms, asked, out=out, overwrite=True)
    assert {path: path.read_bytes() for path in out.parent.iterdir()} == before


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"timestep": -1.0}, "timestep is -1.0 fs"),
        ({"timestep": 100.0}, "at most 20 fs"),
        ({"timestep": float("nan")}, "timestep is nan"),
        ({"ensemble": "nvt", "temperature": None}, "nvt needs a temperature"),
        ({"ensemble": "nvt", "temperature": -3.0}, "temperature is -3.0 K"),
        ({"ensemble": "nvt", "thermostat": "berendsen"}, "choose langevin, bussi, nose-hoover"),
        ({"ensemble": "npv"}, "choose nve, nvt, npt"),
        ({"pressure": 1.0}, "pressure belongs to npt"),
        ({"thermostat": "bussi"}, "thermostat belongs to nvt"),
        ({"steps": 0}, "steps is 0"),
        ({"velocities": "draw", "temperature": None}, "only be drawn at a temperature"),
        ({"ensemble": "nvt", "thermostat_time": 0.1}, "at least the timestep"),
    ],
)
def test_wrong_settings(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings(**values)


@pytest.mark.bad_input
def test_settings_that_do_not_fit_the_structure(argon: Make, tmp_path: Path) -> None:
    fixed, stressless = argon(), argon()
    fixed.set_constraint(FixAtoms([0]))
    stressless.calc.implemented_properties = ["energy", "forces"]
    lone = Atoms("Ar", calculator=argon().calc)
    cases: list[tuple[Atoms, dict[str, Any], str]] = [
        (argon(periodic=False), {"ensemble": "npt"}, "periodic along all three axes"),
        (fixed, {"ensemble": "npt"}, "npt does not support constraints"),
        (fixed, {"ensemble": "nvt", "thermostat": "nose-hoover"}, "nose-hoover does not support constraints"),
        (lone, {"ensemble": "nvt", "thermostat": "bussi"}, "at least 2 atoms"),
        (argon(), {"temperature": None}, "no velocities: give a temperature"),
        (argon(), {"velocities": "keep"}, "no velocities to keep"),
        (Atoms("Ar"), {}, "no calculator"),
        (stressless, {"ensemble": "npt"}, "npt needs stress"),
    ]
    for atoms, values, message in cases:
        with pytest.raises(EscaipError, match=message):
            run_md(atoms, settings(**values), out=tmp_path / "a.extxyz")
    with pytest.raises(ConfigError, match="no known format"):
        run_md(argon(), settings(), out=tmp_path / "a.pdb")
    assert not list(tmp_path.iterdir())  # nothing half-written
