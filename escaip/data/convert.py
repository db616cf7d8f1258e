"""Writes any supported data as extxyz or a prepared store."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
from pathlib import Path
from typing import Any

from escaip.data.readers import PathLike, ReadReport, open_source
from escaip.data.store_writer import StoreWriter
from escaip.errors import DataError
from escaip.files import write_aside

_OPENERS: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}


def convert(src: PathLike | list[PathLike], dst: PathLike, *, overwrite: bool = False, **options: Any) -> ReadReport:
    """Converts any supported data into extxyz (``.xyz``, ``.extxyz``, also compressed) or a prepared store.

    Args:
        src: see ``escaip.data.open_source``.
        dst: file to write, also ending in ``.gz``, ``.bz2`` or ``.xz``; a name without suffix, or ending in
            ``.store``, makes a prepared store.
        overwrite: replace what is there.
        **options: of ``escaip.data.open_source``.

    Returns:
        Counts: all structures read are written.

    Raises:
        DataError: unreadable data, 0 structures, an unknown suffix, a full disk; then nothing is left at ``dst``.
    """
    import ase.io

    target, report = Path(dst), ReadReport()
    if target.suffix in ("", ".store"):
        names = [os.fspath(item) for item in ([src] if isinstance(src, str | os.PathLike) else src)]
        with StoreWriter(target, source=", ".join(names), overwrite=overwrite) as writer:
            for data in open_source(src, report=report, **options):
                writer.write(data)
        return report
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
        if report.read == 0:
            raise DataError(f"{target}: 0 structures to write; check the source, its filters and on_error")
    return report
