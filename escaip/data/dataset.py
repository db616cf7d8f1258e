"""Sets of structures by position: of a list or prepared store, augmented, and several of them as one."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from escaip.data.splits import random_keys
from escaip.data.statistics import TrainingSums
from escaip.data.store import Store
from escaip.data.structure import AtomicData, collate, join_batches
from escaip.data.validation import check_choice
from escaip.errors import DataError
from escaip.types import TARGETS

if TYPE_CHECKING:
    from torch_geometric.data import Batch

Indices = NDArray[np.int64]
FIXED_ATOMS = ("free_only", "all")


class AtomicDataset(Dataset[AtomicData]):
    """Structures of a list or a prepared store, all of them or a part.

    Attributes:
        indices: ``(len,)`` int64 positions in the list or store.
    """

    def __init__(
        self,
        structures: Sequence[AtomicData] | Store,
        indices: Indices | Sequence[int] | None = None,
        *,
        fixed_atoms: str = "free_only",
        rotate: bool = False,
        seed: int = 0,
        code: int = -1,
    ) -> None:
        """Chooses structures.

        Args:
            structures: list or store.
            indices: positions of those that belong; default all.
            fixed_atoms: ``"free_only"`` keeps the flags of constrained atoms, which losses and metrics leave out;
                ``"all"`` clears them.
            rotate: turn each structure with its labels by a random rotation, determined by (seed, epoch, position).
            seed: of the rotations.
            code: value of ``AtomicData.dataset``, for sets that are mixed.

        Raises:
            ConfigError: an unknown ``fixed_atoms``.
            DataError: no structures.
        """
        check_choice("fixed_atoms", fixed_atoms, FIXED_ATOMS)
        self.indices = np.arange(len(structures)) if indices is None else np.asarray(indices, dtype=np.int64)
        if len(self.indices) == 0:
            raise DataError("data set: 0 structures; check the source, its filters and the split")
        self._structures = structures
        self._fixed_atoms, self._rotate, self._seed, self._code = fixed_atoms, rotate, seed, code

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> AtomicData:
        return self.structure(index)

    def structure(self, index: int, epoch: int = 0) -> AtomicData:
        """Returns one structure, turned as in that epoch."""
        position = int(self.indices[index])
        data = self._structures[position]
        if self._fixed_atoms == "all" and bool(data.fixed.any()):
            data = data.clone()
            data.fixed = torch.zeros_like(data.fixed)
        if self._rotate:
            data = rotate_structure(data, random_rotation(self._seed, epoch, position))
        if self._code >= 0:
            data = data.clone()
            data.dataset = torch.tensor([self._code])
        return data

    def batch(self, members: Sequence[int] | Indices, epoch: int = 0) -> Batch:
        """Returns ``collate`` of structures of one epoch; from a store they are joined without being made."""
        if not isinstance(self._structures, Store):
            return collate([self.structure(int(index), epoch) for index in members])
        positions = self.indices[np.asarray(members, dtype=np.int64)]
        batch = self._structures.batch(positions)
        if self._fixed_atoms == "all":
            batch.fixed = torch.zeros_like(batch.fixed)
        if self._code >= 0:
            batch.dataset = torch.full((len(positions),), self._code)
        if self._rotate:
            turns = [random_rotation(self._seed, epoch, position) for position in positions.tolist()]
            rotate_batch(batch, torch.stack(turns))
        return batch

    def __iter__(self) -> Iterator[AtomicData]:
        return (self[index] for index in range(len(self)))

    @cached_property
    def natoms(self) -> Indices:
        """``(len,)`` atoms of each structure."""
        if isinstance(self._structures, Store):
            return self._structures.natoms[self.indices].astype(np.int64)
        return np.array([self._structures[k].num_nodes for k in self.indices], dtype=np.int64)

    @cached_property
    def periodic(self) -> NDArray[np.bool_]:
        """``(len,)`` whether any axis is periodic."""
        if isinstance(self._structures, Store):
            return self._structures.index["periodic"][self.indices]
        return np.array([bool(self._structures[k].pbc.any()) for k in self.indices])

    @property
    def charges(self) -> NDArray[np.integer[Any]]:
        """``(len,)`` total charge of each structure, e."""
        if isinstance(self._structures, Store):
            return self._structures.charges()[self.indices]
        return np.array([int(self._structures[k].charge) for k in self.indices])

    @property
    def num_edges(self) -> Indices | None:
        """``(len,)`` directed pairs within 6 Å, where a store has counted them."""
        if isinstance(self._structures, Store):
            return self._structures.index["num_edges"][self.indices].astype(np.int64)
        return None

    @property
    def group_codes(self) -> tuple[list[str], NDArray[np.integer[Any]]]:
        """Names of groups, each once, and ``(len,)`` the position of each structure's among them.

        Those of a store are all of its groups, also where no structure of them is in this set.
        """
        if isinstance(self._structures, Store):
            return self._structures.groups, self._structures.index["group_codes"][self.indices]
        table: dict[str, int] = {}
        codes = [table.setdefault(str(self._structures[k].group), len(table)) for k in self.indices]
        return list(table), np.array(codes, dtype=np.int64)

    def random_keys(self, seed: int, name: str = "") -> NDArray[np.uint64]:
        """Returns ``(len,)`` pseudo-random numbers; see ``escaip.data.splits.random_keys``."""
        return random_keys(self.indices, seed, name)

    def structure_id(self, index: int) -> str:
        """Returns the name of one structure, without reading it where that can be avoided."""
        position = int(self.indices[index])
        if isinstance(self._structures, Store):
            return self._structures.structure_id(position)
        return str(self._structures[position].structure_id)

    def subset(self, indices: Indices | Sequence[int], *, rotate: bool = False) -> AtomicDataset:
        """Returns a part of this set, by positions in it."""
        chosen = self.indices[np.asarray(indices, dtype=np.int64)]
        how: dict[str, Any] = {"fixed_atoms": self._fixed_atoms, "seed": self._seed, "code": self._code}
        return AtomicDataset(self._structures, chosen, rotate=rotate, **how)

    def accumulate(self, sums: TrainingSums) -> None:
        """Adds these structures, not rotated, to sums for statistics; from the index of a store where it suffices."""
        if isinstance(self._structures, Store) and self._fixed_atoms == "free_only":
            sums.add_rows(self._structures, self.indices)
        else:
            for data in self.subset(range(len(self))):
                sums.add(data)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the structures chosen and their labels, for caches."""
        digest = hashlib.sha256(f"{self._fixed_atoms};".encode())
        if isinstance(self._structures, Store):
            digest.update(self._structures.fingerprint.encode() + self.indices.astype("<i8").tobytes())
        else:
            for data in (self._structures[k] for k in self.indices):
                for key in ("atomic_numbers", "positions", "cell", *TARGETS, "fixed"):
                    digest.update(data[key].numpy().tobytes())
        return digest.hexdigest()


