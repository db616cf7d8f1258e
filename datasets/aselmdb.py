"""Writes samples as ASE databases in LMDB, whose bytes do not depend on when, where or by whom they were written."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
from ase import Atoms

_ORIGIN = {"ctime": 0.0, "mtime": 0.0, "user": "", "calculator": "unknown", "calculator_parameters": {}}


def write_aselmdb(path: Path, structures: Sequence[Atoms], metadata: Mapping[str, Any]) -> None:
    """Writes structures with the labels of their single-point calculators as rows 1, 2, ...; ``data`` is ``info``."""
    rows = {b"%d" % number: zlib.compress(_row(atoms)) for number, atoms in enumerate(structures, start=1)}
    own = {"nextid": len(rows) + 1, "metadata": dict(metadata)}
    reserved = {key.encode(): zlib.compress(json.dumps(value).encode()) for key, value in own.items()}
    with tempfile.TemporaryDirectory() as folder:
        growing, whole = (os.path.join(folder, name) for name in ("growing", "whole"))
        with lmdb.open(growing, subdir=False, lock=False, map_size=1 << 24) as environment:
            for entries in (rows, reserved):
                with environment.begin(write=True) as transaction:
                    for key, value in sorted(entries.items()):
                        transaction.put(key, value)
            environment.copy(whole, compact=True)
        path.write_bytes(Path(whole).read_bytes())


def _row(atoms: Atoms) -> bytes:
    """A row in JSON, with the entries that ASE expects about its origin."""
    row = {"numbers": atoms.numbers, "positions": atoms.positions, "cell": np.asarray(atoms.cell), "pbc": atoms.pbc}
    labels = {key: atoms.calc.results[key] for key in ("energy", "forces", "stress") if key in atoms.calc.results}
    text = json.dumps({**row, "data": atoms.info, **labels}, default=_plain).encode()
    origin = {"unique_id": hashlib.blake2b(text, digest_size=16).hexdigest(), **_ORIGIN}
    return text[:-1] + b", " + json.dumps(origin).encode()[1:]


def _plain(array: np.ndarray) -> dict[str, Any]:
    """An array as ASE writes it in JSON."""
    return {"__ndarray__": [list(array.shape), str(array.dtype), array.ravel().tolist()]}
