"""What a trajectory says: structure, diffusion, vibrations, averages, with errors and plots."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# Name -> module: imported on first use, so that numbers do not import plots.
_PUBLIC = {
    "Analysis": "escaip.analysis.report",
    "AnalysisSettings": "escaip.analysis.settings",
    "Average": "escaip.analysis.averages",
    "Diffusion": "escaip.analysis.transport",
    "RadialDistribution": "escaip.analysis.radial",
    "Transport": "escaip.analysis.transport",
    "Unwrapper": "escaip.analysis.frames",
    "Vibrations": "escaip.analysis.spectra",
    "analyze": "escaip.analysis.run",
    "analyze_file": "escaip.analysis.command",
    "mean_square_displacement": "escaip.analysis.transport",
    "radial_distribution": "escaip.analysis.radial",
    "vibrations": "escaip.analysis.spectra",
}

__all__ = [
    "Analysis",
    "AnalysisSettings",
    "Average",
    "Diffusion",
    "RadialDistribution",
    "Transport",
    "Unwrapper",
    "Vibrations",
    "analyze",
    "analyze_file",
    "mean_square_displacement",
    "radial_distribution",
    "vibrations",
]

if TYPE_CHECKING:
    from escaip.analysis.averages import Average
    from escaip.analysis.command import analyze_file
    from escaip.analysis.frames import Unwrapper
    from escaip.analysis.radial import RadialDistribution, radial_distribution
    from escaip.analysis.report import Analysis
    from escaip.analysis.run import analyze
    from escaip.analysis.settings import AnalysisSettings
    from escaip.analysis.spectra import Vibrations, vibrations
    from escaip.analysis.transport import Diffusion, Transport, mean_square_displacement


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'escaip.analysis' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
