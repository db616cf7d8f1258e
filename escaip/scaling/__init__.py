"""Scaling-law studies: which runs, their cost, and the laws they obey."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# Name -> module: imported on first use, so that reading records does not import SciPy.
_PUBLIC = {
    "FitSettings": "laws",
    "Interval": "laws",
    "LawFit": "laws",
    "Record": "study",
    "StudyFit": "fits",
    "fit_isoflop": "fits",
    "fit_law": "laws",
    "fit_study": "fits",
    "lack_of_fit": "laws",
    "read_records": "study",
}
__all__ = [
    "FitSettings", "Interval", "LawFit", "Record", "StudyFit", "fit_isoflop", "fit_law", "fit_study", "lack_of_fit",
    "read_records",
]  # fmt: skip

if TYPE_CHECKING:
    from escaip.scaling.fits import StudyFit, fit_isoflop, fit_study
    from escaip.scaling.laws import FitSettings, Interval, LawFit, fit_law, lack_of_fit
    from escaip.scaling.study import Record, read_records


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"escaip.scaling.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module 'escaip.scaling' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
