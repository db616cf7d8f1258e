"""Files of simulations: structures, results, the log of a run, trajectories that can be cut back to a restart."""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io.trajectory import Trajectory

from escaip.data import AtomicData, Store
from escaip.errors import ConfigError, DataError, SimulationError, UsageError
from escaip.files import first_line, resolve, write_aside
from escaip.potential.potential import ORIGIN

LOG_COLUMNS = (
    "step", "time_fs", "temperature_K", "potential_energy_eV", "kinetic_energy_eV", "total_energy_eV",
    "conserved_energy_eV", "pressure_GPa", "volume_A3", "ns_per_day",
)  # fmt: skip


_TOO_SHORT = "{} ends before the step of the restart file: start anew with --overwrite"


class _TextFile:
    """Text that is cut back to a number of bytes before it goes on; None starts anew."""

    def __init__(self, path: Path, position: int | None) -> None:
        if position is not None:
            if not path.is_file() or path.stat().st_size < position:
                raise SimulationError(_TOO_SHORT.format(path))
            os.truncate(path, position)
        self._stream = path.open("w" if position is None else "a")

    def position(self) -> int:
        """Number of bytes that are safely on disk."""
        self._stream.flush()
        os.fsync(self._stream.fileno())
        return os.fstat(self._stream.fileno()).st_size

    def close(self) -> None:
        """Closes the file."""
        self._stream.close()


class LogFile(_TextFile):
    """A CSV with one line per logged step; values that are not defined are left empty.

    ``position`` bytes of an existing file are kept, None starts anew; ``extra`` are the columns of a committee.

    Raises:
        SimulationError: the file holds fewer bytes than are to be kept, or other columns.
    """

    def __init__(self, path: Path, position: int | None, extra: Sequence[str] = ()) -> None:
        self._columns = [*LOG_COLUMNS, *extra]
        if position and path.is_file():
            with path.open() as stream:
                found = stream.readline().rstrip("\n").split(",")
            if found != self._columns:
                differing = ", ".join(sorted(set(found) ^ set(self._columns))) or "their order"
                raise SimulationError(
                    f"{path} has other columns ({differing}): resume with the same models, committee included"
                )
        super().__init__(path, position)
        if position is None:
            self._stream.write(",".join(self._columns) + "\n")

    def write(self, row: dict[str, float | int]) -> None:
        """Appends a line; floats keep every digit."""
        values = (row[name] for name in self._columns)
        self._stream.write(",".join("" if value != value else repr(value) for value in values) + "\n")
        self._stream.flush()


