"""Structures and labels: from files to batches."""

from __future__ import annotations

from typing import TYPE_CHECKING

from escaip.lazy import lazy_names

__all__ = [
    "AtomicData",
    "AtomicDataModule",
    "AtomicDataset",
    "BudgetBatchSampler",
    "LabelKeys",
    "Statistics",
    "Store",
    "StoreWriter",
    "collate",
    "fit_statistics",
    "open_source",
]

if TYPE_CHECKING:
    from escaip.data.datamodule import AtomicDataModule
    from escaip.data.dataset import AtomicDataset
    from escaip.data.readers import open_source
    from escaip.data.sampler import BudgetBatchSampler
    from escaip.data.statistics import Statistics, fit_statistics
    from escaip.data.store import Store
    from escaip.data.store_writer import StoreWriter
    from escaip.data.structure import AtomicData, LabelKeys, collate

__getattr__, __dir__ = lazy_names(__name__, {
    "datamodule": ("AtomicDataModule",), "dataset": ("AtomicDataset",), "readers": ("open_source",),
    "sampler": ("BudgetBatchSampler",), "statistics": ("Statistics", "fit_statistics"), "store": ("Store",),
    "store_writer": ("StoreWriter",), "structure": ("AtomicData", "LabelKeys", "collate"),
})  # fmt: skip
