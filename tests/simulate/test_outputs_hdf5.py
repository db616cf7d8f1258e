"""Trajectories in HDF5: equal to the other formats, whole after every kind of cut, refused where damaged."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import ase.build
import ase.io
import h5py
import numpy as np
import pytest
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms

from escaip.errors import DataError, SimulationError, UsageError
from escaip.simulate import MDSettings, MDStatus, read_log, read_trajectory, run_md
from escaip.simulate.hdf5 import Hdf5Trajectory
from escaip.simulate.hdf5_file import UnmarkedFile, is_marked
from escaip.simulate.outputs import open_trajectory

ROOT = Path(__file__).resolve().parents[2]


def frame(step: int, periodic: bool = True, repeat: int = 1) -> Atoms:
    """The same for the same step, in every process."""
    rng = np.random.default_rng(step)
    atoms = ase.build.bulk("NaCl", "rocksalt", a=5.6).repeat((2, 1, repeat)) if periodic else ase.build.molecule("CH4")
    atoms.positions += rng.normal(size=atoms.positions.shape)
    if periodic:
        atoms.set_cell(atoms.cell.array + 0.1 * rng.normal(size=(3, 3)))
    atoms.set_tags(range(len(atoms)))
    atoms.set_momenta(rng.normal(size=atoms.positions.shape))
    results = {"energy": rng.normal(), "forces": rng.normal(size=atoms.positions.shape)}
    if periodic:
        results["stress"] = rng.normal(size=6)
    atoms.calc = SinglePointCalculator(atoms, **results)
    atoms.info.update(step=10 * step, time_fs=0.1 * step)
    return atoms


def write(path: Path, frames: list[Atoms]) -> Path:
    trajectory = open_trajectory(path, None)
    for one in frames:
        trajectory.write(one)
    trajectory.close()
    return path


def assert_same(left: Atoms, right: Atoms) -> None:
    assert set(left.arrays) == set(right.arrays)
    for name in left.arrays:
        assert (left.arrays[name] == right.arrays[name]).all(), name
    assert (left.cell.array == right.cell.array).all()
    assert (left.pbc == right.pbc).all()
    assert (left.get_masses() == right.get_masses()).all()
    assert left.info == right.info
    assert left.calc.results.keys() == right.calc.results.keys()
    for name, value in left.calc.results.items():
        assert np.array_equal(value, right.calc.results[name]), name


@pytest.mark.parametrize("periodic", [True, False])
def test_frames_equal_those_of_the_other_formats_to_the_last_bit(tmp_path: Path, periodic: bool) -> None:
    frames = [frame(step, periodic) for step in range(5)]
    for one in frames:
        one.info = {"charge": -1, "name": "a/b", **one.info}
        one.set_constraint(FixAtoms([1]))
    paths = {suffix: write(tmp_path / f"a{suffix}", frames) for suffix in (".h5", ".hdf5", ".traj", ".extxyz")}
    exact, stored = list(read_trajectory(paths[".traj"])), list(read_trajectory(paths[".h5"]))
    for original, left, right in zip(frames, exact, stored, strict=True):
        assert_same(left, right)
        assert (right.positions == original.positions).all()
        assert right.constraints[0].index.tolist() == [1]
    # Text holds eight decimals: what is written from HDF5 is what was written directly.
    ase.io.write(tmp_path / "b.extxyz", stored, format="extxyz")
    assert (tmp_path / "b.extxyz").read_bytes() == paths[".extxyz"].read_bytes()


def test_isotopes_and_missing_results_are_kept(tmp_path: Path) -> None:
    heavy = frame(0)
    heavy.set_masses([23.5, 35.0, 23.0, 37.0])
    heavy.calc = None
    (found,) = read_trajectory(write(tmp_path / "a.h5", [heavy]))
    assert found.get_masses().tolist() == [23.5, 35.0, 23.0, 37.0]
    assert found.calc is None


def test_the_layout_is_that_of_h5md(tmp_path: Path) -> None:
    with h5py.File(write(tmp_path / "a.h5", [frame(step) for step in range(3)]), "r") as file:
        assert file["h5md"].attrs["version"].tolist() == [1, 1]
        assert file["h5md/creator"].attrs["name"] == b"escaip"
        assert file["h5md/modules/units"].attrs["system"] == b"SI"
        atoms = file["particles/atoms"]
        assert atoms["species"][:].tolist() == [11, 17, 11, 17]
        assert atoms["box"].attrs["boundary"].tolist() == [b"periodic"] * 3
        for name in ("position", "momentum", "force", "box/edges"):
            assert atoms[f"{name}/step"][:].tolist() == [0, 10, 20]
            assert atoms[f"{name}/time"] == atoms["position/time"]  # a hard link
            assert len(atoms[f"{name}/value"]) == 3
        assert atoms["position/time"].attrs["unit"] == b"fs"
        assert atoms["force/value"].attrs["unit"] == b"eV Ang-1"
        assert file["observables/potential_energy/value"][1] == frame(1).get_potential_energy()
        # The factor of the momentum's unit turns it into u Å/fs.
        factor, *rest = atoms["momentum/value"].attrs["unit"].decode().split()
        assert rest == ["u", "Ang", "fs-1"]
        speed = frame(2).get_velocities()[0] * float(factor)
        assert atoms["momentum/value"][2, 0] * float(factor) / atoms["mass"][0] == pytest.approx(speed, rel=1e-14)


def leave_open(path: Path, prepare: Callable[[Hdf5Trajectory], None]) -> Path:
    """What a killed process leaves: the file as it is on disk while its writer still has it open."""
    trajectory = Hdf5Trajectory(path.with_name("running.h5"), None)
    for step in range(5):
        trajectory.write(frame(step))
    prepare(trajectory)
    shutil.copyfile(path.with_name("running.h5"), path)
    trajectory.close()
    return path


def between_frames(trajectory: Hdf5Trajectory) -> None:
    pass


def after_some_values(trajectory: Hdf5Trajectory) -> None:
    for name in ("position", "cell"):
        trajectory._datasets[name].resize(6, axis=0)
        trajectory._datasets[name][5] = 7.0
    trajectory._file.flush()  # type: ignore[union-attr]


def before_the_step(trajectory: Hdf5Trajectory) -> None:
    for name, dataset in trajectory._datasets.items():
        if name != "step":
            dataset.resize(6, axis=0)
    trajectory._file.flush()  # type: ignore[union-attr]


def within_the_step(trajectory: Hdf5Trajectory) -> None:
    before_the_step(trajectory)
    trajectory._datasets["step"].resize(6, axis=0)
    trajectory._datasets["step"].flush()


@pytest.mark.parametrize("cut", [between_frames, after_some_values, before_the_step, within_the_step])
@pytest.mark.parametrize("keep", [1, 3, 5])
def test_a_run_goes_on_after_every_kind_of_cut(
    tmp_path: Path, cut: Callable[[Hdf5Trajectory], None], keep: int
) -> None:
    broken = leave_open(tmp_path / "a.h5", cut)
    assert is_marked(broken)
    assert [found.info["step"] for found in read_trajectory(broken)] == [0, 10, 20, 30, 40]
    trajectory = Hdf5Trajectory(broken, keep)
    for step in range(keep, 7):
        trajectory.write(frame(step))
    assert trajectory.position() == 7
    trajectory.close()
    whole = write(tmp_path / "whole.h5", [frame(step) for step in range(7)])
    for left, right in zip(read_trajectory(whole), read_trajectory(broken), strict=True):
        assert_same(left, right)
    with h5py.File(broken, "r") as file:
        assert len(file["particles/atoms/position/value"]) == 7
    assert broken.stat().st_size == whole.stat().st_size
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.h5", "running.h5", "whole.h5"]


def test_a_copy_without_the_mark_is_an_ordinary_file(tmp_path: Path) -> None:
    broken = leave_open(tmp_path / "a.h5", between_frames)
    with pytest.raises(OSError, match="already open for write"):
        h5py.File(broken, "r")
    with UnmarkedFile(broken) as stream:
        content = bytearray(broken.stat().st_size)
        assert stream.readinto(memoryview(content)) == len(content)
    (tmp_path / "b.h5").write_bytes(content)
    with h5py.File(tmp_path / "b.h5", "r") as file:
        assert file["particles/atoms/position/step"][:].tolist() == [0, 10, 20, 30, 40]


def test_a_closed_file_is_continued_in_place_or_cut(tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5", [frame(step) for step in range(5)])
    place = path.stat().st_ino
    Hdf5Trajectory(path, 5).close()
    assert path.stat().st_ino == place
    assert not is_marked(path)
    Hdf5Trajectory(path, 2).close()
    assert [found.info["step"] for found in read_trajectory(path)] == [0, 10]
    trajectory = Hdf5Trajectory(path, None)  # a run that starts anew must not show the frames of the old one
    assert not path.exists()
    trajectory.close()


def test_a_running_run_can_be_read(tmp_path: Path) -> None:
    trajectory = Hdf5Trajectory(tmp_path / "a.h5", None)
    for step in range(4):
        trajectory.write(frame(step))
        assert len(list(read_trajectory(tmp_path / "a.h5"))) == step + 1
    with h5py.File(tmp_path / "a.h5", "r", swmr=True) as file:  # as other programs do
        assert len(file["particles/atoms/position/value"]) == 4
    trajectory.close()


WRITER = """
import sys
from pathlib import Path
sys.path[:0] = sys.argv[2:]
from escaip.simulate.hdf5 import Hdf5Trajectory
from test_outputs_hdf5 import frame
trajectory = Hdf5Trajectory(Path(sys.argv[1]), None)
for step in range(100_000):
    trajectory.write(frame(step % 50, repeat=20))
    print(step + 1, flush=True)
