"""The ``distil`` command."""

from __future__ import annotations

import sys


def distil(
    config: str, *, out: str, calculator: str, python: str | None = None, workers: int = 1, labels_only: bool = False
) -> None:
    """Makes a fast potential of a slow calculator: structures, labels, training, and runs that find what is missing.

    Args:
        config: a plan in YAML, or a recipe of configs/distil by name
        out: folder of labels, data, trainings and the potential; the same command goes on there after any stop
        calculator: module:NAME of the ASE calculator, a class or function that takes the plan's arguments
        python: another Python that has the calculator and ASE (default: this one)
        workers: processes that label, or train, at once
        labels_only: end with the prepared data

    Example: escaip distil plan.yaml --calculator tblite.ase:TBLite --out runs/mine
    """
    from escaip.distil.labels import Labeler
    from escaip.distil.plan import DistilPlan
    from escaip.signals import continued_by_same_command

    plan = DistilPlan.read(config)
    stated = plan.teacher
    teacher = Labeler(
        calculator, stated.arguments, python or sys.executable, stated.max_force, stated.max_stress, stated.timeout
    )
    from escaip.distil.run import distil as run

    with continued_by_same_command(at_once=False) as signals:
        made = run(
            plan, out, teacher, workers=workers, labels_only=labels_only, stop=lambda: signals.received is not None
        )
    print(made.summary())