class MixedDataset(Dataset[AtomicData]):
    """Sets one after the other, as one.

    Attributes:
        members: the sets by name.
        starts: ``(S + 1,)`` where each begins.
    """

    def __init__(self, members: Mapping[str, StructureSet]) -> None:
        """Joins sets by name."""
        self.members = dict(members)
        self.starts: list[int] = np.cumsum([0, *map(len, self.members.values())]).tolist()

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, index: int) -> AtomicData:
        member, local = self._locate(index)
        return member[local]

    def __iter__(self) -> Iterator[AtomicData]:
        return (data for member in self.members.values() for data in member)

    def batch(self, members: Sequence[int] | Indices, epoch: int = 0) -> Batch:
        """Returns one batch of structures of one epoch; those of one set stand together."""
        chosen = np.asarray(members, dtype=np.int64)
        code = np.searchsorted(self.starts, chosen, side="right") - 1
        pieces = [
            member.batch(chosen[code == number] - self.starts[number], epoch)
            for number, member in enumerate(self.members.values())
            if (code == number).any()
        ]
        return join_batches(pieces)

    @cached_property
    def natoms(self) -> Indices:
        """``(len,)`` atoms of each structure."""
        return np.concatenate([member.natoms for member in self.members.values()])

    @cached_property
    def periodic(self) -> NDArray[np.bool_]:
        """``(len,)`` whether any axis is periodic."""
        return np.concatenate([member.periodic for member in self.members.values()])

    @property
    def charges(self) -> NDArray[np.integer[Any]]:
        """``(len,)`` total charge of each structure, e."""
        return np.concatenate([member.charges for member in self.members.values()])

    @property
    def num_edges(self) -> Indices | None:
        """``(len,)`` directed pairs within 6 Å, where all sets have counted them."""
        counts = [count for member in self.members.values() if (count := member.num_edges) is not None]
        return np.concatenate(counts) if len(counts) == len(self.members) else None

    @property
    def group_codes(self) -> tuple[list[str], NDArray[np.integer[Any]]]:
        """Names of groups and each structure's position among them; groups of different sets are different."""
        names: list[str] = []
        codes = []
        for name, member in self.members.items():
            groups, of_member = member.group_codes
            codes.append(of_member.astype(np.int64) + len(names))
            names += [f"{name}/{group}" for group in groups]
        return names, np.concatenate(codes)

    def random_keys(self, seed: int, name: str = "") -> NDArray[np.uint64]:
        """Returns ``(len,)`` pseudo-random numbers; see ``escaip.data.splits.random_keys``."""
        return np.concatenate([member.random_keys(seed, each) for each, member in self.members.items()])

    def structure_id(self, index: int) -> str:
        """Returns the name of one structure."""
        member, local = self._locate(index)
        return member.structure_id(local)

    @property
    def fingerprint(self) -> str:
        """Hash of the structures chosen and their labels."""
        text = "".join(f"{name}:{member.fingerprint};" for name, member in self.members.items())
        return hashlib.sha256(text.encode()).hexdigest()

    def subset(self, indices: Indices | Sequence[int], *, rotate: bool = False) -> MixedDataset:
        """Returns a part of this set, by positions in it; members of which nothing is left are gone."""
        chosen = np.asarray(indices, dtype=np.int64)
        parts: dict[str, StructureSet] = {}
        for (name, member), (start, stop) in zip(self.members.items(), pairwise(self.starts), strict=True):
            local = chosen[(chosen >= start) & (chosen < stop)] - start
            if len(local):
                parts[name] = member.subset(local, rotate=rotate)
        return MixedDataset(parts)

    def accumulate(self, sums: TrainingSums) -> None:
        """Adds all structures to sums for statistics."""
        for member in self.members.values():
            member.accumulate(sums)

    def _locate(self, index: int) -> tuple[StructureSet, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} outside 0..{len(self) - 1}")
        number = int(np.searchsorted(self.starts, index, side="right")) - 1
        return list(self.members.values())[number], index - self.starts[number]


