"""What all properties share: checks and relaxation of the structure, tables, figures and files."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
from ase import Atoms
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from escaip.errors import ConfigError, DataError, SimulationError
from escaip.files import write_aside
from escaip.simulate.relaxation import relax

MODEL, MUTED, ACCENT = "#2a6f97", "#b0b0b0", "#c1121f"
RELAXATIONS = ("full", "ions", "none")


def check_calculator(atoms: Atoms) -> None:
    """Raises ConfigError for a structure without a calculator."""
    if atoms.calc is None:
        raise ConfigError("the structure has no calculator: set atoms.calc")


def check_crystal(atoms: Atoms, what: str) -> None:
    """Raises ConfigError unless a structure has a calculator and three periodic axes, and no constraint."""
    check_calculator(atoms)
    if not (atoms.pbc.all() and atoms.cell.rank == 3):
        raise ConfigError(f"{what} need a crystal with three periodic axes: set atoms.cell and atoms.pbc")
    if atoms.constraints:
        raise ConfigError(f"{what} need a crystal whose atoms may all move: remove the constraints")


def at_rest(atoms: Atoms, relaxation: str, fmax: float, steps: int, what: str = "the structure") -> Atoms:
    """Returns a relaxed copy with the same calculator.

    Args:
        atoms: structure with a calculator.
        relaxation: ``"full"`` (atoms and cell), ``"ions"`` or ``"none"``.
        fmax: largest force at the end, eV/Å.
        steps: largest number of steps.
        what: name of the structure in messages.

    Raises:
        ConfigError: an unknown ``relaxation``, or a setting out of range.
        SimulationError: the relaxation did not converge.
    """
    if relaxation not in RELAXATIONS:
        raise ConfigError(f"relaxation is {relaxation!r}: choose {', '.join(RELAXATIONS)}")
    if relaxation == "none":
        own = atoms.copy()
        own.calc = atoms.calc
        return own
    result = relax(atoms, fmax=fmax, steps=steps, cell=relaxation == "full")
    if not result.converged:
        raise SimulationError(
            f"{what} is not relaxed after {result.steps} steps (largest force {result.largest_force:.2g} of {fmax:g} "
            "eV/Å): start nearer to the minimum, or raise fmax or steps"
        )
    return result.atoms


def deformed(atoms: Atoms, deformation: np.ndarray) -> Atoms:
    """Returns a copy with the same calculator, its cell rows and positions times ``deformation (3, 3)``."""
    own = atoms.copy()
    own.set_cell(atoms.cell.array @ deformation, scale_atoms=True)
    own.calc = atoms.calc
    return own


def table(rows: Sequence[Sequence[str]]) -> str:
    """Aligns columns, the first to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows]
    return "\n".join("  ".join(row) for row in padded)


def new_figure(panels: int = 1, width: float = 5.2, height: float = 4.0) -> Figure:
    """Returns a figure outside of matplotlib's global state."""
    figure = Figure(figsize=(width * panels, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


Content = dict[str, Any] | Figure | list[Atoms] | Callable[[Path], object]


def write_results(folder: str | os.PathLike[str], files: Mapping[str, Content]) -> None:
    """Writes each file whole: a dict as JSON, a figure as PNG, structures as extended XYZ.

    Args:
        folder: made where needed.
        files: name to content; a function is given the path to write to.

    Raises:
        DataError: the folder cannot be written.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot write {folder}: {error.strerror or error}: choose another --out") from error
    for name, content in files.items():
        with write_aside(folder / name) as aside:
            if isinstance(content, dict):
                aside.write_text(json.dumps(_plain(content), indent=1, ensure_ascii=False, allow_nan=False) + "\n")
            elif isinstance(content, Figure):
                content.savefig(aside, format="png", dpi=150)
            elif isinstance(content, list):
                ase.io.write(aside, content, format="extxyz")
            else:
                content(aside)


def _plain(value: Any) -> Any:
    """Turns arrays into lists, structures into their numbers, NaN and infinity into None."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Atoms):
        return _plain({"symbols": list(value.symbols), "positions_A": value.positions, "cell_A": value.cell.array})
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
