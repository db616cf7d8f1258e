"""Readers of data sets as published; each yields :class:`~escaip.data.AtomicData` in eV and Å."""

from __future__ import annotations

import glob
import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from escaip.data.labels import LabelKeys
from escaip.data.sources.ase import read_ase
from escaip.data.sources.door import Door, ReadReport
from escaip.data.sources.plausibility import WINDOW, check_magnitudes
from escaip.data.sources.pymatgen import read_pymatgen
from escaip.data.sources.spice import read_spice
from escaip.data.sources.store import read_store
from escaip.errors import ConfigError, DataError
from escaip.resources import resolve
from escaip.units import Units

if TYPE_CHECKING:
    from escaip.data.atomic_data import AtomicData

__all__ = ["SOURCES", "ReadReport", "detect_format", "expand_paths", "open_source"]

SOURCES: dict[str, Callable[..., Iterator[AtomicData]]] = {
    "ase": read_ase,
    "pymatgen": read_pymatgen,
    "spice": read_spice,
    "store": read_store,
}

HDF5_MAGIC = b"\x89HDF\r\n\x1a\n"
PathLike = str | os.PathLike[str]


def open_source(
    path: PathLike | Sequence[PathLike],
    *,
    format: str | None = None,
    keys: Mapping[str, str | None] | LabelKeys | None = None,
    units: Mapping[str, str] | Units | None = None,
    on_error: str = "raise",
    required_labels: Sequence[str] = (),
    check_units: bool = True,
    limit: int | None = None,
    report: ReadReport | None = None,
    **options: Any,
) -> Iterator[AtomicData]:
    """Structures of one or more files.

    Args:
        path: a file, a prepared store, ``dataset:NAME/FILE`` (shipped with a card), a pattern (``"*.traj"``) or a
            list of them.
        format: a name in :data:`SOURCES`; default found from content and suffix.
        keys: names of the labels; see :class:`LabelKeys`.
        units: units of the file where they are not Å and eV; see :meth:`escaip.units.Units.parse`.
        on_error: ``"raise"``, or ``"skip"`` to leave out bad structures and count them in ``report``.
        required_labels: labels without which a structure is refused.
        check_units: refuse magnitudes that no unit of ours explains.
        limit: stop after this many structures.
        report: receives the counts.
        **options: of the source: ``index``, ``group_by`` (ase), ``subset``, ``energy`` (spice), ...

    Raises:
        DataError: an unreadable file, a bad structure, implausible magnitudes.
        ConfigError: an unknown format, key, unit or option.
    """
    paths = expand_paths(path)
    door = Door(
        Units.parse(units) if units is not None else None, on_error, report or ReadReport(), tuple(required_labels)
    )
    streams = []
    for file, name in zip(paths, distinct_names(paths), strict=True):
        kind = format or detect_format(file)
        if kind not in SOURCES:
            raise ConfigError(f"format: {kind!r} is not one of {', '.join(SOURCES)}")
        try:
            streams.append(SOURCES[kind](file, door, name=name, keys=LabelKeys.parse(keys), **options))
        except TypeError as error:
            raise ConfigError(f"{file}: the {kind} source has no such option ({error})") from error
    stream: Iterator[AtomicData] = itertools.chain.from_iterable(streams)
    if limit is not None:
        stream = itertools.islice(stream, limit)
    return _checked(stream) if check_units else stream


def _checked(stream: Iterator[AtomicData]) -> Iterator[AtomicData]:
    """The same structures, looked at in windows; nothing of a refused window gets through."""
    while window := list(itertools.islice(stream, WINDOW)):
        check_magnitudes(window)
        yield from window


def detect_format(path: PathLike) -> str:
    """Which source reads this, from its content and suffix.

    Raises:
        DataError: a path that does not exist, or a directory that is no prepared store.
    """
    path = Path(path)
    if not path.exists():
        raise DataError(f"{path}: no such file or directory")
    if path.is_dir():
        if (path / "manifest.json").is_file():
            return "store"
        raise DataError(f"{path}: is a directory but no prepared store (no manifest.json); name files or a pattern")
    with open(path, "rb") as file:
        head = file.read(4096)
    if head.startswith(HDF5_MAGIC):
        return "spice"
    if path.suffix == ".json" and (b'"@module"' in head or b'"structure"' in head):
        return "pymatgen"
    return "ase"


def expand_paths(path: PathLike | Sequence[PathLike]) -> list[Path]:
    """Files named by a path, ``dataset:NAME/FILE``, a pattern or a list of them; patterns in sorted order.

    Raises:
        DataError: nothing there.
    """
    given = [path] if isinstance(path, str | os.PathLike) else list(path)
    found: list[Path] = []
    for item in given:
        text = os.path.expanduser(str(resolve(os.fspath(item))))
        if not os.path.exists(text) and glob.has_magic(text):
            matches = sorted(glob.glob(text, recursive=True))
            if not matches:
                raise DataError(f"{text}: no file matches this pattern")
            found.extend(Path(match) for match in matches)
        elif os.path.exists(text):
            found.append(Path(text))
        else:
            raise DataError(f"{text}: no such file or directory")
    if not found:
        raise DataError("no data files were named; give at least one path")
    return found


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """File names, with as many parent folders as it takes to tell them apart."""
    depth = 1
    names = [path.name for path in paths]
    while len(set(names)) < len(names) and depth < max(len(path.parts) for path in paths):
        depth += 1
        names = ["/".join(path.parts[-depth:]) for path in paths]
    return names
