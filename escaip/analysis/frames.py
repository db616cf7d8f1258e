"""From frames to time series: positions without jumps, the time between frames, arrays of any length."""

from __future__ import annotations

import io
import tempfile
import weakref
from collections.abc import Sequence
from typing import IO, Any

import numpy as np
from ase import Atoms, units
from numpy.typing import NDArray

from escaip.errors import DataError, UsageError

Array = NDArray[np.float64]
_MEMORY = 1024**3
_FAR = 0.4


class Recording:
    """Arrays of one shape, frame after frame; beyond a limit of memory in an unnamed temporary file.

    Args:
        limit: bytes.
    """

    def __init__(self, limit: int = _MEMORY) -> None:
        self._stream: IO[bytes] | Any = io.BytesIO()
        self._limit = limit
        self._shape: tuple[int, ...] = ()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def append(self, values: Array) -> None:
        """Adds a frame."""
        self._shape = values.shape
        self._count += 1
        self._stream.write(np.ascontiguousarray(values, dtype=np.float64).data)
        if isinstance(self._stream, io.BytesIO) and self._stream.tell() > self._limit:
            moved = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the recording
            weakref.finalize(self, moved.close)
            moved.write(self._stream.getbuffer())
            self._stream = moved

    def array(self) -> Array:
        """``(F, *shape)``, not to be written to; nothing can be appended while it is in use."""
        shape = (self._count, *self._shape)
        if isinstance(self._stream, io.BytesIO):
            return np.frombuffer(self._stream.getbuffer(), dtype=np.float64).reshape(shape)
        self._stream.flush()
        return np.memmap(self._stream, dtype=np.float64, mode="r", shape=shape)


class Unwrapper:
    """Positions that follow each atom out of the cell, whether the file wraps them or not.

    From frame to frame an atom is taken to have moved to the nearest image of its new place: its wrapped displacement
    is added up (von Bülow, Bullerjahn and Hummer, J. Chem. Phys. 153, 021101 (2020); Kulke and Vermaas, J. Chem.
    Theory Comput. 18, 6161 (2022)), which also holds where the cell changes. Axes that are not periodic are left
    alone.

    Attributes:
        farthest: largest displacement between two frames seen, as a fraction of the cell; the nearest image is the
            wrong one beyond 0.5.
    """

    def __init__(self) -> None:
        self.farthest = 0.0
        self._unwrapped: Array | None = None
        self._wrapped: Array | None = None

    def __call__(self, frame: Atoms) -> Array:
        """``(N, 3)`` Å, of the next frame."""
        if not frame.pbc.any():
            return frame.get_positions()
        cell = frame.cell.complete().array
        inverse = np.linalg.inv(cell)
        wrapped = _shifted(frame.positions, cell, inverse, frame.pbc, np.floor)
        if self._unwrapped is None or self._wrapped is None:
            self._unwrapped = frame.get_positions()
        else:
            moved = _shifted(wrapped - self._wrapped, cell, inverse, frame.pbc, np.round)
            self.farthest = max(self.farthest, float(np.abs((moved @ inverse)[:, frame.pbc]).max()))
            self._unwrapped = self._unwrapped + moved
        self._wrapped = wrapped
        return self._unwrapped

    @property
    def is_doubtful(self) -> bool:
        """Whether an atom moved so far that others may have moved by more than half the cell."""
        return self.farthest > _FAR


def velocities(frame: Atoms) -> Array:
    """``(N, 3)`` Å/fs."""
    found: Array = frame.get_velocities() * units.fs
    return found


def group_weights(frame: Atoms) -> tuple[list[str], Array]:
    """Names of the groups, ``"all"`` and each element, and ``(N, G)`` weights of the mean over each."""
    symbols = np.array(frame.get_chemical_symbols())
    names = sorted(set(symbols.tolist()))
    members = np.stack([np.ones(len(symbols), dtype=bool), *(symbols == name for name in names)], axis=1)
    return ["all", *names], members / members.sum(axis=0)


def frame_interval(times: Sequence[float | None], timestep: float | None, every: int, path: object) -> float:
    """Time between the frames read, in fs.

    Args:
        times: ``info["time_fs"]`` of each, None where there is none.
        timestep: fs between frames of the file, for files that do not say.
        every: frames of the file from one that is read to the next.
        path: to name in messages.

    Raises:
        UsageError: neither the frames nor ``timestep`` say it, or both do and differ.
        DataError: the frames are not evenly spaced.
    """
    known = np.array([time for time in times if time is not None], dtype=np.float64)
    if len(known) == 0:
        if timestep is None:
            raise UsageError(f"{path} does not say when its frames were taken: give --timestep, fs between its frames")
        return timestep * every
    steps = np.diff(known)
    if len(known) < len(times) or not len(steps) or not (steps > 0).all():
        raise DataError(f"{path}: the times of its frames (time_fs) do not increase from each to the next: cut it up")
    interval = float((known[-1] - known[0]) / len(steps))
    usual = float(np.median(steps))
    uneven = np.flatnonzero(np.abs(steps - usual) > 1e-3 * usual)
    if len(uneven):
        raise DataError(
            f"{path}: most frames are {usual:g} fs apart, but number {int(uneven[0]) + 1} of those read comes after "
            f"{steps[uneven[0]]:g} fs: choose an even part with --start and --stop"
        )
    if timestep is not None and abs(timestep * every - interval) > 1e-3 * interval:
        raise UsageError(f"{path} says that its frames are {interval / every:g} fs apart: leave --timestep out")
    return interval


def _shifted(vectors: Array, cell: Array, inverse: Array, pbc: NDArray[np.bool_], whole: Any) -> Array:
    """``vectors`` less the lattice vectors in them, as ``whole`` counts them."""
    found: Array = vectors - np.where(pbc, whole(vectors @ inverse), 0.0) @ cell
    return found
