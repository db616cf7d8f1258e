"""Log and trajectory of a run: files that can be cut back to the step a restart begins at."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import ase.io
import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io.trajectory import Trajectory

from escaip.errors import ConfigError, SimulationError
from escaip.simulate.hdf5 import SUFFIXES, Hdf5Trajectory

LOG_COLUMNS = (
    "step",
    "time_fs",
    "temperature_K",
    "potential_energy_eV",
    "kinetic_energy_eV",
    "total_energy_eV",
    "conserved_energy_eV",
    "pressure_GPa",
    "volume_A3",
    "ns_per_day",
)


class LogFile:
    """A CSV with one line per logged step; what does not apply is left empty.

    Args:
        path: the file.
        position: bytes to keep of an existing file; None starts anew.
        extra: further columns, of a committee.

    Raises:
        SimulationError: the file holds fewer bytes than are to be kept, or other columns.
    """

    def __init__(self, path: Path, position: int | None, extra: Sequence[str] = ()) -> None:
        self._columns = (*LOG_COLUMNS, *extra)
        if position and path.is_file():
            _check_columns(path, self._columns)
        self._stream = _open_text(path, position)
        if position is None:
            self._stream.write(",".join(self._columns) + "\n")

    def write(self, row: dict[str, float | int]) -> None:
        """Appends a line; floats keep every digit."""
        values = [row[name] for name in self._columns]
        self._stream.write(",".join("" if value != value else repr(value) for value in values) + "\n")
        self._stream.flush()

    def position(self) -> int:
        """Bytes that are safely on disk."""
        return _sync(self._stream)

    def close(self) -> None:
        """Closes the file."""
        self._stream.close()


class ExtxyzTrajectory:
    """Frames as extended XYZ; arguments as for :class:`LogFile`."""

    def __init__(self, path: Path, position: int | None) -> None:
        self._stream = _open_text(path, position)

    def write(self, frame: Atoms) -> None:
        """Appends a frame."""
        ase.io.write(self._stream, frame, format="extxyz")
        self._stream.flush()

    def position(self) -> int:
        """Bytes that are safely on disk."""
        return _sync(self._stream)

    def close(self) -> None:
        """Closes the file."""
        self._stream.close()


class AseTrajectory:
    """Frames in ASE's own format; its position is a number of frames.

    Raises:
        SimulationError: the file holds fewer frames than are to be kept.
    """

    def __init__(self, path: Path, position: int | None) -> None:
        if position is not None:
            _keep_frames(path, position)
        self._count = position or 0
        self._writer = Trajectory(path, "w" if position is None else "a")

    def write(self, frame: Atoms) -> None:
        """Appends a frame."""
        self._writer.write(frame)
        self._count += 1

    def position(self) -> int:
        """Frames written so far."""
        return self._count

    def close(self) -> None:
        """Closes the file."""
        self._writer.close()


def open_trajectory(path: Path, position: int | None) -> ExtxyzTrajectory | AseTrajectory | Hdf5Trajectory:
    """Chooses the format by the file's suffix.

    Raises:
        ConfigError: neither ``.extxyz``, ``.xyz``, ``.traj``, ``.h5`` nor ``.hdf5``.
    """
    check_trajectory_name(path)
    if path.suffix in SUFFIXES:
        return Hdf5Trajectory(path, position)
    return AseTrajectory(path, position) if path.suffix == ".traj" else ExtxyzTrajectory(path, position)


def check_trajectory_name(path: Path) -> None:
    """Raises ConfigError when the suffix names no format that can be continued."""
    if path.suffix not in (".extxyz", ".xyz", ".traj", *SUFFIXES):
        raise ConfigError(f"trajectory {path} has no known format: choose a name that ends in .extxyz, .traj or .h5")


def make_frame(atoms: Atoms, step: int, time: float) -> Atoms:
    """A copy with results, see :func:`freeze`, that says when it was; time in fs."""
    frame = freeze(atoms)
    frame.info.update(step=step, time_fs=time)
    return frame


def freeze(atoms: Atoms) -> Atoms:
    """A copy that holds energy, forces and, where the calculator has computed it, stress."""
    frame = atoms.copy()
    # What other programs left in info may be nothing a file can hold.
    plain = (str, bool, int, float, np.ndarray)
    frame.info = {key: value for key, value in frame.info.items() if isinstance(value, plain)}
    results: dict[str, Any] = {"energy": atoms.get_potential_energy()}
    results["forces"] = atoms.get_forces(apply_constraint=False)
    stress = atoms.calc.results.get("stress")
    if stress is not None:
        results["stress"] = np.array(stress)
    frame.calc = SinglePointCalculator(frame, **results)
    return frame


def read_log(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Reads a log into one array per column; NaN where a line has no value."""
    with Path(path).open(newline="") as stream:
        reader = csv.DictReader(stream)
        rows, found = list(reader), reader.fieldnames or ()
    names = [*LOG_COLUMNS, *(name for name in found if name not in LOG_COLUMNS)]
    return {name: np.array([float(row[name]) if row[name] else np.nan for row in rows]) for name in names}


def _check_columns(path: Path, columns: Sequence[str]) -> None:
    with path.open() as stream:
        found = stream.readline().rstrip("\n").split(",")
    if found != list(columns):
        differing = ", ".join(sorted(set(found) ^ set(columns))) or "their order"
        raise SimulationError(
            f"{path} has other columns ({differing}): resume with the same models, committee included"
        )


def _open_text(path: Path, position: int | None) -> IO[str]:
    if position is None:
        return path.open("w")
    if not path.is_file() or path.stat().st_size < position:
        raise SimulationError(f"{path} ends before the step of the restart file: start anew with --overwrite")
    os.truncate(path, position)
    return path.open("a")


def _sync(stream: IO[str]) -> int:
    stream.flush()
    os.fsync(stream.fileno())
    return os.fstat(stream.fileno()).st_size


def _keep_frames(path: Path, count: int) -> None:
    """Cuts a trajectory back to its first frames, aside."""
    if not path.is_file():
        raise SimulationError(f"{path} is gone but its restart file is there: start anew with --overwrite")
    with Trajectory(path) as frames:
        if len(frames) < count:
            raise SimulationError(f"{path} ends before the step of the restart file: start anew with --overwrite")
        if len(frames) == count:
            return
        aside = path.with_name(f".{path.name}.part")
        try:
            with Trajectory(aside, "w") as kept:
                for index in range(count):
                    kept.write(frames[index])
            os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)
