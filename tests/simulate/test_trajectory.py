"""Trajectories: equal across formats, whole after a kill, refused where they are damaged."""

from __future__ import annotations

import gc
import resource
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import ase.build
import numpy as np
import pytest
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms

from escaip.errors import ConfigError, DataError, SimulationError, UsageError
from escaip.simulate import MDSettings, read_trajectory, run_md
from escaip.simulate.output import open_trajectory

ROOT = Path(__file__).resolve().parents[2]
SUFFIXES = (".traj", ".extxyz")


def frame(step: int, periodic: bool = True, repeat: int = 1) -> Atoms:
    """The same for the same step, in every process."""
    rng = np.random.default_rng(step)
    atoms = ase.build.bulk("NaCl", "rocksalt", a=5.6).repeat((2, 1, repeat)) if periodic else ase.build.molecule("CH4")
    atoms.positions += rng.normal(size=atoms.positions.shape)
    if periodic:
        atoms.set_cell(atoms.cell.array + 0.1 * rng.normal(size=(3, 3)))
    atoms.set_momenta(rng.normal(size=atoms.positions.shape))
    results = {"energy": rng.normal(), "forces": rng.normal(size=atoms.positions.shape)}
    if periodic:
        results["stress"] = rng.normal(size=6)
    atoms.calc = SinglePointCalculator(atoms, **results)
    atoms.info.update(step=10 * step, time_fs=0.1 * step, charge=-1)
    atoms.set_constraint(FixAtoms([1]))
    return atoms


def write(path: Path, frames: list[Atoms], position: int | None = None) -> Path:
    trajectory = open_trajectory(path, position)
    for one in frames:
        trajectory.write(one)
    trajectory.close()
    return path


def steps(path: Path) -> list[int]:
    return [found.info["step"] for found in read_trajectory(path)]


@pytest.mark.parametrize("periodic", [True, False])
@pytest.mark.parametrize(("suffix", "tolerance"), [(".traj", 0.0), (".extxyz", 1e-8)])
def test_frames_come_back(tmp_path: Path, suffix: str, tolerance: float, periodic: bool) -> None:
    frames = [frame(step, periodic) for step in range(5)]
    for left, right in zip(frames, read_trajectory(write(tmp_path / f"a{suffix}", frames)), strict=True):
        for name in ("positions", "numbers", "momenta"):
            np.testing.assert_allclose(left.arrays[name], right.arrays[name], rtol=0, atol=tolerance)
        np.testing.assert_allclose(left.cell.array, right.cell.array, rtol=0, atol=tolerance)
        assert (left.pbc == right.pbc).all()
        assert left.info == right.info
        assert right.constraints[0].index.tolist() == [1]
        assert set(left.calc.results) <= set(right.calc.results)
        for name, value in left.calc.results.items():
            np.testing.assert_allclose(value, right.calc.results[name], rtol=0, atol=tolerance)


WRITER = """
import sys
from pathlib import Path
sys.path[:0] = sys.argv[2:]
from escaip.simulate.output import open_trajectory
from test_trajectory import frame
trajectory = open_trajectory(Path(sys.argv[1]), None)
for step in range(100_000):
    trajectory.write(frame(step % 50, repeat=20))
    print(step + 1, flush=True)
"""


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.filterwarnings("ignore:trajectory .* ends in the middle")
def test_a_killed_process_leaves_every_frame_it_has_written(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    command = [sys.executable, "-c", WRITER, str(path), str(ROOT), str(Path(__file__).parent)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if int(line) == 40:
                process.send_signal(signal.SIGKILL)
        last = int(line)
    frames = list(read_trajectory(path))
    assert last <= len(frames) <= last + 1
    for index in (0, 1, len(frames) // 2, len(frames) - 1):
        np.testing.assert_allclose(frames[index].positions, frame(index % 50, repeat=20).positions, atol=1e-8)
    # Three frames are kept; in text, where they end.
    end = 3 if suffix == ".traj" else write(tmp_path / "three.extxyz", frames[:3]).stat().st_size
    write(path, [frame(3)], position=end)
    assert steps(path) == [0, 10, 20, 30]


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # ASE's file flushes again when freed
def test_a_full_disk_is_one_line_and_the_run_can_go_on(
    argon: Callable[..., Atoms], tmp_path: Path, suffix: str
) -> None:
    asked = MDSettings(temperature=60.0, timestep=4.0, steps=30, trajectory_interval=1, restart_interval=5)
    whole = run_md(argon(), asked, out=tmp_path / f"whole{suffix}")
    limit = whole.trajectory.stat().st_size // 2
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        with pytest.raises(SimulationError, match=r"cannot write .*: make room, then continue with --resume"):
            run_md(argon(), asked, out=tmp_path / f"a{suffix}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    gc.collect()  # here, where its complaint is expected
    result = run_md(argon(), asked, out=tmp_path / f"a{suffix}", resume=True)
    assert steps(result.trajectory) == list(range(31))
    assert (result.atoms.positions == whole.atoms.positions).all()


@pytest.mark.parametrize("suffix", [*SUFFIXES, ".xyz"])
def test_a_part_of_a_trajectory(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"a@300K{suffix}", [frame(step) for step in range(10)])
    for start, stop, every in ((0, None, 1), (2, 9, 3), (9, 20, 1), (10, None, 1), (0, None, 4)):
        found = [one.info["step"] // 10 for one in read_trajectory(path, start=start, stop=stop, every=every)]
        assert found == list(range(10))[start:stop:every]


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
    for name, content, message in (
        ("none.traj", None, "does not exist"),
        ("empty.extxyz", b"", "is empty"),
        ("text.extxyz", b"hello\nworld\n", "frame 0 begins with 'hello'"),
        ("zero.extxyz", b"1\nProperties=species:S:1:pos:R:3\nAr 0 0 zero\n", "frame 0 cannot be read"),
        ("a.traj", b"hello", r"a\.traj cannot be read"),
    ):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=message):
            list(read_trajectory(tmp_path / name))
    for values in ({"start": -1}, {"every": 0}, {"start": 3, "stop": 3}):
        with pytest.raises(UsageError, match="no frame is in start"):
            read_trajectory(tmp_path / "a.traj", **values)
    for name in ("a.h5", "a.pdb"):
        with pytest.raises(ConfigError, match=r"choose a name that ends in \.extxyz or \.traj"):
            open_trajectory(tmp_path / name, None)
    for suffix in SUFFIXES:
        path = write(tmp_path / f"short{suffix}", [frame(0)])
        with pytest.raises(SimulationError, match="ends before the step of the restart file"):
            open_trajectory(path, path.stat().st_size + 1)
