"""Scaling laws of a study's runs, with intervals and what speaks against them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# Name -> module: imported on first use, so that reading records does not import SciPy.
_PUBLIC = {
    "Difference": "escaip.scaling.compare",
    "FitSettings": "escaip.scaling.laws",
    "Interval": "escaip.scaling.laws",
    "IsoFlop": "escaip.scaling.isoflop",
    "LackOfFit": "escaip.scaling.checks",
    "LawFit": "escaip.scaling.laws",
    "LeftOut": "escaip.scaling.checks",
    "Record": "escaip.scaling.records",
    "StudyFit": "escaip.scaling.summary",
    "fit_isoflop": "escaip.scaling.isoflop",
    "fit_joint": "escaip.scaling.laws",
    "fit_power": "escaip.scaling.laws",
    "fit_study": "escaip.scaling.summary",
    "lack_of_fit": "escaip.scaling.checks",
    "leave_largest_out": "escaip.scaling.checks",
    "read_records": "escaip.scaling.records",
}

__all__ = [
    "Difference",
    "FitSettings",
    "Interval",
    "IsoFlop",
    "LackOfFit",
    "LawFit",
    "LeftOut",
    "Record",
    "StudyFit",
    "fit_isoflop",
    "fit_joint",
    "fit_power",
    "fit_study",
    "lack_of_fit",
    "leave_largest_out",
    "read_records",
]

if TYPE_CHECKING:
    from escaip.scaling.checks import LackOfFit, LeftOut, lack_of_fit, leave_largest_out
    from escaip.scaling.compare import Difference
    from escaip.scaling.isoflop import IsoFlop, fit_isoflop
    from escaip.scaling.laws import FitSettings, Interval, LawFit, fit_joint, fit_power
    from escaip.scaling.records import Record, read_records
    from escaip.scaling.summary import StudyFit, fit_study


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'escaip.scaling' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
