"""OC20 and OC22 preprocessed: pickled PyTorch Geometric records in LMDB, in ``.pkl`` lists and in ``torch.save`` files.

LMDB keys are the numbers ``"0"`` to ``length − 1`` in ASCII; ``length`` may be kept, pickled, under a key of that name.
Pickles are read without running anything (``escaip.data.readers.pickled``).
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from escaip.data.readers.ocp_records import OcpFile
from escaip.data.readers.pickled import PickledObject, attributes, plain, read_torch_file, unpickle
from escaip.data.readers.policy import Part, Reader, ReadPolicy, Record, ranges
from escaip.data.structure import AtomicData
from escaip.errors import DataError

if TYPE_CHECKING:
    import lmdb

SUFFIX = ".lmdb"
_MAGIC = b"\xde\xc0\xef\xbe"

# LMDB refuses to open a file twice in a process, so its readers share it; read-only and without locks, a forked process
# may use it too. By device and inode.
_OPEN: dict[tuple[int, int], tuple[lmdb.Environment, int]] = {}
_LOCK = threading.RLock()


def read_ocp_lmdb(
    path: Path,
    name: str,
    policy: ReadPolicy,
    *,
    part: Part | None = None,
    energy: str | None = None,
    is2re: str | None = None,
    reference: str | Path | None = None,
) -> Iterator[AtomicData]:
    """Yields the structures of an LMDB file in the order of its keys.

    Ids are ``name:system:frame``, groups are systems (``sid``). Slabs are periodic along all axes. Files of the test
    splits have no labels.

    Options:
        energy: kind of the energies **of the file**, ``adsorption`` or ``total``. The files of OC20 do not say it, so
            it has to be stated, and is checked against the magnitudes. OC22 and bulk records are total.
        is2re: for files of whole relaxations: ``initial`` pairs the initial structure with the energy of the relaxed
            one (the IS2RE task, no potential energy surface), ``relaxed`` the relaxed structure with its own energy.
            Neither has forces.
        reference: pickle of energies by ``sid`` (``oc20_ref.pkl``) that turn adsorption energies into total ones.

    Raises:
        DataError: no LMDB file, a damaged or truncated one, a missing key, a pickle that names more than data, an
            unknown record, implausible energies.
        ConfigError: an option that must be stated, or cannot be.
    """
    file = OcpFile(path, name, policy, energy, is2re, reference)
    yield from file.structures(_records(file, part))


def read_pyg(
    path: Path,
    name: str,
    policy: ReadPolicy,
    *,
    energy: str | None = None,
    is2re: str | None = None,
    reference: str | Path | None = None,
) -> Iterator[AtomicData]:
    """Yields the structures of a list of records, of a collated batch, or of one record; the file is held in memory.

    The file is a pickle (``.pkl``) or of ``torch.save`` (``.pt``, PyTorch 1.6 or newer). Options are those of
    ``read_ocp_lmdb``; a record without ``cell`` and ``pbc`` is a molecule.

    Raises:
        DataError: a damaged file, one that names more than data, an unknown record, implausible energies.
        ConfigError: an option that must be stated, or cannot be.
    """
    file = OcpFile(path, name, policy, energy, is2re, reference)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    content = read_torch_file(path) if data.startswith(b"PK\x03\x04") else unpickle(data, str(path))
    records = list(content) if isinstance(content, list | tuple) else _split(content, path)
    if not records:
        raise DataError(f"{path}: holds no records")
    yield from file.structures(
        file.record(value, str(number), f"{path}: record {number}") for number, value in enumerate(records)
    )


def divide(path: Path, size: int) -> list[Part]:
    """Ranges of ``size`` records."""
    with open_environment(path) as environment:
        return ranges(count_records(environment, path), size)


def numbered(files: list[Path]) -> list[Path]:
    """Sorts files by name, ``data.2.lmdb`` before ``data.10.lmdb``."""
    return sorted(files, key=lambda file: [int(k) if k.isdecimal() else k for k in re.split(r"([0-9]+)", file.name)])


def list_lmdb_files(path: Path) -> list[Path]:
    """Lists the ``*.lmdb`` files of a folder by number."""
    return numbered([file for file in path.iterdir() if file.suffix == SUFFIX and file.is_file()])


def matches(path: Path, head: bytes) -> bool:
    """LMDB files named ``.lmdb``, and folders of them."""
    return bool(list_lmdb_files(path)) if path.is_dir() else path.suffix == SUFFIX and head[16:20] == _MAGIC


def matches_pyg(path: Path, head: bytes) -> bool:
    """``.pkl`` files that are pickles, ``.pt`` files that are zips."""
    return (path.suffix == ".pkl" and head[:1] == b"\x80") or (path.suffix == ".pt" and head[:4] == b"PK\x03\x04")


@contextmanager
def open_environment(path: Path) -> Iterator[lmdb.Environment]:
    """Opens the LMDB environment of a file, read-only and without locks; shared by its readers in this process."""
    import lmdb

    try:
        stat = os.stat(path)
        key = (stat.st_dev, stat.st_ino)
        with _LOCK:
            environment, count = _OPEN.get(key, (None, 0))
            if environment is None:
                environment = lmdb.open(str(path), subdir=False, readonly=True, lock=False, readahead=False)
            _OPEN[key] = (environment, count + 1)
    except (OSError, lmdb.Error) as error:
        raise DataError(f"{path}: not a readable LMDB file, or damaged ({error})") from error
    try:
        # Beyond the end of a mapped file there is no error to catch: the process would be killed.
        needed = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
        if stat.st_size < needed:
            raise DataError(f"{path}: is truncated, {stat.st_size} of {needed} bytes; copy or unpack it again")
        yield environment
    finally:
        with _LOCK:
            environment, count = _OPEN.pop(key)
            if count > 1:
                _OPEN[key] = (environment, count - 1)
            else:
                environment.close()


def count_records(environment: lmdb.Environment, path: Path) -> int:
    """Returns the number of records of a file."""
    entries = int(environment.stat()["entries"])
    with environment.begin() as transaction:
        if transaction.get(b"nextid") is not None:
            raise DataError(f"{path}: is an ASE database in LMDB, not OCP records; read it with format: aselmdb")
        value = transaction.get(b"length")
        if value is None:
            if entries == 0:
                raise DataError(f"{path}: holds no records")
            return entries
        count = unpickle(value, f"{path}: length")
        if type(count) is not int or count < 1:
            raise DataError(f"{path}: its length is {str(count)[:40]!r}, expected a number of records")
        if count > entries - 1:
            raise DataError(f"{path}: its length is {count}, but it holds {entries - 1} records; unpack it again")
        if transaction.get(str(count).encode()) is not None:
            raise DataError(f"{path}: its length is {count}, but there is a record {count}; the file is not finished")
    return count


def _records(file: OcpFile, part: Part | None) -> Iterator[Record]:
    with open_environment(file.path) as environment:
        count = count_records(environment, file.path)
        start, stop = part or (0, count)
        with environment.begin() as transaction:
            for number in range(start, min(stop, count)):
                where = f"{file.path}: key '{number}'"
                yield file.record(transaction.get(str(number).encode()), str(number), where)


def _split(content: Any, path: Path) -> list[dict[str, Any]]:
    """Records of a collated batch, cut where its slices say; one record is a list of itself."""
    record = attributes(content, str(path))
    slices = None
    if isinstance(content, PickledObject):
        # PyTorch Geometric 1.x keeps them beside the attributes, 2.x beside the mapping of them.
        store = content.state.get("_store")
        slices = store.state.get("_slice_dict") if isinstance(store, PickledObject) else content.state.get("__slices__")
    if type(slices) is not dict or not slices:
        return [record]
    # Neighbor lists are joined along their second axis, and not read.
    cuts = {
        key: _cuts(plain(value), record[key], f"{path}: {key}")
        for key, value in slices.items()
        if key in record and "index" not in key
    }
    counts = {len(value) for value in cuts.values()}
    if len(counts) != 1:
        raise DataError(f"{path}: attributes of the batch are cut into different numbers of records")
    return [
        {key: record[key][pairs[number][0] : pairs[number][1]] for key, pairs in cuts.items()}
        for number in range(counts.pop())
    ]


def _cuts(slices: Any, values: Any, place: str) -> list[tuple[int, int]]:
    """Start and stop of each record along the first axis."""
    cuts = np.asarray(slices) if isinstance(slices, np.ndarray | list) else np.empty(0)
    size = len(values) if isinstance(values, list) or (isinstance(values, np.ndarray) and values.ndim) else -1
    if cuts.ndim != 1 or cuts.dtype.kind not in "iu" or len(cuts) < 2:
        raise DataError(f"{place}: the batch does not say how it is cut into records")
    if cuts[0] != 0 or cuts[-1] != size or (cuts[1:] < cuts[:-1]).any():
        raise DataError(f"{place}: the batch is cut beyond its {size} entries; the file is damaged")
    return list(pairwise(cuts.tolist()))


READER = Reader("ocp_lmdb", read_ocp_lmdb, matches, divide, list_lmdb_files)
PYG_READER = Reader("pyg", read_pyg, matches_pyg)
