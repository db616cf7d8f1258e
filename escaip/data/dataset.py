"""Structures by position, with what is done to them on the way into a batch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from escaip.data.gather import gather_batch
from escaip.data.statistics import TrainingSums
from escaip.data.store import Store
from escaip.data.structure import AtomicData, collate
from escaip.errors import ConfigError, DataError

if TYPE_CHECKING:
    from torch_geometric.data import Batch

    from escaip.data.mixing import StructureSet

FIXED_ATOMS = ("free_only", "all")


@dataclass(frozen=True)
class EpochIndex:
    """Position of a structure together with the epoch, on which its augmentation depends."""

    index: int
    epoch: int


class AtomicDataset(Dataset[AtomicData]):
    """Structures of a list or a prepared store, all of them or a part.

    Attributes:
        indices: ``(len,)`` int64 positions in the list or store.
    """

    def __init__(
        self,
        structures: Sequence[AtomicData] | Store,
        indices: NDArray[np.int64] | Sequence[int] | None = None,
        *,
        fixed_atoms: str = "free_only",
        rotate: bool = False,
        seed: int = 0,
        code: int = -1,
    ) -> None:
        """Chooses structures.

        Args:
            structures: where they are.
            indices: positions of those that belong; default all.
            fixed_atoms: ``"free_only"`` keeps the flags of constrained atoms, which losses and metrics leave out;
                ``"all"`` clears them.
            rotate: turn each structure with its labels by a random rotation, determined by (seed, epoch, position).
            seed: of the rotations.
            code: what :attr:`AtomicData.dataset` says, for sets that are mixed.

        Raises:
            ConfigError: an unknown ``fixed_atoms``.
            DataError: no structures.
        """
        if fixed_atoms not in FIXED_ATOMS:
            raise ConfigError(f"fixed_atoms: {fixed_atoms!r} is not one of {', '.join(FIXED_ATOMS)}")
        self.indices = np.arange(len(structures)) if indices is None else np.asarray(indices, dtype=np.int64)
        if len(self.indices) == 0:
            raise DataError("data set: 0 structures; check the source, its filters and the split")
        self._structures = structures
        self._fixed_atoms, self._rotate, self._seed, self._code = fixed_atoms, rotate, seed, code

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, item: int | EpochIndex) -> AtomicData:
        index, epoch = (item.index, item.epoch) if isinstance(item, EpochIndex) else (item, 0)
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

    def batch(self, members: Sequence[int] | NDArray[np.int64], epoch: int = 0) -> Batch:
        """``collate`` of structures of one epoch, without making the structures where they come from a store."""
        if not isinstance(self._structures, Store):
            return collate([self[EpochIndex(int(index), epoch)] for index in members])
        positions = self.indices[np.asarray(members, dtype=np.int64)]
        batch = gather_batch(self._structures, positions)
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
    def natoms(self) -> NDArray[np.int64]:
        """``(len,)`` atoms of each structure."""
        if isinstance(self._structures, Store):
            return self._structures.natoms[self.indices].astype(np.int64)
        return np.array([self._structures[k].num_nodes for k in self.indices], dtype=np.int64)

    @cached_property
    def periodic(self) -> NDArray[np.bool_]:
        """``(len,)`` whether any axis is periodic."""
        if isinstance(self._structures, Store):
            return self._structures.periodic[self.indices]
        return np.array([bool(self._structures[k].pbc.any()) for k in self.indices])

    @property
    def num_edges(self) -> NDArray[np.int64] | None:
        """``(len,)`` directed pairs within 6 Å, where a store has counted them."""
        if isinstance(self._structures, Store):
            return self._structures.index["num_edges"][self.indices].astype(np.int64)
        return None

    @cached_property
    def groups(self) -> list[str]:
        """Group of each structure."""
        names, codes = self.group_codes
        return [names[code] for code in codes.tolist()]

    @property
    def group_codes(self) -> tuple[list[str], NDArray[np.integer[Any]]]:
        """Names of groups, each once, and ``(len,)`` the position of each structure's among them.

        Those of a store are all of its groups, also where no structure of them is in this set.
        """
        if isinstance(self._structures, Store):
            return self._structures.groups, self._structures.group_codes[self.indices]
        table: dict[str, int] = {}
        codes = [table.setdefault(str(self._structures[k].group), len(table)) for k in self.indices]
        return list(table), np.array(codes, dtype=np.int64)

    def structure_id(self, index: int) -> str:
        """Name of one structure, without reading it where that can be avoided."""
        position = int(self.indices[index])
        if isinstance(self._structures, Store):
            return self._structures.structure_id(position)
        return str(self._structures[position].structure_id)

    def subset(self, indices: NDArray[np.int64] | Sequence[int], *, rotate: bool = False) -> AtomicDataset:
        """Part of this set, by positions in it."""
        chosen = self.indices[np.asarray(indices, dtype=np.int64)]
        return AtomicDataset(
            self._structures,
            chosen,
            fixed_atoms=self._fixed_atoms,
            rotate=rotate,
            seed=self._seed,
            code=self._code,
        )

    def accumulate(self, sums: TrainingSums) -> None:
        """Adds these structures to sums for statistics; from the index of a store where it answers the question."""
        if isinstance(self._structures, Store) and self._fixed_atoms == "free_only":
            sums.add_rows(self._structures.index, self.indices)
        else:
            for data in self.subset(range(len(self))):
                sums.add(data)

    @property
    def store_path(self) -> Path | None:
        """The prepared store behind this set, if there is one."""
        return self._structures.path if isinstance(self._structures, Store) else None

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the structures chosen and their labels, for caches."""
        digest = hashlib.sha256(f"{self._fixed_atoms};".encode())
        if isinstance(self._structures, Store):
            digest.update(self._structures.fingerprint.encode() + self.indices.astype("<i8").tobytes())
        else:
            for data in (self._structures[k] for k in self.indices):
                for key in ("atomic_numbers", "positions", "cell", "energy", "forces", "stress", "fixed"):
                    digest.update(data[key].numpy().tobytes())
        return digest.hexdigest()


