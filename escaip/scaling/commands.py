"""The ``escaip scaling`` commands."""

from __future__ import annotations

from typing import Any

from typing_extensions import TypedDict, Unpack


class _FitOptions(TypedDict, total=False):
    """How laws are fitted.

    Args:
        metric: error that is fitted, by its name in the records (default: forces_mae)
        huber: δ of the Huber loss in log L; 1 or more is least squares (default: 0.001)
        bootstrap: refits for the intervals (default: 1000)
        level: probability of the intervals (default: 0.9)
        seed: seed of the refits (default: 0)
        no_floor: fix the irreducible error E at 0
    """

    metric: str
    huber: float
    bootstrap: int
    level: float
    seed: int
    no_floor: bool


def run(
    config: str, *, out: str, set: list[str] | None = None, workers: int = 1, slurm: list[str] | None = None
) -> None:
    """Runs the trainings of a study; the same command again goes on where it was stopped.

    Args:
        config: which runs: a file, or a recipe of configs/scaling by name
        out: folder of the study
        set: settings of every run over those of CONFIG, such as data.train=train.xyz
        workers: runs at once on this machine
        slurm: submit the runs as a SLURM array with these options, such as gres=gpu:1 time=4:00:00

    Example: escaip scaling run smoke --out studies/smoke
    """
    from escaip.scaling.run import run_study

    if run_study(config, out, changes=set or [], workers=workers, slurm=slurm):
        print(f"complete: escaip scaling plot {out}")


def fit(folder: str, **options: Unpack[_FitOptions]) -> None:
    """Fits scaling laws to the finished runs of a study and writes fit.json.

    Args:
        folder: folder of the study

    Example: escaip scaling fit studies/smoke
    """
    study = _fitted(folder, options)
    from escaip.scaling.report import markdown, write_fit

    print(f"{markdown(study)}\n\nwrote {write_fit(study, folder)}")


def plot(folder: str, **options: Unpack[_FitOptions]) -> None:
    """Fits the laws and writes them as a sheet of plots and a report.

    Args:
        folder: folder of the study

    Example: escaip scaling plot studies/smoke
    """
    study = _fitted(folder, options)
    from escaip.scaling.report import write_report

    print("wrote " + ", ".join(map(str, write_report(study, folder))))


def _fitted(folder: str, options: _FitOptions) -> Any:
    from escaip.scaling.fits import fit_study
    from escaip.scaling.laws import FitSettings

    given: dict[str, Any] = {**options}
    metric, floor = given.pop("metric", "forces_mae"), not given.pop("no_floor", False)
    return fit_study(folder, metric, FitSettings(**given, floor=floor))
