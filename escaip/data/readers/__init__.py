"""Readers of data sets as published; each yields ``AtomicData`` in eV and Å."""

from __future__ import annotations

import glob
import hashlib
import inspect
import itertools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from escaip.data.readers import ase, aselmdb, mptrj, oc20, ocp_lmdb, pymatgen, spice, store, xyz_zip
from escaip.data.readers.policy import Part, Reader, ReadPolicy, ReadReport, check_magnitudes, checked
from escaip.data.store import Store
from escaip.data.structure import AtomicData, LabelKeys
from escaip.data.validation import check_choice
from escaip.errors import ConfigError, DataError
from escaip.files import resolve, sha256
from escaip.units import Units

__all__ = [
    "READERS",
    "DataFile",
    "ReadPolicy",
    "ReadReport",
    "Reading",
    "check_magnitudes",
    "checked",
    "data_sha256",
    "detect_format",
    "expand_paths",
    "list_files",
    "open_source",
    "read_file",
]

# In the order in which they are asked whether a file is theirs; ASE takes what is left.
_ORDER = (
    store.READER, aselmdb.READER, ocp_lmdb.READER, oc20.READER, mptrj.READER, xyz_zip.READER, ocp_lmdb.PYG_READER,
    spice.READER, pymatgen.READER, ase.READER,
)  # fmt: skip
READERS: dict[str, Reader] = {reader.name: reader for reader in _ORDER}

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
    max_force: float | None = None,
    limit: int | None = None,
    report: ReadReport | None = None,
    **options: Any,
) -> Iterator[AtomicData]:
    """Reads the structures of one or more files.

    Args:
        path: a file, a prepared store, ``dataset:NAME/FILE`` (shipped with a card), a pattern (``"*.traj"``) or a
            list of them.
        format: a name in ``READERS``; default found from content and suffix.
        keys: names of the labels; see ``LabelKeys``. Structures without a label that is named are counted, but it must
            be somewhere.
        units: units of the file where they are not Å and eV; see ``escaip.units.Units.parse``.
        on_error: ``"raise"``, or ``"skip"`` to leave out bad structures and count them in ``report``.
        required_labels: labels without which a structure is refused.
        check_units: refuse magnitudes that are those of another unit.
        max_force: eV/Å; leave out and count structures with a larger force on a free atom (failed or far-off frames
            of line searches; OC20 was published with 50).
        limit: stop after this many structures.
        report: receives the counts.
        **options: of the reader: ``index``, ``group_by`` (ase), ``subset``, ``energy`` (spice), ...

    Raises:
        DataError: an unreadable file, a bad structure, implausible magnitudes.
        ConfigError: an unknown format, key, unit or option.
    """
    reading = Reading(keys, units, on_error, tuple(required_labels), check_units, max_force, limit, options)
    return reading.stream(list_files(path, format), report or ReadReport(), check_absent=True)


@dataclass(frozen=True)
class Reading:
    """How files are read; arguments of ``open_source``, with those of the layout as ``options``."""

    keys: Mapping[str, str | None] | LabelKeys | None = None
    units: Mapping[str, str] | Units | None = None
    on_error: str = "raise"
    required_labels: tuple[str, ...] = ()
    check_units: bool = True
    max_force: float | None = None
    limit: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def stream(
        self, files: Iterable[DataFile], report: ReadReport, part: Part | None = None, *, check_absent: bool = False
    ) -> Iterator[AtomicData]:
        """Returns the structures of files, or of a part of one; settings are checked at once.

        With ``check_absent`` the end of the stream is an error where no structure had a label whose key was named.
        """
        units = Units.parse(self.units) if self.units is not None else None
        policy = ReadPolicy(units, self.on_error, report, tuple(self.required_labels), self.max_force)
        keys = LabelKeys.parse(self.keys)
        keys = keys and replace(keys, missing=report.miss)
        streams = [read_file(file, policy, keys=keys, part=part, **self.options) for file in files]
        stream: Iterator[AtomicData] = itertools.islice(itertools.chain.from_iterable(streams), self.limit)
        stream = _checking_absent(stream, report) if check_absent else stream
        return checked(stream) if self.check_units else stream


def _checking_absent(stream: Iterator[AtomicData], report: ReadReport) -> Iterator[AtomicData]:
    yield from stream
    report.check_absent()


