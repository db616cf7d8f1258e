"""Molecular dynamics and relaxation with any ASE calculator."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# Name -> module: imported on first use, so that one of them does not import all of ASE.
_PUBLIC = {
    "CheckReport": "escaip.simulate.findings",
    "EnergyDrift": "escaip.simulate.analysis",
    "MDResult": "escaip.simulate.md",
    "MDSettings": "escaip.simulate.settings",
    "MDStatus": "escaip.simulate.md",
    "ProgressLine": "escaip.simulate.progress",
    "RelaxResult": "escaip.simulate.relaxation",
    "check_calculator": "escaip.simulate.check",
    "energy_drift": "escaip.simulate.analysis",
    "read_log": "escaip.simulate.outputs",
    "read_structure": "escaip.simulate.structures",
    "read_trajectory": "escaip.simulate.trajectory",
    "relax": "escaip.simulate.relaxation",
    "run_md": "escaip.simulate.md",
    "select_file": "escaip.simulate.selection",
    "select_frames": "escaip.simulate.selection",
    "write_structure": "escaip.simulate.structures",
}

__all__ = [
    "CheckReport",
    "EnergyDrift",
    "MDResult",
    "MDSettings",
    "MDStatus",
    "ProgressLine",
    "RelaxResult",
    "check_calculator",
    "energy_drift",
    "read_log",
    "read_structure",
    "read_trajectory",
    "relax",
    "run_md",
    "select_file",
    "select_frames",
    "write_structure",
]

if TYPE_CHECKING:
    from escaip.simulate.analysis import EnergyDrift, energy_drift
    from escaip.simulate.check import check_calculator
    from escaip.simulate.findings import CheckReport
    from escaip.simulate.md import MDResult, MDStatus, run_md
    from escaip.simulate.outputs import read_log
    from escaip.simulate.progress import ProgressLine
    from escaip.simulate.relaxation import RelaxResult, relax
    from escaip.simulate.selection import select_file, select_frames
    from escaip.simulate.settings import MDSettings
    from escaip.simulate.structures import read_structure, write_structure
    from escaip.simulate.trajectory import read_trajectory


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'escaip.simulate' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
