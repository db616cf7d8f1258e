"""OC20 and OC22 in their preprocessed layout: LMDB files of pickled PyTorch Geometric records.

Keys are the numbers ``"0"`` to ``length − 1`` in ASCII; ``length`` may be kept, pickled, under a key of that name.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from escaip.data.readers.ocp_records import EnergyCheck, RecordOptions, listed, structure_of
from escaip.data.readers.policy import Part, Reader, ReadPolicy
from escaip.data.readers.pyg_pickle import attributes, unpickle
from escaip.data.structure import LabelKeys
from escaip.errors import ConfigError, DataError

if TYPE_CHECKING:
    from escaip.data.structure import AtomicData

SUFFIX = ".lmdb"
_MAGIC = b"\xde\xc0\xef\xbe"

# LMDB refuses to open a file twice in one process: readers of the same file share it. By device and inode.
_OPEN: dict[tuple[int, int], tuple[Any, int]] = {}
_LOCK = threading.RLock()


def read_ocp_lmdb(
    path: Path,
    policy: ReadPolicy,
    *,
    name: str | None = None,
    keys: LabelKeys | None = None,
    part: Part | None = None,
    energy: str | None = None,
    is2re: str | None = None,
    reference: str | Path | None = None,
) -> Iterator[AtomicData]:
    """Structures of one file in the order of its keys.

    Ids are ``file:system:frame``, groups are systems (``sid``). Pickles are read without running anything
    (:mod:`escaip.data.readers.pyg_pickle`). Slabs are periodic along all axes. Files of the test splits have no labels.

    Args:
        path: LMDB file.
        policy: units and error policy.
        name: what ids begin with; default the file's name.
        keys: not used by this source; the layout fixes the names.
        part: numbers of the records to read.
        energy: what the energies **of the file** are, ``adsorption`` or ``total``. The files of OC20 do not say it, so
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
    if keys is not None:
        raise ConfigError(
            "keys: the OCP layout fixes its names; choose what energies are with energy: adsorption | total"
        )
    name = name or path.name
    options = RecordOptions.parse(path, energy, is2re, reference)
    check = EnergyCheck(path, options.energy)
    yield from check.windows(_structures(path, policy, name, part, options, check))


def divide(path: Path, size: int) -> list[Part]:
    """Ranges of about ``size`` records.

    Raises:
        DataError: no LMDB file, or a damaged one.
    """
    with open_environment(path) as environment:
        count = count_records(environment, path)
    return [(start, min(start + size, count)) for start in range(0, count, size)]


def list_lmdb_files(path: Path) -> list[Path]:
    """The ``*.lmdb`` files of a folder, ``data.2.lmdb`` before ``data.10.lmdb``."""
    files = [file for file in path.iterdir() if file.suffix == SUFFIX and file.is_file()]
    return sorted(
        files, key=lambda file: [int(text) if text.isdecimal() else text for text in re.split(r"([0-9]+)", file.name)]
    )


def matches(path: Path, head: bytes) -> bool:
    """LMDB files named ``.lmdb``, and folders of them."""
    if path.is_dir():
        return bool(list_lmdb_files(path))
    return path.suffix == SUFFIX and head[16:20] == _MAGIC


@contextmanager
def open_environment(path: Path) -> Iterator[Any]:
    """The LMDB environment of a file, read-only and without locks; shared by its readers in this process.

    Raises:
        DataError: no LMDB file, or one that is shorter than it says.
    """
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
            environment, count = _OPEN[key]
            if count > 1:
                _OPEN[key] = (environment, count - 1)
            else:
                del _OPEN[key]
                environment.close()


def count_records(environment: Any, path: Path) -> int:
    """How many records a file holds.

    Raises:
        DataError: none, another layout, or another number than its ``length``.
    """
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


def _structures(
    path: Path, policy: ReadPolicy, name: str, part: Part | None, options: RecordOptions, check: EnergyCheck
) -> Iterator[AtomicData]:
    with open_environment(path) as environment:
        count = count_records(environment, path)
        start, stop = part if part is not None else (0, count)
        with environment.begin() as transaction:
            for number in range(start, min(stop, count)):
                record: dict[str, Any] = {}

                def build(number: int = number, record: dict[str, Any] = record) -> AtomicData:
                    value = transaction.get(str(number).encode())
                    where = f"{path}: key '{number}'"
                    if value is None:
                        raise DataError(f"{where} is missing, of keys 0 to {count - 1}; unpack the file again")
                    record.update(attributes(unpickle(value, where), where))
                    return structure_of(record, name, str(number), options, check, policy.units)

                data = policy.admit(build, lambda record=record: f"record keys {listed(record)}")  # type: ignore[misc]
                if data is not None:
                    yield data


READER = Reader(
    "ocp_lmdb",
    "OC20 and OC22 preprocessed: LMDB of pickled PyG records",
    read_ocp_lmdb,
    matches,
    parts=divide,
    expand=list_lmdb_files,
)
