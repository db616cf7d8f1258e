"""Writes structures: any supported data into extxyz or a prepared store, and databases of ASE in LMDB."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import json
import lzma
import os
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from escaip.data.readers import PathLike, ReadReport, open_source
from escaip.data.store_writer import StoreWriter
from escaip.data.structure import LABELS, AtomicData
from escaip.errors import DataError
from escaip.files import write_aside
from escaip.types import TARGETS

if TYPE_CHECKING:
    import lmdb
    from ase import Atoms

BATCH_ROWS = 2048
FIRST_MAP = 1 << 24
"""Rows written in one transaction, and bytes of the memory map that is doubled when it is full."""

_OPENERS: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_ORIGIN = {"ctime": 0.0, "mtime": 0.0, "user": "", "calculator": "unknown", "calculator_parameters": {}}


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


def write_aselmdb(
    path: PathLike,
    structures: Iterable[AtomicData | Atoms],
    *,
    metadata: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> int:
    """Writes structures as the rows 1, 2, ... of an ASE database in LMDB, in time linear in the rows.

    ASE's own backend searches its list of ids at every row. ``data`` of a row holds ``charge``, ``spin`` (multiplicity,
    as in OMol25), ``group``, ``structure_id`` and further targets of an ``AtomicData``, or ``info`` of an
    ``ase.Atoms``, whose labels are those of an attached single-point calculator, forces without constraints.
    Nothing in a file depends on when, where or by whom it was written.

    Args:
        path: file to write; it gets its name when it is whole.
        structures: taken one by one; any number.
        metadata: of the database.
        overwrite: replace a file that is there.

    Returns:
        Number of rows.

    Raises:
        DataError: a file that is there, no structures, something that JSON cannot hold, a disk that is full.
    """
    import lmdb

    path = Path(path)
    if path.exists() and not overwrite:
        raise DataError(f"{path}: exists; name another file, or overwrite it (overwrite=True)")
    growing = path.with_name(f".{path.name}.{os.getpid()}.growing")
    count, batch = 0, []
    try:
        with (
            write_aside(path) as whole,
            lmdb.open(str(growing), subdir=False, lock=False, sync=False, map_size=FIRST_MAP) as environment,
        ):
            for count, structure in enumerate(structures, start=1):
                batch.append((b"%d" % count, zlib.compress(_row_text(structure, f"structure {count}"))))
                if len(batch) == BATCH_ROWS:
                    _put(environment, batch)
                    batch = []
            if not count:
                raise DataError(f"{path}: no structures to write")
            own = {"nextid": count + 1, "metadata": dict(metadata or {})}
            _put(environment, batch)
            _put(environment, [(key.encode(), zlib.compress(_json(value, key))) for key, value in own.items()])
            environment.copy(str(whole), compact=True)
    except lmdb.Error as error:
        raise DataError(f"{path}: cannot be written ({error}); nothing was kept") from error
    finally:
        growing.unlink(missing_ok=True)
    return count


def _put(environment: lmdb.Environment, items: list[tuple[bytes, bytes]]) -> None:
    """Puts a batch in one transaction, in the order of the keys; the map grows as it has to."""
    import lmdb

    while True:
        try:
            with environment.begin(write=True) as transaction:
                for key, value in sorted(items):
                    transaction.put(key, value)
            return
        except lmdb.MapFullError:
            environment.set_mapsize(2 * environment.info()["map_size"])


def _row_text(structure: AtomicData | Atoms, name: str) -> bytes:
    """A row in JSON, with the entries that ASE expects about its origin."""
    from ase.calculators.singlepoint import SinglePointCalculator

    atoms = structure.to_ase() if isinstance(structure, AtomicData) else structure
    data = dict(atoms.info)
    results = dict(atoms.calc.results) if isinstance(atoms.calc, SinglePointCalculator) else {}
    if isinstance(structure, AtomicData):
        own = {"charge": int(structure.charge), "spin": int(structure.spin_multiplicity)}
        names = {key: data[key] for key in ("group", "structure_id")}
        places = (results, atoms.arrays, data)
        further = [key for key in TARGETS if key not in LABELS and structure.has_label(key)]
        data = {**own, **names, **{key: next(p[key] for p in places if key in p) for key in further}}
    row: dict[str, Any] = {
        "numbers": atoms.numbers, "positions": atoms.positions, "cell": np.asarray(atoms.cell), "pbc": atoms.pbc,
        "data": data,
    }  # fmt: skip
    if atoms.has("tags"):
        row["tags"] = atoms.get_tags()
    if atoms.constraints:
        row["constraints"] = [constraint.todict() for constraint in atoms.constraints]
    row.update({label: results[label] for label in LABELS if results.get(label) is not None})
    text = _json(row, name)
    unique = hashlib.blake2b(text, digest_size=16).hexdigest()
    return text[:-1] + b", " + _json({"unique_id": unique, **_ORIGIN}, name)[1:]


def _plain(value: object) -> Any:
    """An array as ASE writes it in JSON, a number of NumPy as its own."""
    if isinstance(value, np.ndarray):
        return {"__ndarray__": [list(value.shape), str(value.dtype), value.ravel().tolist()]}
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"a {type(value).__name__}")


def _json(value: object, name: str) -> bytes:
    try:
        return json.dumps(value, default=_plain).encode()
    except (TypeError, ValueError) as error:
        raise DataError(f"{name}: holds what JSON cannot ({error}); drop it from info") from error
