"""Training: losses, metrics, schedule, averaged weights, checkpoints and the Lightning module."""

from __future__ import annotations

from typing import TYPE_CHECKING

from escaip.lazy import lazy_names

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

__getattr__, __dir__ = lazy_names(__name__, {
    "callbacks": ("BestAndLast", "RunReport"), "ema": ("WeightEMA",), "module": ("PotentialModule",),
    "losses": ("ForceTerm", "LossSettings", "LossTerm"), "metrics": ("ErrorMetrics",),
})  # fmt: skip
