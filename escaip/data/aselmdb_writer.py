"""Writes ASE databases in LMDB (``.aselmdb``), readable by ASE, by fairchem and by us, in time linear in the rows.

ASE's own backend searches its list of ids at every row it adds, which is quadratic; here the rows are put as they
are, in sorted batches. Nothing in a file depends on when, where or by whom it was written.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from escaip.data.structure import LABELS, VOIGT
from escaip.errors import DataError
from escaip.types import TARGETS

if TYPE_CHECKING:
    from ase import Atoms

    from escaip.data.structure import AtomicData

BATCH_ROWS = 2048
BATCH_BYTES = 1 << 26
_FIRST_MAP = 1 << 24


def write_aselmdb(
    path: str | os.PathLike[str],
    structures: Iterable[AtomicData | Atoms],
    *,
    metadata: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> np.ndarray:
    """Writes structures as the rows 1, 2, ... of a database; the file gets its name when it is whole.

    Of an :class:`AtomicData`, ``data`` of its row holds ``charge``, ``spin`` (multiplicity, as in OMol25), ``group``
    and ``structure_id``. Of an :class:`ase.Atoms`, ``data`` is its ``info`` and labels are those that an attached
    single-point calculator holds; its forces are written as they are, without constraints.

    Args:
        path: file to write.
        structures: taken one by one; any number.
        metadata: what the database says of itself.
        overwrite: replace a file that is there.

    Returns:
        ``(rows,)`` int64, atoms of each structure; see :func:`write_natoms`.

    Raises:
        DataError: a file that is there, no structures, something that JSON cannot hold, a disk that is full.
    """
    import lmdb

    path = Path(path)
    if path.exists() and not overwrite:
        raise DataError(f"{path}: exists; name another file, or overwrite it (overwrite=True)")
    growing, whole = (path.with_name(f"{path.name}.{word}-{os.getpid()}") for word in ("growing", "whole"))
    counts: list[int] = []
    try:
        with lmdb.open(str(growing), subdir=False, lock=False, sync=False, map_size=_FIRST_MAP) as environment:
            for batch in _batches(structures, counts):
                _put(environment, batch)
            if not counts:
                raise DataError(f"{path}: no structures to write")
            own = {"nextid": len(counts) + 1, "metadata": dict(metadata or {})}
            _put(environment, [(key.encode(), zlib.compress(_json(value, key))) for key, value in own.items()])
            environment.copy(str(whole), compact=True)
        with open(whole, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(whole, path)
    except (lmdb.Error, OSError) as error:
        raise DataError(f"{path}: cannot be written ({error}); nothing was kept") from error
    finally:
        for leftover in (growing, whole):
            leftover.unlink(missing_ok=True)
    return np.array(counts, dtype=np.int64)


def write_natoms(folder: str | os.PathLike[str], counts: Iterable[np.ndarray]) -> Path:
    """Writes ``metadata.npz``, which fairchem looks for beside the databases of a folder to size its batches.

    Args:
        folder: of the databases.
        counts: atoms of each structure, file by file in the sorted order of the files.
    """
    path = Path(folder) / "metadata.npz"
    aside = path.with_name("metadata.partial.npz")
    np.savez_compressed(aside, natoms=np.concatenate(list(counts)))
    os.replace(aside, path)
    return path


def _batches(structures: Iterable[AtomicData | Atoms], counts: list[int]) -> Iterator[list[tuple[bytes, bytes]]]:
    """Keys and values of rows, a bounded number of them; ``counts`` grows by the atoms of each."""
    from ase import Atoms

    batch: list[tuple[bytes, bytes]] = []
    size = 0
    for row_id, structure in enumerate(structures, start=1):
        row = _row_of_atoms(structure) if isinstance(structure, Atoms) else _row_of_data(structure)
        value = zlib.compress(_row_text(row, f"structure {row_id}"))
        counts.append(row["numbers"]["__ndarray__"][0][0])
        batch.append((b"%d" % row_id, value))
        size += len(value)
        if len(batch) == BATCH_ROWS or size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    yield batch


def _put(environment: Any, items: list[tuple[bytes, bytes]]) -> None:
    """Puts a batch in one transaction, in the order of the keys; the map grows as it has to."""
    import lmdb

    items = sorted(items)
    while True:
        try:
            with environment.begin(write=True) as transaction:
                for key, value in items:
                    transaction.put(key, value)
            return
        except lmdb.MapFullError:
            environment.set_mapsize(2 * environment.info()["map_size"])


def _row_text(row: dict[str, Any], name: str) -> bytes:
    """A row in JSON, with what ASE wants to know of its origin."""
    text = _json(row, name)
    origin = {
        "unique_id": hashlib.blake2b(text, digest_size=16).hexdigest(),
        "ctime": 0.0,
        "mtime": 0.0,
        "user": "",
        "calculator": "unknown",
        "calculator_parameters": {},
    }
    return text[:-1] + b", " + _json(origin, name)[1:]


def _row_of_data(data: AtomicData) -> dict[str, Any]:
    row: dict[str, Any] = {
        "numbers": _encoded(data.atomic_numbers.numpy()),
        "positions": _encoded(data.positions.numpy()),
        "cell": _encoded(data.cell[0].numpy()),
        "pbc": _encoded(data.pbc[0].numpy()),
        "data": {
            "charge": int(data.charge),
            "spin": int(data.spin_multiplicity),
            "group": data.group,
            "structure_id": data.structure_id,
        },
    }
    if bool(data.tags.any()):
        row["tags"] = _encoded(data.tags.numpy())
    if bool(data.fixed.any()):
        indices = np.flatnonzero(data.fixed.numpy()).tolist()
        row["constraints"] = [{"name": "FixAtoms", "kwargs": {"indices": indices}}]
    for name, target in TARGETS.items():
        if data.has_label(name):
            value = data[name].numpy() if target.per_atom else data[name][0].numpy()
            value = value[VOIGT] if name == "stress" else value
            place = row if name in LABELS else row["data"]
            place[name] = _encoded(value) if value.ndim else float(value)
    return row


def _row_of_atoms(atoms: Atoms) -> dict[str, Any]:
    from ase.calculators.singlepoint import SinglePointCalculator

    row: dict[str, Any] = {
        "numbers": _encoded(atoms.numbers),
        "positions": _encoded(atoms.positions),
        "cell": _encoded(np.asarray(atoms.cell)),
        "pbc": _encoded(atoms.pbc),
        "data": dict(atoms.info),
    }
    if atoms.has("tags"):
        row["tags"] = _encoded(atoms.get_tags())
    if atoms.constraints:
        row["constraints"] = [constraint.todict() for constraint in atoms.constraints]
    if isinstance(atoms.calc, SinglePointCalculator):
        for label in ("energy", "forces", "stress"):
            value = atoms.calc.results.get(label)
            if value is not None:
                row[label] = float(value) if label == "energy" else _encoded(np.asarray(value))
    return row


def _encoded(array: np.ndarray) -> dict[str, Any]:
    """An array as ASE writes it in JSON."""
    return {"__ndarray__": [list(array.shape), str(array.dtype), array.ravel().tolist()]}


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return _encoded(value)
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"a {type(value).__name__}")


def _json(value: Any, name: str) -> bytes:
    try:
        return json.dumps(value, default=_plain).encode()
    except (TypeError, ValueError) as error:
        raise DataError(f"{name}: holds what JSON cannot ({error}); drop it from info") from error
