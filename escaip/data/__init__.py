"""Structures and labels: from files to batches."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# Name -> module: imported on first use, so that importing one of them does not import Lightning.
_PUBLIC = {
    "AtomicData": "escaip.data.structure",
    "collate": "escaip.data.structure",
    "LabelKeys": "escaip.data.structure",
    "Statistics": "escaip.data.statistics",
    "fit_statistics": "escaip.data.statistics",
    "Store": "escaip.data.store",
    "StoreWriter": "escaip.data.store_writer",
    "AtomicDataset": "escaip.data.dataset",
    "AtomicDataModule": "escaip.data.datamodule",
    "BudgetBatchSampler": "escaip.data.sampler",
    "open_source": "escaip.data.readers",
}

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


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'escaip.data' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
