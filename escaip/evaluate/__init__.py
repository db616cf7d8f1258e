"""Errors of a potential on labelled data: numbers, tables, plots."""

from __future__ import annotations

from typing import TYPE_CHECKING

from escaip.lazy import lazy_names

__all__ = ["EvaluationReport", "Records", "evaluate", "evaluate_into"]

if TYPE_CHECKING:
    from escaip.evaluate.report import EvaluationReport, Records
    from escaip.evaluate.run import evaluate, evaluate_into

__getattr__, __dir__ = lazy_names(
    __name__, {"report": ("EvaluationReport", "Records"), "run": ("evaluate", "evaluate_into")}
)
