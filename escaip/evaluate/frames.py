"""Frames that take hours to compute: those that are finished survive a kill, and the same command goes on."""

from __future__ import annotations

import io
import itertools
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import ase.io
from ase import Atoms

from escaip.errors import DataError, UsageError
from escaip.files import try_lock, write_json


def check_out(path: Path, overwrite: bool) -> None:
    """Raises UsageError for a name that is not of an extxyz file, and for a file that is not to be replaced."""
    if path.suffix not in (".extxyz", ".xyz"):
        raise UsageError(f"{path} is no extxyz file: give --out a name that ends in .extxyz")
    if path.exists() and not overwrite:
        raise UsageError(f"{path} exists: choose another --out, or replace it with --overwrite")


def write_frames(
    path: Path, run: Mapping[str, Any], frames: Callable[[int], Iterable[Atoms]], *, overwrite: bool = False
) -> int:
    """Writes frames as they come to ``PATH.part``, an extxyz file that gets its name when it is whole.

    A part that an earlier run left is continued after its last whole frame.

    Args:
        path: the file.
        run: settings that determine the frames by name, as JSON values; kept in ``PATH.part.json``.
        frames: returns the frames that follow the first ones, whose number it is given.
        overwrite: replace the file, and a part of another run.

    Returns:
        The number of frames in the file.

    Raises:
        UsageError: as ``check_out``, or the part is of a run with other settings.
        DataError: the part is being written by another process, or cannot be written; or there are no frames.
    """
    check_out(path, overwrite)
    part, state = Path(f"{path}.part"), Path(f"{path}.part.json")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = try_lock(part)
        if lock is None:
            raise DataError(f"{part} is being written by another process: wait for it, or choose another --out")
        with lock, io.TextIOWrapper(lock, encoding="utf-8") as stream:
            count, end = _whole_frames(part)
            if count and (other := _differing(state, run)):
                if not overwrite:
                    raise UsageError(
                        f"{part} holds {count} structures of a run with another {' and another '.join(other)}: repeat "
                        "the command of that run, or start anew with --overwrite"
                    )
                count = end = 0
            os.truncate(part, end)
            if count == 0:
                write_json(state, run)
            try:
                for frame in frames(count):
                    ase.io.write(stream, frame, format="extxyz")
                    stream.flush()
                    count += 1
                if count == 0:
                    raise DataError(f"0 structures to write to {path}: check the file, --limit and --format")
            finally:
                if count == 0:
                    part.unlink()
                    state.unlink()
            os.replace(part, path)
        state.unlink(missing_ok=True)
    except OSError as error:
        reason = error.strerror or error
        raise DataError(f"cannot write {path}: {reason}: check its folder and the space on the disk") from error
    return count


def _whole_frames(part: Path) -> tuple[int, int]:
    """Returns the number of frames and the byte at which they end; what a kill left of the next one is not counted."""
    count = end = 0
    with part.open("rb") as stream:
        while (head := stream.readline()).strip().isdigit():
            lines = [head, *itertools.islice(stream, int(head) + 1)]
            if len(lines) < int(head) + 2 or not lines[-1].endswith(b"\n"):
                break
            count, end = count + 1, end + sum(map(len, lines))
    return count, end


def _differing(state: Path, run: Mapping[str, Any]) -> list[str]:
    """Returns the names of the settings that differ from those of the part."""
    try:
        found = dict(json.loads(state.read_text(encoding="utf-8")))
    except (OSError, TypeError, ValueError):
        return ["model, data or setting"]  # what the part holds is not known
    asked = json.loads(json.dumps(run))
    return [name for name in {**found, **asked} if found.get(name) != asked.get(name)]