"""


def test_a_killed_process_leaves_every_frame_it_has_written(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRITER, str(tmp_path / "a.h5"), str(ROOT), str(Path(__file__).parent)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if int(line) == 40:
                process.send_signal(signal.SIGKILL)
        last = int(line)
    frames = list(read_trajectory(tmp_path / "a.h5"))
    assert last <= len(frames) <= last + 1
    for index in (0, 1, len(frames) // 2, len(frames) - 1):
        assert_same(frames[index], frame(index % 50, repeat=20))


@pytest.mark.bad_input
@pytest.mark.parametrize("share", [0.0, 0.0001, 0.01, 0.3, 0.6, 0.9, 0.99])
def test_a_file_that_has_lost_its_end_is_refused(tmp_path: Path, share: float) -> None:
    path = write(tmp_path / "a.h5", [frame(step) for step in range(5)])
    os.truncate(path, int(share * path.stat().st_size))
    with pytest.raises(DataError, match=r"trajectory .*a\.h5 (cannot be read|is empty)"):
        list(read_trajectory(path))
    with pytest.raises(SimulationError, match=r"a\.h5 cannot be read.*--overwrite"):
        Hdf5Trajectory(path, 3)


@pytest.mark.bad_input
def test_files_that_do_not_belong_to_the_run_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SimulationError, match="is gone"):
        Hdf5Trajectory(tmp_path / "a.h5", 1)
    path = write(tmp_path / "a.h5", [frame(0)])
    with pytest.raises(SimulationError, match="ends before the step of the restart file"):
        Hdf5Trajectory(path, 2)
    trajectory = Hdf5Trajectory(path, 1)
    with pytest.raises(SimulationError, match="other atoms"):
        trajectory.write(frame(1, repeat=2))
    trajectory.write(frame(1))
    trajectory.close()
    assert len(list(read_trajectory(path))) == 2
    with h5py.File(tmp_path / "b.h5", "w", libver="latest") as file:
        file["positions"] = np.zeros(3)
    with pytest.raises(DataError, match=r"b\.h5 cannot be read.*no trajectory of escaip"):
        list(read_trajectory(tmp_path / "b.h5"))
    with h5py.File(path, "r+") as file:
        file["parameters/escaip"].attrs["layout"] = 99
    with pytest.raises(DataError, match="newer escaip"):
        list(read_trajectory(path))


@pytest.mark.bad_input
@pytest.mark.parametrize("kilobytes", [1, 60, 3000])
def test_a_full_disk_is_an_error_and_leaves_a_whole_file(tmp_path: Path, kilobytes: int) -> None:
    """Within HDF5 it would end the process: it is found before."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    trajectory = Hdf5Trajectory(tmp_path / "a.h5", None)
    written = 0
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (kilobytes * 1024, before[1]))
        with contextlib.suppress(OSError):
            while written < 10_000:
                trajectory.write(frame(written % 7, repeat=100))
                written += 1
        with pytest.raises(OSError, match="too large"):
            trajectory.write(frame(0, repeat=100))
        trajectory.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    if kilobytes == 1:
        assert not list(tmp_path.iterdir())
    else:
        assert len(list(read_trajectory(tmp_path / "a.h5"))) == written
        assert not is_marked(tmp_path / "a.h5")


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.mark.parametrize("ensemble", ["nve", "npt"])
def test_a_restarted_run_continues_bit_for_bit(argon: Callable[..., Atoms], tmp_path: Path, ensemble: str) -> None:
    asked = MDSettings(
        ensemble=ensemble, temperature=60.0, timestep=4.0, steps=24, log_interval=1, trajectory_interval=2,
        restart_interval=10, pressure=0.1 if ensemble == "npt" else None,
    )  # fmt: skip

    def interrupt_at(step: int) -> Callable[[MDStatus], None]:
        def report(status: MDStatus) -> None:
            if status.step == step:
                raise Killed

        return report

    whole = run_md(argon(), asked, out=tmp_path / "whole.h5")
    # At 20 the frame is written, the restart file not yet.
    for step, resume in ((7, False), (20, True)):
        with pytest.raises(Killed):
            run_md(argon(), asked, out=tmp_path / "broken.h5", report=interrupt_at(step), resume=resume)
    parts = run_md(argon(), asked, out=tmp_path / "broken.h5", resume=True)
    frames = list(read_trajectory(whole.trajectory))
    assert [found.info["time_fs"] for found in frames] == [8.0 * index for index in range(13)]
    for left, right in zip(frames, read_trajectory(parts.trajectory), strict=True):
        assert_same(left, right)
    assert_same(frames[-1], list(read_trajectory(run_md(argon(), asked, out=tmp_path / "c.traj").trajectory))[-1])


