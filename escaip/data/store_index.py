"""Index of a prepared store: what sampling, splitting and statistics need of every structure, without its arrays."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from escaip.data.shards import Arrays, Stream, map_safetensors, pack_text, read_text
from escaip.data.structure import LABELS, AtomicData

EDGE_CUTOFF = 6.0
"""Å within which the edges of a structure are counted, to balance batches by."""

COLUMNS: dict[str, str] = {
    "natoms": "<i4",
    "periodic": "?",
    "labels": "u1",
    "split": "u1",
    "group_codes": "<i4",
    "composition_codes": "<i4",
    "num_edges": "<i4",
    "energy": "<f8",
    "force_square_sum": "<f8",
    "force_count": "<i4",
    "max_force": "<f4",
    "content_hash": "<u8",
}
"""Per structure: atoms; any periodic axis; labels as bits (energy 1, forces 2, stress 4); position of its part in the
manifest's ``splits``; group; composition; directed pairs within ``EDGE_CUTOFF``; energy in eV (NaN missing); sum of
squared force components of free, labelled atoms in (eV/Å)², their number, and the largest force on one of them in eV/Å;
hash of elements, coordinates, cell, charge and spin."""

_QUANTUM = 1e4  # coordinates are hashed in units of 1e-4 Å, so that single precision finds its double


@dataclass
class IndexBuilder:
    """Collects the columns of structures as they are written.

    Attributes:
        groups: code of each group's name.
        compositions: code of each composition, ``(element, count)`` pairs as bytes.
    """

    groups: dict[str, int] = field(default_factory=dict)
    compositions: dict[bytes, int] = field(default_factory=dict)
    _blocks: list[Arrays] = field(default_factory=list)

    def add(self, structures: Sequence[AtomicData]) -> None:
        """Appends structures; their labels are NaN where missing."""
        block = {key: np.zeros(len(structures), dtype=dtype) for key, dtype in COLUMNS.items()}
        for row, data in enumerate(structures):
            for key, value in self._describe(data).items():
                block[key][row] = value
        self._blocks.append(block)

    def __len__(self) -> int:
        return sum(len(block["natoms"]) for block in self._blocks)

    def arrays(self) -> Arrays:
        """The index of what was added: columns, names of groups, compositions."""
        columns = {key: np.concatenate([block[key] for block in self._blocks]) for key in COLUMNS}
        return {**columns, **pack_text("group", list(self.groups)), **pack_compositions(list(self.compositions))}

    def _describe(self, data: AtomicData) -> dict[str, Any]:
        numbers = data._store["atomic_numbers"].numpy()
        forces = data._store["forces"].numpy()[~data._store["fixed"].numpy()]
        squares = (forces**2).sum(axis=1)
        squares = squares[~np.isnan(squares)]
        return {
            "natoms": len(numbers),
            "periodic": bool(data._store["pbc"].any()),
            "labels": sum(1 << bit for bit, label in enumerate(LABELS) if data.has_label(label)),
            "group_codes": self.groups.setdefault(str(data.group), len(self.groups)),
            "composition_codes": self.compositions.setdefault(composition_key(numbers), len(self.compositions)),
            "num_edges": count_edges(data),
            "energy": float(data._store["energy"]),
            "force_square_sum": float(squares.sum()),
            "force_count": 3 * len(squares),
            "max_force": float(np.sqrt(squares.max())) if len(squares) else 0.0,
            "content_hash": content_hash(data),
        }


def composition_key(numbers: NDArray[Any]) -> bytes:
    """Elements and how many of each, as bytes that are equal for equal compositions."""
    counts = np.bincount(numbers)
    elements = np.flatnonzero(counts)
    return np.stack([elements, counts[elements]], axis=1).astype("<i4").tobytes()


def pack_compositions(keys: Sequence[bytes]) -> Arrays:
    """``composition_offsets (C+1,)`` into ``composition_elements`` and ``composition_counts``."""
    tables = [np.frombuffer(key, dtype="<i4").reshape(-1, 2) for key in keys]
    joined = np.concatenate(tables) if tables else np.zeros((0, 2), dtype="<i4")
    offsets = np.concatenate([[0], np.cumsum([len(table) for table in tables])]).astype("<i8")
    return {
        "composition_offsets": offsets,
        "composition_elements": np.ascontiguousarray(joined[:, 0]).astype("u1"),
        "composition_counts": np.ascontiguousarray(joined[:, 1]).astype("<i4"),
    }


def content_hash(data: AtomicData) -> int:
    """64 bits that two structures share when their elements, coordinates, cell, charge and spin are the same."""
    store = data._store
    digest = hashlib.blake2b(store["atomic_numbers"].numpy().tobytes(), digest_size=8)
    for key in ("positions", "cell"):
        # + 0.0 turns the negative zero of rint into zero.
        digest.update((np.rint(store[key].numpy() * _QUANTUM) + 0.0).tobytes())
    for key in ("pbc", "charge", "spin_multiplicity"):
        digest.update(store[key].numpy().tobytes())
    return int.from_bytes(digest.digest(), "little")


def count_edges(data: AtomicData) -> int:
    """Directed pairs within ``EDGE_CUTOFF``, images included."""
    from vesin import NeighborList

    search = NeighborList(cutoff=EDGE_CUTOFF, full_list=True)
    store = data._store
    (centers,) = search.compute(
        points=store["positions"].numpy(),
        box=store["cell"].numpy()[0],
        periodic=store["pbc"].numpy()[0],
        quantities="i",
    )
    return min(len(centers), np.iinfo(np.int32).max)


def merge_indices(files: Sequence[Path]) -> dict[str, NDArray[Any] | Stream]:
    """One index of several, with common codes of groups and compositions.

    Columns are streams that map one file at a time: nothing as long as the data set is held.

    Returns:
        What :func:`escaip.data.shards.save_arrays` takes.
    """
    groups: dict[str, int] = {}
    compositions: dict[bytes, int] = {}
    codes: dict[str, list[NDArray[Any]]] = {"group_codes": [], "composition_codes": []}
    length = 0
    for file in files:
        part = map_safetensors(file)
        length += len(part["natoms"])
        names = [read_text(part, "group", k) for k in range(len(part["group_offsets"]) - 1)]
        codes["group_codes"].append(_codes(names, groups))
        keys = [composition_at(part, k) for k in range(len(part["composition_offsets"]) - 1)]
        codes["composition_codes"].append(_codes(keys, compositions))

    def blocks(key: str) -> Iterator[NDArray[Any]]:
        for position, file in enumerate(files):
            column = map_safetensors(file)[key]
            yield codes[key][position][column] if key in codes else column

    streams = {key: Stream(np.dtype(dtype), length, partial(blocks, key)) for key, dtype in COLUMNS.items()}
    return {**streams, **pack_text("group", list(groups)), **pack_compositions(list(compositions))}


def _codes(keys: Sequence[Any], table: dict[Any, int]) -> NDArray[Any]:
    return np.array([table.setdefault(key, len(table)) for key in keys], dtype="<i4")


def composition_at(index: Arrays, code: int) -> bytes:
    """The key of one composition, as :func:`composition_key` makes it."""
    start, stop = index["composition_offsets"][code : code + 2].tolist()
    table = np.stack([index["composition_elements"][start:stop], index["composition_counts"][start:stop]], axis=1)
    return table.astype("<i4").tobytes()


def label_counts(labels: NDArray[Any]) -> dict[str, int]:
    """How many structures carry each label."""
    return {label: int(np.count_nonzero(labels & (1 << bit))) for bit, label in enumerate(LABELS)}


def count_duplicates(index: Arrays) -> int:
    """Structures that occur, by content, also in the first split, while they belong to another one."""
    split = index["split"]
    if not split.any():
        return 0
    hashes = index["content_hash"]
    return int(np.isin(hashes[split != 0], hashes[split == 0]).sum())


def index_histograms(
    index: Arrays, rows: NDArray[np.int64], element_references: Mapping[int, float]
) -> dict[str, dict[str, list[float]]]:
    """Distributions over structures, each as ``edges (b+1,)`` and ``counts (b,)``.

    Args:
        index: of the store.
        rows: of the structures.
        element_references: eV by atomic number.

    Returns:
        ``natoms``; ``energy_residual`` in eV/atom, after references; ``force_rms`` in eV/Å, logarithmic;
        ``max_force`` in eV/Å, logarithmic; ``neighbors`` per atom within ``EDGE_CUTOFF``.
    """
    natoms = index["natoms"][rows].astype(np.float64)
    references = np.zeros(len(index["composition_offsets"]) - 1)
    for code in range(len(references)):
        table = np.frombuffer(composition_at(index, code), dtype="<i4").reshape(-1, 2)
        references[code] = sum(element_references.get(z, 0.0) * count for z, count in table.tolist())
    residual = (index["energy"][rows] - references[index["composition_codes"][rows]]) / natoms
    forced = index["force_count"][rows] > 0
    rms = np.sqrt(index["force_square_sum"][rows][forced] / index["force_count"][rows][forced])
    return {
        "natoms": _histogram(natoms),
        "energy_residual": _histogram(residual[np.isfinite(residual)]),
        "force_rms": _histogram(rms, log=True),
        "max_force": _histogram(index["max_force"][rows][forced].astype(np.float64), log=True),
        "neighbors": _histogram(index["num_edges"][rows] / natoms),
    }


def _histogram(values: NDArray[np.float64], bins: int = 50, *, log: bool = False) -> dict[str, list[float]]:
    if log:
        values = values[values > 0]
    if len(values) == 0:
        return {"edges": [], "counts": []}
    low, high = float(values.min()), float(values.max())
    spread = high > low
    edges: Any = bins
    if log and spread:
        edges = np.geomspace(low, high, bins + 1)
        values = np.clip(values, edges[0], edges[-1])
    counts, edges = np.histogram(values, edges if spread else 1)
    return {"edges": edges.tolist(), "counts": counts.tolist()}
