"""A loader that knows how many batches the training loop has taken, and can start after them."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from escaip.data.dataset import StructureSet
from escaip.data.sampler import BudgetBatchSampler
from escaip.errors import DataError

if TYPE_CHECKING:
    from torch_geometric.data import Batch

START_METHODS = ("fork", "spawn", "forkserver")


class _Batches(Dataset["Batch"]):
    """Whole batches, by epoch and members, with candidate neighbors where a cutoff is given."""

    def __init__(self, structures: StructureSet, neighbor_cutoff: float | None) -> None:
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


class BatchLoader:
    """Iterates over the batches of an epoch; Lightning saves and restores its state with every checkpoint.

    It wraps a ``torch.utils.data.DataLoader`` rather than being one, so that Lightning neither replaces its
    sampler nor builds it anew. The epoch is read when the first batch is taken, after Lightning's ``set_epoch``.

    Attributes:
        dataset: the structures.
        batch_sampler: the batches.
    """

    def __init__(
        self,
        dataset: StructureSet,
        batch_sampler: BudgetBatchSampler,
        *,
        num_workers: int = 0,
        start_method: str | None = None,
        neighbor_cutoff: float | None = None,
        train_size: int | float | None = None,
    ) -> None:
        """Prepares to load.

        Args:
            dataset: the structures.
            batch_sampler: over their positions.
            num_workers: loader processes; 0 loads in this one.
            start_method: ``"fork"``, ``"spawn"`` or ``"forkserver"``; default the platform's.
            neighbor_cutoff: Å, attach candidate neighbors ``edge_index (2, E)``, ``edge_shift (E, 3)`` and
                ``edge_cutoff (B,)`` in the workers; None leaves the search to the model's device.
            train_size: part of a training set that the structures are; None for all of it. A state of another part
                is refused.
        """
        self.dataset, self.batch_sampler = dataset, batch_sampler
        self._train_size = train_size
        self._planned: list[tuple[int, NDArray[np.int64]]] = []  # epoch and members of the batches of the running epoch
        context = multiprocessing.get_context(start_method) if num_workers and start_method else None
        self._loader: DataLoader[Any] = DataLoader(
            _Batches(dataset, neighbor_cutoff),
            batch_size=None,
            sampler=self._planned,
            num_workers=num_workers,
            multiprocessing_context=context,
            persistent_workers=num_workers > 0,
            worker_init_fn=_ignore_interrupts,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator().manual_seed(0),  # its own: loading leaves the global generator alone
        )
        self._epoch = batch_sampler.epoch
        self._consumed = 0
        self._resume: tuple[int, int] | None = None

    @property
    def _iterator(self) -> Any:
        """Where Lightning looks for worker processes to end; left to the garbage collector, each may take 5 s."""
        return self._loader._iterator

    @_iterator.setter
    def _iterator(self, value: None) -> None:
        self._loader._iterator = value

    def __len__(self) -> int:
        """Batches per epoch, also when the epoch is resumed in its middle."""
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[Batch]:
        epoch = self.batch_sampler.epoch
        batches = self.batch_sampler.batches(epoch)
        resumed = 0
        if self._resume is not None and self._resume[0] == epoch and self._resume[1] < len(batches):
            resumed = self._resume[1]
        self._resume = None
        self._epoch, self._consumed = epoch, resumed
        self._planned[:] = [(epoch, batch) for batch in batches[resumed:]]
        for batch in self._loader:
            self._consumed += 1
            yield batch

    def state_dict(self) -> dict[str, int | float]:
        """Returns epoch, batches taken in it by the training loop, batches in all, and any ``train_size``."""
        state: dict[str, int | float] = {"epoch": self._epoch, "consumed": self._consumed, "num_batches": len(self)}
        return state if self._train_size is None else {**state, "train_size": self._train_size}

    def load_state_dict(self, state_dict: dict[str, int | float]) -> None:
        """Lets the next iteration of that epoch start after the batches already taken.

        A state from the end of an epoch fits any data set and number of processes, but no other part of a training set.

        Raises:
            DataError: the data set, split or budget has changed, so that the remaining batches are others; or the part
                of the training set, at any place in an epoch.
        """
        trained_on = state_dict.get("train_size")
        if trained_on != self._train_size:
            raise DataError(
                f"resume: this checkpoint was trained with data.train_size {_shown(trained_on)}, now it is "
                f"{_shown(self._train_size)}; use the same, or start a new run"
            )
        inside = 0 < state_dict["consumed"] < state_dict["num_batches"]
        if inside and state_dict["num_batches"] != len(self):
            raise DataError(
                f"resume: this checkpoint's epochs had {state_dict['num_batches']} batches, now there are {len(self)}; "
                "use the same data, split, budget and number of processes, or start from the weights alone"
            )
        self._epoch, self._consumed = int(state_dict["epoch"]), int(state_dict["consumed"])
        self._resume = (self._epoch, self._consumed)


def _ignore_interrupts(worker: int) -> None:
    """Lets the training finish its step after Ctrl-C, which a terminal sends to every process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _shown(train_size: int | float | None) -> str:
    return "null (all)" if train_size is None else str(train_size)