@dataclass(frozen=True)
class DataFile:
    """One file to read.

    Attributes:
        path: where it is.
        reader: name of its layout, in ``READERS``.
        name: what the ids of its structures begin with.
    """

    path: Path
    reader: str
    name: str

    def parts(self, size: int) -> list[Part | None]:
        """Ranges of about ``size`` structures; empty for a file that is read whole."""
        divide = READERS[self.reader].parts
        return [*divide(self.path, size)] if divide is not None else []


def list_files(path: PathLike | Sequence[PathLike], format: str | None = None) -> list[DataFile]:
    """Lists the files behind a path, a pattern or a list, those of folders included, with their layouts.

    Raises:
        DataError: nothing there, or a folder of no known layout.
        ConfigError: an unknown format.
    """
    if format is not None:
        check_choice("format", format, READERS)
    found: list[tuple[Path, str]] = []
    for given in expand_paths(path):
        kind = format or detect_format(given)
        expand = READERS[kind].expand
        if not given.is_dir():
            found.append((given, kind))
        elif expand is None:
            raise DataError(f"{given}: is a folder, which the {kind} layout does not read; name its files or a pattern")
        else:
            found.extend((file, kind) for file in expand(given))
    names = distinct_names([file for file, _ in found])
    return [DataFile(file, kind, name) for (file, kind), name in zip(found, names, strict=True)]


def data_sha256(path: PathLike | Sequence[PathLike], format: str | None = None) -> str:
    """Returns a digest of the content of all files behind a path; of a prepared store, of its manifest's checksums."""
    files = [file.path for file in list_files(path, format)]
    each = [Store(file).fingerprint if file.is_dir() else sha256(file) for file in files]
    return hashlib.sha256("".join(each).encode()).hexdigest()


def read_file(
    file: DataFile, policy: ReadPolicy, *, keys: LabelKeys | None = None, part: Part | None = None, **options: Any
) -> Iterator[AtomicData]:
    """Reads the structures of one file, or of a part of it.

    Raises:
        DataError: an unreadable file or a bad structure.
        ConfigError: an option that its layout does not have, or keys where the layout fixes the names.
    """
    read = READERS[file.reader].read
    known = {key for key in inspect.signature(read).parameters if key not in ("path", "policy", "name")}
    own = ", ".join(sorted(known - {"keys", "part"})) or "none"
    for key in options:
        if key not in known - {"keys", "part"}:
            raise ConfigError(f"{file.path}: the {file.reader} reader has no option {key!r}; it has {own}")
    if keys is not None and "keys" not in known:
        raise ConfigError(f"{file.path}: keys: the {file.reader} layout fixes its names; drop keys (options: {own})")
    given = {key: value for key, value in {"keys": keys, "part": part}.items() if value is not None}
    return read(file.path, file.name, policy, **given, **options)


def detect_format(path: PathLike) -> str:
    """Returns the name of the reader for this path, from its content and suffix.

    Raises:
        DataError: a path that does not exist, or a directory of no known layout.
    """
    path = Path(path)
    if not path.exists():
        raise DataError(f"{path}: no such file or directory")
    head = b""
    if not path.is_dir():
        with open(path, "rb") as file:
            head = file.read(4096)
    for reader in _ORDER:
        if reader.matches(path, head):
            return reader.name
    raise DataError(
        f"{path}: is a folder of no known layout (no prepared store, and no files that one would hold); name files, "
        "a pattern, or the format"
    )


def expand_paths(path: PathLike | Sequence[PathLike]) -> list[Path]:
    """Lists the files named by a path, ``dataset:NAME/FILE``, a pattern or a list of them; patterns in sorted order.

    Raises:
        DataError: nothing there.
    """
    found: list[Path] = []
    for item in [path] if isinstance(path, str | os.PathLike) else path:
        text = os.path.expanduser(str(resolve(item)))
        if os.path.exists(text):
            found.append(Path(text))
        elif not glob.has_magic(text):
            raise DataError(f"{text}: no such file or directory")
        elif matched := sorted(glob.glob(text, recursive=True)):
            found.extend(Path(match) for match in matched)
        else:
            raise DataError(f"{text}: no file matches this pattern")
    if not found:
        raise DataError("no data files were named; give at least one path")
    return found


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """Returns file names, with as many parent folders as it takes to tell them apart."""
    depth = 1
    names = [path.name for path in paths]
    while len(set(names)) < len(names) and depth < max(len(path.parts) for path in paths):
        depth += 1
        names = ["/".join(path.parts[-depth:]) for path in paths]
    return names