StructureSet = AtomicDataset | MixedDataset


def evenly(structures: Sequence[AtomicData], most: int) -> Iterator[AtomicData]:
    """Yields all structures, or of more than ``most`` so many, evenly spread from the first to the last."""
    count = len(structures)
    for index in torch.linspace(0, count - 1, min(count, most), dtype=torch.float64).round().long().tolist():
        yield structures[index]


def random_rotation(seed: int, epoch: int, index: int) -> Tensor:
    """Returns a ``(3, 3)`` float64 proper rotation, uniform over the group, from a normalised Gaussian quaternion."""
    quaternion = np.random.default_rng([seed, epoch, index, 0x517]).normal(size=4)
    w, x, y, z = (quaternion / np.linalg.norm(quaternion)).tolist()
    return torch.tensor(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ],
        dtype=torch.float64,
    )


def rotate_structure(data: AtomicData, rotation: Tensor) -> AtomicData:
    """Returns a copy turned by ``rotation``: positions, cell, and targets that are vectors or matrices."""
    turned = data.clone()
    turned.positions = data.positions @ rotation.T
    turned.cell = data.cell @ rotation.T
    for key, target in TARGETS.items():
        if target.shape == (3,):
            turned[key] = data[key] @ rotation.T
        elif target.shape == (3, 3):
            turned[key] = rotation @ data[key] @ rotation.T
    return turned


def rotate_batch(batch: Batch, rotations: Tensor) -> None:
    """Turns each structure of a batch by its ``rotations (B, 3, 3)``, in place of the batch's own tensors."""
    each = rotations[batch.batch]
    batch.positions = torch.einsum("nij,nj->ni", each, batch.positions)
    batch.cell = batch.cell @ rotations.mT
    for key, target in TARGETS.items():
        turns = each if target.per_atom else rotations
        if target.shape == (3,):
            batch[key] = torch.einsum("nij,nj->ni", turns, batch[key])
        elif target.shape == (3, 3):
            batch[key] = turns @ batch[key] @ turns.mT
