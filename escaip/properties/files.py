"""What results are written with: a table for people, JSON, PNG, each written aside and renamed."""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
from ase import Atoms
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from escaip.errors import DataError

MODEL, MUTED = "#2a6f97", "#b0b0b0"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows with columns of one width each; the first to the left, others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows]
    return "\n".join("  ".join(row) for row in padded)


def new_figure(panels: int = 1, width: float = 5.2, height: float = 4.0) -> Figure:
    """A figure apart from matplotlib's global state."""
    figure = Figure(figsize=(width * panels, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def write_results(folder: str | os.PathLike[str], files: dict[str, Any]) -> None:
    """Writes each value under its name: a dict as JSON, a figure as PNG, structures as extended XYZ.

    Args:
        folder: made when needed.
        files: name to content; a function is given the path to write to.

    Raises:
        DataError: the folder cannot be written.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            path = folder / name
            aside = path.with_name(f".{path.name}.{os.getpid()}.part")
            try:
                _write(aside, content)
                os.replace(aside, path)
            finally:
                aside.unlink(missing_ok=True)
    except OSError as error:
        raise DataError(f"cannot write {folder}: {error.strerror or error}: choose another --out") from error


def _write(path: Path, content: Any) -> None:
    if isinstance(content, dict):
        path.write_text(json.dumps(plain(content), indent=1, ensure_ascii=False, allow_nan=False) + "\n", "utf-8")
    elif isinstance(content, Figure):
        buffer = io.BytesIO()
        content.savefig(buffer, format="png", dpi=150)
        path.write_bytes(buffer.getvalue())
    elif isinstance(content, Callable):  # type: ignore[arg-type]
        content(path)
    else:
        ase.io.write(path, content, format="extxyz")


def plain(value: Any) -> Any:
    """What JSON can hold: arrays as lists, structures as their numbers, NaN and infinity as null."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, Atoms):
        return plain({"symbols": list(value.symbols), "positions_A": value.positions, "cell_A": value.cell.array})
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, np.bool_ | np.integer | np.floating):
        return plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
