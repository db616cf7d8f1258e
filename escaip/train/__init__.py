"""Training: losses, metrics, schedule, averaged weights, checkpoints and the Lightning module."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# Name -> module: imported on first use, so that importing the losses does not import Lightning.
_PUBLIC = {
    "BestAndLast": "escaip.train.callbacks",
    "ErrorMetrics": "escaip.train.metrics",
    "RunReport": "escaip.train.callbacks",
    "ForceTerm": "escaip.train.losses",
    "LossSettings": "escaip.train.losses",
    "LossTerm": "escaip.train.losses",
    "PotentialModule": "escaip.train.module",
    "WeightEMA": "escaip.train.ema",
}

__all__ = [
    "BestAndLast",
    "ErrorMetrics",
    "ForceTerm",
    "LossSettings",
    "LossTerm",
    "PotentialModule",
    "RunReport",
    "WeightEMA",
]

if TYPE_CHECKING:
    from escaip.train.callbacks import BestAndLast, RunReport
    from escaip.train.ema import WeightEMA
    from escaip.train.losses import ForceTerm, LossSettings, LossTerm
    from escaip.train.metrics import ErrorMetrics
    from escaip.train.module import PotentialModule


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'escaip.train' has no attribute {name!r}")
