"""From files to files: what ``escaip md`` and ``escaip relax`` call."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ase import Atoms
from ase.calculators.calculator import BaseCalculator

from escaip.errors import SimulationError
from escaip.simulate.md import MDResult, run_md
from escaip.simulate.outputs import freeze
from escaip.simulate.progress import ProgressLine
from escaip.simulate.relaxation import RelaxResult, relax
from escaip.simulate.settings import MDSettings
from escaip.simulate.structures import read_structure, write_structure

if TYPE_CHECKING:
    from escaip.simulate.findings import CheckReport


def md_file(
    model: str | os.PathLike[str],
    structure: str | os.PathLike[str],
    *,
    frame: int = -1,
    out: str | os.PathLike[str] = "md.extxyz",
    resume: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
    device: str = "auto",
    dtype: str | None = None,
    dataset: str | None = None,
    precision: str | None = None,
    compile: bool = False,
    graph_skin: float = 0.0,
    cuda_graphs: bool = False,
    committee: Sequence[str | os.PathLike[str]] = (),
    d3: str | None = None,
    d3_damping: str = "bj",
    **settings: Any,
) -> MDResult:
    """Runs molecular dynamics of a structure file with a model file.

    ``device`` to ``d3_damping`` as in :func:`make_calculator`, ``settings`` as in :class:`MDSettings`.

    Raises:
        EscaipError: see :func:`~escaip.simulate.run_md`, :func:`~escaip.simulate.read_structure` and
            :class:`~escaip.EScAIPCalculator`.
    """
    checked = MDSettings(**settings)  # before the model is loaded: a mistyped number should cost no time
    atoms = _load(
        model, structure, frame, device=device, dtype=dtype, dataset=dataset, precision=precision, compile=compile,
        graph_skin=graph_skin, cuda_graphs=cuda_graphs, committee=committee, d3=d3, d3_damping=d3_damping,
    )  # fmt: skip
    report = None if quiet else ProgressLine()
    return run_md(atoms, checked, out=out, resume=resume, overwrite=overwrite, report=report)


def relax_file(
    model: str | os.PathLike[str],
    structure: str | os.PathLike[str],
    *,
    frame: int = -1,
    out: str | os.PathLike[str] | None = None,
    device: str = "auto",
    dtype: str | None = None,
    dataset: str | None = None,
    precision: str | None = None,
    compile: bool = False,
    committee: Sequence[str | os.PathLike[str]] = (),
    d3: str | None = None,
    d3_damping: str = "bj",
    **settings: Any,
) -> tuple[RelaxResult, Path]:
    """Relaxes a structure file with a model file; ``settings`` as in :func:`~escaip.simulate.relax`.

    Returns:
        The result and the file it was written to.

    Raises:
        SimulationError: not converged; the structure reached is written all the same, and named.
        EscaipError: as in :func:`md_file`.
    """
    atoms = _load(
        model, structure, frame, device=device, dtype=dtype, dataset=dataset, precision=precision, compile=compile,
        committee=committee, d3=d3, d3_damping=d3_damping,
    )  # fmt: skip
    path = Path(out) if out is not None else Path(f"{Path(structure).stem}.relaxed.extxyz")
    result = relax(atoms, **settings)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_structure(path, freeze(result.atoms))
    if not result.converged:
        raise SimulationError(
            f"not converged after {result.steps} steps (largest force {result.largest_force:.4f} eV/Å): the structure "
            f"reached is in {path}: raise --steps, or try --optimizer fire"
        )
    return result, path


def check_file(
    model: str | os.PathLike[str],
    structure: str | os.PathLike[str],
    *,
    frame: int = -1,
    seed: int = 0,
    temperature: float | None = None,
    **options: Any,
) -> CheckReport:
    """Compares a model with what physics demands of it, see :func:`~escaip.simulate.check_calculator`.

    ``options`` as in :func:`make_calculator`.

    Raises:
        EscaipError: as in :func:`md_file`.
    """
    from escaip.simulate.check import check_calculator

    atoms = _load(model, structure, frame, **options)
    return check_calculator(atoms.calc, atoms, seed=seed, temperature=temperature)


def make_calculator(
    model: str | os.PathLike[str],
    *,
    committee: Sequence[str | os.PathLike[str]] = (),
    d3: str | None = None,
    d3_damping: str = "bj",
    **options: Any,
) -> BaseCalculator:
    """The calculator of a model file.

    Args:
        model: ``.ckpt`` or ``.escaip`` file.
        committee: further members beside it.
        d3: functional whose D3 dispersion is added.
        d3_damping: see :func:`~escaip.calculators.with_dispersion`.
        options: as in :class:`~escaip.EScAIPCalculator`.

    Raises:
        EscaipError: see there.
    """
    from escaip.calculators import CommitteeCalculator, EScAIPCalculator, with_dispersion

    if committee:
        made: BaseCalculator = CommitteeCalculator([model, *committee], **options)
    else:
        made = EScAIPCalculator(model, **options)
    return made if d3 is None else with_dispersion(made, d3, d3_damping)


def _load(model: str | os.PathLike[str], structure: str | os.PathLike[str], frame: int, **options: Any) -> Atoms:
    atoms = read_structure(structure, frame)
    atoms.calc = make_calculator(model, **options)
    return atoms
