"""From a file to a folder: what ``escaip analyze`` calls."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from escaip.analysis.report import Analysis
from escaip.analysis.run import analyze
from escaip.analysis.settings import AnalysisSettings
from escaip.errors import DataError


def analyze_file(
    trajectory: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    plots: bool = True,
    progress: bool = False,
    **settings: Any,
) -> Analysis:
    """Analyses a trajectory; writes ``analysis.json`` and, for what was found, ``rdf.png``, ``msd.png``, ...

    Args:
        trajectory: see :func:`~escaip.simulate.read_trajectory`.
        out: folder, made when needed.
        plots: whether to draw.
        progress: show a bar.
        **settings: of :class:`~escaip.analysis.AnalysisSettings`.

    Raises:
        DataError: the trajectory cannot be used, or the folder cannot be written.
        UsageError: settings that are out of range or do not fit the trajectory.
    """
    analysis = analyze(trajectory, AnalysisSettings(**settings), progress=progress)
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        content = json.dumps(analysis.to_dict(), indent=1, ensure_ascii=False, allow_nan=False)
        _replace(folder / "analysis.json", content.encode())
        if plots:
            from escaip.analysis.plots import draw

            for name, image in draw(analysis).items():
                _replace(folder / f"{name}.png", image)
    except OSError as error:
        raise DataError(f"cannot write {folder}: {error.strerror or error}: choose another --out") from error
    return analysis


def _replace(path: Path, content: bytes) -> None:
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        aside.write_bytes(content)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