def read_log(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Reads a log into one array per column; NaN where a line has no value."""
    with Path(path).open(newline="") as stream:
        reader = csv.DictReader(stream)
        rows, found = list(reader), reader.fieldnames or ()
    names = [*LOG_COLUMNS, *(name for name in found if name not in LOG_COLUMNS)]
    return {name: np.array([float(row[name]) if row[name] else np.nan for row in rows]) for name in names}


class ExtxyzTrajectory(_TextFile):
    """Frames as extended XYZ; arguments and errors as for ``LogFile``."""

    def write(self, frame: Atoms) -> None:
        """Appends a frame."""
        ase.io.write(self._stream, frame, format="extxyz")
        self._stream.flush()


class AseTrajectory:
    """Frames in ASE's own format, whose positions count frames; arguments and errors as for ``LogFile``."""

    def __init__(self, path: Path, position: int | None) -> None:
        self._count = position or 0
        with Trajectory(path) if position is not None and path.is_file() else contextlib.nullcontext([]) as frames:
            if len(frames) < self._count:
                raise SimulationError(_TOO_SHORT.format(path))
            if len(frames) > self._count:
                with write_aside(path, SimulationError) as aside, Trajectory(aside, "w") as kept:
                    for index in range(self._count):
                        kept.write(frames[index])
        self._writer = Trajectory(path, "w" if position is None else "a")

    def write(self, frame: Atoms) -> None:
        """Appends a frame."""
        self._writer.write(frame)
        self._count += 1

    def position(self) -> int:
        """Number of frames written so far."""
        return self._count

    def close(self) -> None:
        """Closes the file."""
        self._writer.close()


def open_trajectory(path: Path, position: int | None) -> ExtxyzTrajectory | AseTrajectory:
    """Opens a trajectory for writing, in the format of its suffix; see ``check_trajectory_name`` and ``LogFile``."""
    check_trajectory_name(path)
    return AseTrajectory(path, position) if path.suffix == ".traj" else ExtxyzTrajectory(path, position)


def check_trajectory_name(path: Path) -> None:
    """Raises ConfigError when the suffix names no format that a run can continue."""
    if path.suffix not in (".extxyz", ".xyz", ".traj"):
        raise ConfigError(f"trajectory {path} has no known format: choose a name that ends in .extxyz or .traj")


def make_frame(atoms: Atoms, step: int, time: float) -> Atoms:
    """Returns a copy with results, see ``freeze``, that carries its step and its time in fs."""
    frame = freeze(atoms)
    frame.info.update(step=step, time_fs=time)
    return frame


def freeze(atoms: Atoms) -> Atoms:
    """Returns a copy that holds energy, forces and, where the calculator has evaluated it, stress; and their origin."""
    frame = atoms.copy()
    # Other programs leave objects in info that files cannot hold; the origin of earlier results is not that of these.
    kept = (str, bool, int, float, np.ndarray)
    frame.info = {k: v for k, v in frame.info.items() if isinstance(v, kept) and k not in (*ORIGIN, "dispersion")}
    frame.info.update(getattr(atoms.calc, "origin", {}))
    results: dict[str, Any] = {"energy": atoms.get_potential_energy()}
    results["forces"] = atoms.get_forces(apply_constraint=False)
    with contextlib.suppress(NotImplementedError):  # ASE's PropertyNotImplementedError
        results["stress"] = atoms.calc.get_property("stress", atoms, allow_calculation=False)
    frame.calc = SinglePointCalculator(frame, **{k: v for k, v in results.items() if v is not None})
    return frame


def read_trajectory(
    path: str | os.PathLike[str], *, start: int = 0, stop: int | None = None, every: int = 1
) -> Iterator[Atoms]:
    """Yields the frames of a trajectory one by one, holding one in memory.

    ``info`` of frames by ``run_md`` holds ``step`` and ``time_fs``. An incomplete frame at the end of an extxyz file,
    whose run goes on or was killed, is left out with a warning.

    Args:
        path: ``.traj``, ``.extxyz`` or ``.xyz``, or anything else ASE reads.
        start: first frame, from 0.
        stop: frame to stop before; by default none.
        every: step from one frame to the next.

    Raises:
        DataError: missing, empty or unreadable file.
        UsageError: a negative ``start``, an empty range or ``every`` below 1.
    """
    path = Path(path)
    if start < 0 or every < 1 or (stop is not None and stop <= start):
        raise UsageError(f"no frame is in start {start}, stop {stop}, every {every}: 0 <= start < stop, every >= 1")
    if not path.is_file():
        raise DataError(f"trajectory {path} does not exist: check the path")
    if path.stat().st_size == 0:
        raise DataError(f"trajectory {path} is empty: give a file with at least one frame")
    return (_read_extxyz if path.suffix in (".extxyz", ".xyz") else _read_ase)(path, start, stop, every)


def _read_ase(path: Path, start: int, stop: int | None, every: int) -> Iterator[Atoms]:
    try:
        yield from ase.io.iread(path, index=slice(start, stop, every), do_not_split_by_at_sign=True)
    except Exception as error:  # ASE's readers raise anything
        raise DataError(f"trajectory {path} cannot be read ({first_line(error)}): use a file ASE reads") from error


def _read_extxyz(path: Path, start: int, stop: int | None, every: int) -> Iterator[Atoms]:
    """Reads frame by frame; ASE's own reader scans the whole file first and fails on an incomplete frame."""
    with path.open(encoding="utf-8") as stream:
        for index in itertools.count():
            head = stream.readline()
            if not head.strip() or (stop is not None and index >= stop):
                return
            if not head.strip().isdigit():
                raise DataError(
                    f"trajectory {path}: frame {index} begins with {head.strip()[:40]!r} instead of a number of atoms: "
                    "it is not extxyz"
                )
            lines = [head, *itertools.islice(stream, int(head) + 1)]
            if len(lines) < int(head) + 2 or not lines[-1].endswith("\n"):
                warnings.warn(f"trajectory {path} ends in the middle of frame {index}, which is left out", stacklevel=2)
                return
            if index < start or (index - start) % every:
                continue
            try:
                frame: Any = ase.io.read(io.StringIO("".join(lines)), format="extxyz")
            except Exception as error:  # ASE's readers raise anything
                message = f"trajectory {path}: frame {index} cannot be read ({first_line(error)}): use --stop {index}"
                raise DataError(message) from error
            yield frame


def read_structure(path: str | os.PathLike[str], frame: int = -1) -> Atoms:
    """Reads one structure, without labels, from anything ASE reads, a prepared store, or ``example:NAME``.

    Args:
        path: the file, or the folder of a store.
        frame: index of the structure; negative counts from the end.

    Raises:
        DataError: missing, empty or unreadable file, no such frame, or an invalid structure.
    """
    path = resolve(path)
    if not path.exists():
        raise DataError(f"structure {path} does not exist: check the path")
    if path.is_dir():
        store = Store(path)
        if not -len(store) <= frame < len(store):
            raise DataError(
                f"store {path} has {len(store)} structures, no number {frame}: give --frame a smaller number"
            )
        atoms: Any = store[frame % len(store)].to_ase()
    else:
        if path.stat().st_size == 0:
            raise DataError(f"structure {path} is empty: give a file with at least one structure")
        try:
            atoms = ase.io.read(path, index=frame, do_not_split_by_at_sign=True)
        except (IndexError, StopIteration) as error:
            raise DataError(f"structure {path} has no frame {frame}: give --frame a smaller number") from error
        except Exception as error:  # ASE's readers raise anything
            raise DataError(f"structure {path} cannot be read ({first_line(error)}): use a file ASE reads") from error
    atoms.calc = None
    AtomicData.from_ase(atoms, structure_id=path.name)  # checks the structure
    return atoms


def read_structures(path: str | os.PathLike[str]) -> Iterator[Atoms]:
    """Yields all structures of a file or store one by one, as ``read_structure`` reads one; errors are those of it."""
    path = resolve(path)
    if path.is_dir():
        store = Store(path)
        frames: Iterator[Atoms] = (store[index].to_ase() for index in range(len(store)))
    else:
        frames = read_trajectory(path)
    for index, atoms in enumerate(frames):
        atoms.calc = None
        AtomicData.from_ase(atoms, structure_id=f"{path.name}:{index}")  # checks the structure
        yield atoms


def write_structure(path: str | os.PathLike[str], atoms: Atoms) -> None:
    """Writes a structure, whole or not at all, in the format of the file's suffix.

    Raises:
        DataError: the suffix names no format that ASE writes, or the file cannot be written.
    """
    with write_aside(path) as aside:
        try:
            ase.io.write(aside, atoms)
        except OSError:
            raise
        except Exception as error:  # ASE's writers raise anything
            raise DataError(f"cannot write {path} ({first_line(error)}): choose a name that ends in .extxyz") from error
