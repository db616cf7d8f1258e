"""Errors of a potential on labelled data: numbers, tables, plots."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# Name -> module: imported on first use, so that numbers do not import plots.
_PUBLIC = {
    "EvaluationReport": "escaip.evaluate.report",
    "Records": "escaip.evaluate.report",
    "evaluate": "escaip.evaluate.run",
    "evaluate_into": "escaip.evaluate.run",
}

__all__ = ["EvaluationReport", "Records", "evaluate", "evaluate_into"]

if TYPE_CHECKING:
    from escaip.evaluate.report import EvaluationReport, Records
    from escaip.evaluate.run import evaluate, evaluate_into


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'escaip.evaluate' has no attribute {name!r}")