class BatchDataset(Dataset["Batch"]):
    """Whole batches, by epoch and members: what a loader's worker makes.

    Args:
        structures: the structures.
        neighbor_cutoff: Å, attach candidate neighbors ``edge_index (2, E)``, ``edge_shift (E, 3)`` and
            ``edge_cutoff (B,)``; None leaves the search to the model's device.
    """

    def __init__(self, structures: StructureSet, neighbor_cutoff: float | None = None) -> None:
        self._structures, self._neighbor_cutoff = structures, neighbor_cutoff

    def __getitem__(self, item: tuple[int, NDArray[np.int64]]) -> Batch:
        epoch, members = item
        batch = self._structures.batch(members, epoch)
        if self._neighbor_cutoff is not None:
            from escaip.graph import neighbor_list

            neighbors = neighbor_list(batch, self._neighbor_cutoff)
            batch.edge_index = torch.stack([neighbors.center, neighbors.neighbor])
            batch.edge_shift = neighbors.shift
            batch.edge_cutoff = torch.full((len(members),), neighbors.cutoff, dtype=torch.float64)
        return batch


def random_rotation(seed: int, epoch: int, index: int) -> Tensor:
    """``(3, 3)`` float64 proper rotation, uniform over the group, from a normalised Gaussian quaternion."""
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
    """A copy turned by ``rotation``: positions, cell, forces and stress; the original is not changed."""
    turned = data.clone()
    turned.positions = data.positions @ rotation.T
    turned.cell = data.cell @ rotation.T
    turned.forces = data.forces @ rotation.T
    turned.stress = rotation @ data.stress @ rotation.T
    return turned


def rotate_batch(batch: Batch, rotations: Tensor) -> None:
    """Turns each structure of a batch by its ``rotations (B, 3, 3)``, in place of the batch's own tensors."""
    each = rotations[batch.batch]
    for key in ("positions", "forces"):
        batch[key] = torch.einsum("nij,nj->ni", each, batch[key])
    batch.cell = batch.cell @ rotations.mT
    batch.stress = rotations @ batch.stress @ rotations.mT
