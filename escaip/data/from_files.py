"""What ``escaip data`` does with files: inspect and convert. Functions only; the command line calls them."""

from __future__ import annotations

import bz2
import errno
import gzip
import json
import lzma
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from escaip.data.inspect import Inspection, inspect_structures, plot_inspection
from escaip.data.readers import PathLike, ReadReport, expand_paths, open_source
from escaip.data.store import MANIFEST, Store
from escaip.data.store_writer import StoreWriter
from escaip.errors import DataError

if TYPE_CHECKING:
    from escaip.data.structure import AtomicData

_OPENERS: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_XYZ = (".xyz", ".extxyz")


@dataclass(frozen=True)
class WriteReport:
    """What was written.

    Attributes:
        path: the file or store.
        written: structures in it.
        skipped: structures left out, bad or filtered.
        messages: why, for the first of them.
    """

    path: Path
    written: int
    skipped: int
    messages: tuple[str, ...]

    def summary(self) -> str:
        """One line."""
        text = f"{self.path}: {self.written} structures written, {self.skipped} skipped"
        return f"{text} (first: {self.messages[0]})" if self.messages else text


def inspect(
    path: PathLike | list[PathLike], *, out: PathLike | None = None, show: bool = True, **options: Any
) -> Inspection:
    """Counts, ranges and distributions of any supported data; bad structures and implausible units are reported.

    Of a prepared store the checksums are compared first.

    Args:
        path: see :func:`open_source`.
        out: directory for ``inspect.json`` and ``inspect.png``; None writes no files.
        show: print the table.
        **options: of :func:`open_source` (``format``, ``keys``, ``units``, ``limit``, ``index``, ...).

    Raises:
        DataError: a file that cannot be read, a damaged store, or 0 structures.
    """
    report = ReadReport()
    for file in expand_paths(path):
        if file.is_dir() and (file / MANIFEST).is_file():
            Store(file).verify()
    options = {"on_error": "skip", **options, "check_units": False}
    try:
        inspection, values = inspect_structures(open_source(path, report=report, **options), report)
    except DataError as error:
        if report.read == 0 and report.messages:
            reason = f"{report.skipped} were skipped, the first: {report.messages[0]}"
            raise DataError(f"0 structures could be read, {reason}") from error
        raise
    if show:
        print(inspection.table())
    if out is not None:
        folder = Path(out)
        folder.mkdir(parents=True, exist_ok=True)
        plot_inspection(values, folder / "inspect.png")
        _replace_text(folder / "inspect.json", json.dumps(inspection.to_dict(), indent=1))
    return inspection


def convert(src: PathLike | list[PathLike], dst: PathLike, *, overwrite: bool = False, **options: Any) -> WriteReport:
    """Any supported data into extxyz (``.xyz``, ``.extxyz``, also ``.gz``, ``.bz2``, ``.xz``) or a prepared store.

    Args:
        src: see :func:`open_source`.
        dst: file to write; a name without suffix, or ending in ``.store``, makes a prepared store.
        overwrite: replace what is there.
        **options: of :func:`open_source`.

    Raises:
        DataError: unreadable data, 0 structures, an unknown suffix, a full disk; then nothing is left at ``dst``.
    """
    target = Path(dst)
    if target.suffix in ("", ".store"):
        return _write_store(src, target, overwrite, options)
    opener = _OPENERS.get(target.suffix, open)
    kind = Path(target.stem).suffix if target.suffix in _OPENERS else target.suffix
    if kind not in _XYZ:
        raise DataError(f"{target}: cannot write this format; use .extxyz (also .gz, .xz), or no suffix for a store")
    if target.exists() and not overwrite:
        raise DataError(f"{target}: exists already; choose another name or allow overwriting")
    report = ReadReport()
    aside = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with opener(aside, "wt", encoding="utf-8") as file:
            written = _write_xyz(open_source(src, report=report, **options), file)
        if written == 0:
            raise DataError(f"{target}: 0 structures to write; check the source, its filters and on_error")
        os.replace(aside, target)
    except OSError as error:
        reason = "the disk is full, nothing was kept" if error.errno == errno.ENOSPC else error.strerror or str(error)
        raise DataError(f"{target}: cannot be written ({reason}); free space or write elsewhere") from error
    finally:
        aside.unlink(missing_ok=True)
    return WriteReport(target, written, report.skipped + report.filtered, tuple(report.messages))


def _write_store(src: PathLike | list[PathLike], target: Path, overwrite: bool, options: Any) -> WriteReport:
    report = ReadReport()
    names = [os.fspath(item) for item in ([src] if isinstance(src, str | os.PathLike) else src)]
    with StoreWriter(target, source=", ".join(names), overwrite=overwrite) as writer:
        for data in open_source(src, report=report, **options):
            writer.write(data)
    return WriteReport(target, len(writer), report.skipped + report.filtered, tuple(report.messages))


def _write_xyz(structures: Iterable[AtomicData], file: IO[str]) -> int:
    import ase.io

    count = 0
    for data in structures:
        ase.io.write(file, data.to_ase(), format="extxyz")
        count += 1
    return count


def _replace_text(path: Path, text: str) -> None:
    aside = path.with_name(f".{path.name}.partial-{os.getpid()}")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)
