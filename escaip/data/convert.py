"""Writes any supported data as extxyz or a prepared store."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from escaip.data.readers import PathLike, ReadReport, open_source
from escaip.data.store_writer import StoreWriter
from escaip.errors import DataError
from escaip.files import write_aside

_OPENERS: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}


@dataclass(frozen=True)
class WriteReport:
    """Counts of a conversion.

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


def convert(src: PathLike | list[PathLike], dst: PathLike, *, overwrite: bool = False, **options: Any) -> WriteReport:
    """Converts any supported data into extxyz (``.xyz``, ``.extxyz``, also compressed) or a prepared store.

    Args:
        src: see ``escaip.data.open_source``.
        dst: file to write, also ending in ``.gz``, ``.bz2`` or ``.xz``; a name without suffix, or ending in
            ``.store``, makes a prepared store.
        overwrite: replace what is there.
        **options: of ``escaip.data.open_source``.

    Raises:
        DataError: unreadable data, 0 structures, an unknown suffix, a full disk; then nothing is left at ``dst``.
    """
    import ase.io

    target, report, written = Path(dst), ReadReport(), 0
    if target.suffix in ("", ".store"):
        names = [os.fspath(item) for item in ([src] if isinstance(src, str | os.PathLike) else src)]
        with StoreWriter(target, source=", ".join(names), overwrite=overwrite) as writer:
            for data in open_source(src, report=report, **options):
                writer.write(data)
        return WriteReport(target, len(writer), report.skipped + report.filtered, tuple(report.messages))
    kind = Path(target.stem).suffix if target.suffix in _OPENERS else target.suffix
    if kind not in (".xyz", ".extxyz"):
        raise DataError(f"{target}: cannot write this format; use .extxyz (also .gz, .xz), or no suffix for a store")
    if target.exists() and not overwrite:
        raise DataError(f"{target}: exists already; choose another name or allow overwriting")
    with write_aside(target) as aside:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _OPENERS.get(target.suffix, open)(aside, "wt", encoding="utf-8") as file:
            for data in open_source(src, report=report, **options):
                ase.io.write(file, data.to_ase(), format="extxyz")
                written += 1
        if written == 0:
            raise DataError(f"{target}: 0 structures to write; check the source, its filters and on_error")
    return WriteReport(target, written, report.skipped + report.filtered, tuple(report.messages))