@pytest.mark.parametrize("suffix", [".h5", ".traj", ".extxyz"])
def test_a_run_killed_before_its_first_interval_repeats_nothing(
    argon: Callable[..., Atoms], tmp_path: Path, suffix: str
) -> None:
    def report(status: MDStatus) -> None:
        if status.step == 2:
            raise Killed

    asked = MDSettings(temperature=60.0, timestep=4.0, steps=4, log_interval=1, trajectory_interval=1)
    with pytest.raises(Killed):
        run_md(argon(), asked, out=tmp_path / f"a{suffix}", report=report)
    result = run_md(argon(), asked, out=tmp_path / f"a{suffix}", resume=True)
    assert [found.info["step"] for found in read_trajectory(result.trajectory)] == [0, 1, 2, 3, 4]
    assert read_log(result.log)["step"].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("suffix", [".h5", ".traj", ".extxyz", ".xyz"])
def test_a_part_of_a_trajectory(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"a{suffix}", [frame(step) for step in range(10)])
    for start, stop, every in ((0, None, 1), (2, 9, 3), (9, 20, 1), (10, None, 1), (0, None, 4)):
        found = [one.info["step"] // 10 for one in read_trajectory(path, start=start, stop=stop, every=every)]
        assert found == list(range(10))[start:stop:every]


def test_many_frames_are_read_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("escaip.simulate.hdf5._BLOCK", 1000)
    path = write(tmp_path / "a.h5", [frame(step) for step in range(23)])
    for every in (1, 2, 5, 30):
        assert [one.info["step"] // 10 for one in read_trajectory(path, every=every)] == list(range(0, 23, every))
    Hdf5Trajectory(path, 21).close()
    for left, right in zip(read_trajectory(path), (frame(step) for step in range(21)), strict=True):
        assert (left.positions == right.positions).all()


def test_text_that_ends_within_a_frame_is_read_up_to_there(tmp_path: Path) -> None:
    path = write(tmp_path / "a.extxyz", [frame(step) for step in range(3)])
    whole = path.read_bytes()
    for lost in (1, 5, 100, 300):
        path.write_bytes(whole[:-lost])
        with pytest.warns(UserWarning, match="ends in the middle of frame 2"):
            assert len(list(read_trajectory(path))) == 2
    path.write_bytes(whole + b"\n")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(list(read_trajectory(path))) == 3


@pytest.mark.bad_input
def test_wrong_files_and_ranges(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.h5 does not exist"):
        read_trajectory(tmp_path / "a.h5")
    (tmp_path / "a.extxyz").write_text("")
    with pytest.raises(DataError, match="is empty"):
        read_trajectory(tmp_path / "a.extxyz")
    (tmp_path / "a.extxyz").write_text("hello\nworld\n")
    with pytest.raises(DataError, match=r"frame 0 begins with 'hello'"):
        list(read_trajectory(tmp_path / "a.extxyz"))
    (tmp_path / "a.extxyz").write_text("1\nProperties=species:S:1:pos:R:3\nAr 0 0 zero\n")
    with pytest.raises(DataError, match="frame 0 cannot be read"):
        list(read_trajectory(tmp_path / "a.extxyz"))
    (tmp_path / "a.traj").write_bytes(b"hello")
    with pytest.raises(DataError, match=r"a\.traj cannot be read"):
        list(read_trajectory(tmp_path / "a.traj"))
    for values in ({"start": -1}, {"every": 0}, {"start": 3, "stop": 3}):
        with pytest.raises(UsageError, match="no frame is in start"):
            read_trajectory(tmp_path / "a.traj", **values)
