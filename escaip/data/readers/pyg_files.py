"""Records of PyTorch Geometric in plain files: ``.pkl`` lists, and ``torch.save`` files with records or a batch."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from escaip.data.readers.ocp_records import EnergyCheck, RecordOptions, listed, structure_of
from escaip.data.readers.policy import Part, Reader, ReadPolicy
from escaip.data.readers.pyg_pickle import PickledObject, attributes, plain, read_torch_file, unpickle
from escaip.data.structure import LabelKeys
from escaip.errors import ConfigError, DataError

if TYPE_CHECKING:
    from escaip.data.structure import AtomicData


def read_pyg(
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
    """Structures of a list of records, of a collated batch, or of one record; the file is held in memory.

    Nothing that the file names is run (:mod:`escaip.data.readers.pyg_pickle`). Records and options are those of
    :func:`escaip.data.readers.ocp_lmdb.read_ocp_lmdb`; a record without ``cell`` and ``pbc`` is a molecule.

    Args:
        path: pickle (``.pkl``) or file of ``torch.save`` (``.pt``, PyTorch 1.6 or newer).
        policy: units and error policy.
        name: what ids begin with; default the file's name.
        keys: not used by this source; the layout fixes the names.
        part: not used, these files are read whole.
        energy: what the energies of the file are, ``adsorption`` or ``total``; has to be stated for slabs of OC20.
        is2re: geometry of records of whole relaxations, ``initial`` or ``relaxed``.
        reference: pickle of energies by ``sid`` that turn adsorption energies into total ones.

    Raises:
        DataError: a damaged file, one that names more than data, an unknown record, implausible energies.
        ConfigError: an option that must be stated, or cannot be.
    """
    if keys is not None:
        raise ConfigError(
            "keys: these records fix their names; choose what energies are with energy: adsorption | total"
        )
    name = name or path.name
    options = RecordOptions.parse(path, energy, is2re, reference)
    check = EnergyCheck(path, options.energy)
    yield from check.windows(_structures(path, policy, name, options, check))


def _structures(
    path: Path, policy: ReadPolicy, name: str, options: RecordOptions, check: EnergyCheck
) -> Iterator[AtomicData]:
    try:
        with open(path, "rb") as file:
            head = file.read(4)
        content = read_torch_file(path) if head == b"PK\x03\x04" else unpickle(path.read_bytes(), str(path))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    records = list(content) if isinstance(content, list | tuple) else _split(content, path)
    if not records:
        raise DataError(f"{path}: holds no records")
    for number, value in enumerate(records):
        record: dict[str, Any] = {}

        def build(value: Any = value, number: int = number, record: dict[str, Any] = record) -> AtomicData:
            record.update(attributes(value, f"{path}: record {number}"))
            return structure_of(record, name, str(number), options, check, policy.units)

        data = policy.admit(build, lambda record=record: f"record keys {listed(record)}")  # type: ignore[misc]
        if data is not None:
            yield data


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


def matches(path: Path, head: bytes) -> bool:
    """``.pkl`` files that are pickles, ``.pt`` files that are zips."""
    return (path.suffix == ".pkl" and head[:1] == b"\x80") or (path.suffix == ".pt" and head[:4] == b"PK\x03\x04")


READER = Reader("pyg", "PyG records: .pkl lists, .pt files of records or a batch", read_pyg, matches)
