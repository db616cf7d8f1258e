"""One reader for the trajectories of every format."""

from __future__ import annotations

import io
import itertools
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import ase.io
from ase import Atoms
from ase.io.trajectory import Trajectory

from escaip.errors import DataError, UsageError
from escaip.simulate.hdf5 import SUFFIXES, read_hdf5


def read_trajectory(
    path: str | os.PathLike[str], *, start: int = 0, stop: int | None = None, every: int = 1
) -> Iterator[Atoms]:
    """Yields the frames of a trajectory one by one, in the memory of one.

    Frames carry cell, momenta, energy, forces and, where it was computed, stress; ``info`` holds ``step`` and
    ``time_fs`` where the file does, as those of :func:`~escaip.simulate.run_md` do. A frame that is not whole at the
    end of a file, since the run goes on or was killed, is left out with a warning where the format shows it.

    Args:
        path: ``.h5`` or ``.hdf5`` (docs/analysis.md), ``.traj``, ``.extxyz`` or ``.xyz``, or anything else ASE reads.
        start: the first frame, from 0.
        stop: the frame to stop before; by default none.
        every: so many frames on.

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
    if path.suffix in SUFFIXES:
        return read_hdf5(path, start, stop, every)
    if path.suffix in (".extxyz", ".xyz"):
        return _read_extxyz(path, start, stop, every)
    return _read_ase(path, start, stop, every)


def _read_ase(path: Path, start: int, stop: int | None, every: int) -> Iterator[Atoms]:
    try:
        if path.suffix == ".traj":
            with Trajectory(path) as frames:
                for index in range(len(frames))[start:stop:every]:
                    yield frames[index]
        else:
            yield from ase.io.iread(path, index=slice(start, stop, every))
    except Exception as error:  # ASE's readers raise anything
        raise DataError(f"trajectory {path} cannot be read ({_one_line(error)}): use a file ASE reads") from error


def _read_extxyz(path: Path, start: int, stop: int | None, every: int) -> Iterator[Atoms]:
    with path.open(encoding="utf-8") as stream:
        for index, lines in enumerate(_extxyz_blocks(stream, path)):
            if stop is not None and index >= stop:
                return
            if index < start or (index - start) % every:
                continue
            try:
                frame = ase.io.read(io.StringIO("".join(lines)), format="extxyz")
            except Exception as error:  # ASE's readers raise anything
                message = f"trajectory {path}: frame {index} cannot be read ({_one_line(error)}): use --stop {index}"
                raise DataError(message) from error
            assert isinstance(frame, Atoms)
            yield frame


def _extxyz_blocks(stream: IO[str], path: Path) -> Iterator[list[str]]:
    """The lines of each frame. ASE's own reader scans the whole file first, and stops at a frame that is cut."""
    for index in itertools.count():
        head = stream.readline()
        if not head.strip():
            return
        try:
            count = int(head)
        except ValueError as error:
            raise DataError(
                f"trajectory {path}: frame {index} begins with {head.strip()[:40]!r} instead of a number of atoms: "
                "it is not extxyz"
            ) from error
        lines = [head, *itertools.islice(stream, count + 1)]
        if len(lines) < count + 2 or not lines[-1].endswith("\n"):
            warnings.warn(f"trajectory {path} ends in the middle of frame {index}, which is left out", stacklevel=2)
            return
        yield lines


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
