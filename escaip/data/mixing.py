"""Several sets in one run: each with a name, references and a share of every epoch of its own."""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from escaip.data.dataset import AtomicDataset, EpochIndex
from escaip.data.sampler import Quota
from escaip.data.statistics import TrainingSums
from escaip.data.structure import AtomicData, join_batches
from escaip.errors import ConfigError, DataError

if TYPE_CHECKING:
    from torch_geometric.data import Batch


@dataclass(frozen=True)
class Sampling:
    """How much of an epoch each set makes.

    Attributes:
        weights: share of each set by name, in any unit; None for shares from ``temperature``.
        temperature: shares proportional to ``N^(1/temperature)`` for sets of ``N`` structures: 1 takes sets as large
            as they are, infinity all alike (Devlin et al., multilingual BERT; Conneau et al., arXiv 1911.02116).
        epoch_size: structures in an epoch; None for as many as there are.
    """

    weights: Mapping[str, float] | None = None
    temperature: float = 1.0
    epoch_size: int | None = None

    @classmethod
    def parse(cls, spec: Mapping[str, Any] | Sampling | None) -> Sampling:
        """Reads a mapping from a configuration.

        Raises:
            ConfigError: an unknown key or an impossible value.
        """
        if isinstance(spec, Sampling):
            return spec
        known = [item.name for item in fields(cls)]
        for key in spec or {}:
            if key not in known:
                raise ConfigError(f"sampling: unknown setting {key!r}; use {', '.join(known)}")
        settings = cls(**dict(spec or {}))
        if settings.weights is not None and any(not weight > 0 for weight in settings.weights.values()):
            raise ConfigError(f"sampling: weights: {dict(settings.weights)} must be positive; leave a set out instead")
        if not settings.temperature > 0:
            raise ConfigError(f"sampling: temperature: {settings.temperature} is not a positive number")
        if settings.epoch_size is not None and settings.epoch_size < 1:
            raise ConfigError(f"sampling: epoch_size: {settings.epoch_size} is not a positive number")
        return settings

    def check(self, names: Sequence[str]) -> None:
        """Refuses weights for other sets than there are.

        Raises:
            ConfigError: a set without a weight, or a weight without a set.
        """
        if self.weights is not None and set(self.weights) != set(names):
            raise ConfigError(f"sampling: weights name {', '.join(self.weights)}, but the sets are {', '.join(names)}")

    def draws(self, sizes: Mapping[str, int]) -> dict[str, int] | None:
        """Structures of each set in an epoch; None when an epoch is simply every structure once.

        Raises:
            ConfigError: weights for other sets than there are.
        """
        if self.weights is None and self.temperature == 1.0 and self.epoch_size is None:
            return None
        self.check(list(sizes))
        if self.weights is not None:
            shares = np.array([self.weights[name] for name in sizes])
        else:
            shares = np.array([float(size) for size in sizes.values()]) ** (1.0 / self.temperature)
        total = self.epoch_size or sum(sizes.values())
        counts = np.maximum(1, np.round(total * shares / shares.sum())).astype(int)
        return dict(zip(sizes, counts.tolist(), strict=True))


@dataclass(frozen=True)
class MixedDataset(Dataset[AtomicData]):
    """Sets one after the other, as one.

    Attributes:
        members: the sets by name.
        starts: ``(S + 1,)`` where each begins.
    """

    members: Mapping[str, StructureSet]
    starts: list[int] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "starts", np.cumsum([0, *map(len, self.members.values())]).tolist())

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, item: int | EpochIndex) -> AtomicData:
        index, epoch = (item.index, item.epoch) if isinstance(item, EpochIndex) else (item, 0)
        member, local = self._locate(index)
        return member[EpochIndex(local, epoch)]

    def __iter__(self) -> Iterator[AtomicData]:
        return (data for member in self.members.values() for data in member)

    def batch(self, members: Sequence[int] | NDArray[np.int64], epoch: int = 0) -> Batch:
        """See :meth:`AtomicDataset.batch`; structures of one set stand together."""
        chosen = np.asarray(members, dtype=np.int64)
        code = np.searchsorted(self.starts, chosen, side="right") - 1
        pieces = [
            member.batch(chosen[code == number] - self.starts[number], epoch)
            for number, member in enumerate(self.members.values())
            if (code == number).any()
        ]
        return join_batches(pieces)

    @cached_property
    def natoms(self) -> NDArray[np.int64]:
        """``(len,)`` atoms of each structure."""
        return np.concatenate([member.natoms for member in self.members.values()])

    @cached_property
    def periodic(self) -> NDArray[np.bool_]:
        """``(len,)`` whether any axis is periodic."""
        return np.concatenate([member.periodic for member in self.members.values()])

    @property
    def num_edges(self) -> NDArray[np.int64] | None:
        """``(len,)`` directed pairs within 6 Å, where all sets have counted them."""
        counts = [member.num_edges for member in self.members.values()]
        return None if any(count is None for count in counts) else np.concatenate(counts)  # type: ignore[arg-type]

    @property
    def groups(self) -> list[str]:
        """Group of each structure; groups of different sets are different."""
        return [f"{name}/{group}" for name, member in self.members.items() for group in member.groups]

    @property
    def group_codes(self) -> tuple[list[str], NDArray[np.integer[Any]]]:
        """See :attr:`AtomicDataset.group_codes`; groups of different sets are different."""
        names: list[str] = []
        codes = []
        for name, member in self.members.items():
            groups, of_member = member.group_codes
            codes.append(of_member.astype(np.int64) + len(names))
            names += [f"{name}/{group}" for group in groups]
        return names, np.concatenate(codes)

    def structure_id(self, index: int) -> str:
        """Name of one structure."""
        member, local = self._locate(index)
        return member.structure_id(local)

    @property
    def fingerprint(self) -> str:
        """Hash of the structures chosen and their labels."""
        text = "".join(f"{name}:{member.fingerprint};" for name, member in self.members.items())
        return hashlib.sha256(text.encode()).hexdigest()

    def quotas(self, sampling: Sampling) -> list[Quota] | None:
        """What an epoch draws of each set; None when it is every structure once."""
        draws = sampling.draws({name: len(member) for name, member in self.members.items()})
        if draws is None:
            return None
        spans = pairwise(self.starts)
        return [Quota(start, stop, draws[name]) for name, (start, stop) in zip(self.members, spans, strict=True)]

    def subset(self, indices: NDArray[np.int64] | Sequence[int], *, rotate: bool = False) -> MixedDataset:
        """Part of this set, by positions in it; members of which nothing is left are gone."""
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
        number = bisect.bisect_right(self.starts, index) - 1
        return list(self.members.values())[number], index - self.starts[number]


StructureSet = AtomicDataset | MixedDataset


def check_poolable(levels: Mapping[str, str]) -> None:
    """Refuses to pool stores of different levels of theory, whose energies have different zeros.

    Args:
        levels: level of theory by name; an empty one is unknown and stops nothing.

    Raises:
        DataError: two that differ.
    """
    known = {name: level for name, level in levels.items() if level}
    if len(set(known.values())) > 1:
        text = ", ".join(f"{name} ({level})" for name, level in known.items())
        raise DataError(
            f"{text}: energies of different levels of theory need references of their own; name the sets "
            "(data.train: {A: {path: ...}, B: {path: ...}}) instead of listing them"
        )
