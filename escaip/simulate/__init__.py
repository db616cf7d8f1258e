"""Molecular dynamics, relaxation, checks and analysis with any ASE calculator."""

from __future__ import annotations

from typing import TYPE_CHECKING

from escaip.lazy import lazy_names

if TYPE_CHECKING:
    from escaip.simulate.analysis import EnergyDrift, energy_drift, radial_distribution
    from escaip.simulate.check import CheckReport, check_calculator
    from escaip.simulate.ensembles import MDSettings, default_timestep
    from escaip.simulate.md import MDResult, MDStatus, ProgressLine, run_md
    from escaip.simulate.output import read_log, read_structure, read_trajectory, write_structure
    from escaip.simulate.relaxation import RelaxResult, relax, relax_all
    from escaip.simulate.report import AnalysisSettings, analyze
    from escaip.simulate.select import select_file, select_frames

__all__ = [
    "AnalysisSettings", "CheckReport", "EnergyDrift", "MDResult", "MDSettings", "MDStatus", "ProgressLine",
    "RelaxResult", "analyze", "check_calculator", "default_timestep", "energy_drift", "radial_distribution", "read_log",
    "read_structure", "read_trajectory", "relax", "relax_all", "run_md", "select_file", "select_frames",
    "write_structure",
]  # fmt: skip

__getattr__, __dir__ = lazy_names(__name__, {
    "analysis": ("EnergyDrift", "energy_drift", "radial_distribution"),
    "check": ("CheckReport", "check_calculator"),
    "ensembles": ("MDSettings", "default_timestep"),
    "md": ("MDResult", "MDStatus", "ProgressLine", "run_md"),
    "output": ("read_log", "read_structure", "read_trajectory", "write_structure"),
    "relaxation": ("RelaxResult", "relax", "relax_all"),
    "report": ("AnalysisSettings", "analyze"),
    "select": ("select_file", "select_frames"),
})  # fmt: skip
