"""Interleaved timing: for each case every worker is prepared, then all take turns, one computing at a time."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from peers.plan import Variant
from peers.workers import Worker, WorkerFailure

LEAST_WARM_UP, MOST_WARM_UP = 2, 6
TURN = 0.25  # s, for which an evaluation is repeated within a turn
MOST_PER_TURN = 20
PAUSE = 0.03  # s between turns: threads of the last one may still wait for work


@dataclass
class Row:
    """One variant in one case.

    Attributes:
        turns: seconds of an evaluation, the median of each turn.
        first: seconds of the first evaluation, compilation included.
        answer: of the first evaluation, at positions that are the same for all.
        why: it has no turns, in one line.
        group: that was alive with it.
    """

    suite: str
    case: str
    atoms: int
    variant: str
    peer: str
    parameters: int | None = None
    turns: list[float] = field(default_factory=list)
    evaluations_per_turn: int = 0
    first: float | None = None
    growth_MiB: float | None = None
    answer: dict[str, float] = field(default_factory=dict)
    why: str | None = None
    group: str = ""

    @property
    def seconds(self) -> float | None:
        """Median of the turns; None where there is nothing to tell."""
        return None if self.why else statistics.median(self.turns)


@dataclass
class Contender:
    """A variant with its process, or the reason why it has none."""

    variant: Variant
    worker: Worker | None = None
    built: dict[str, Any] = field(default_factory=dict)
    why: str | None = None

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """As the worker; a process that died stays dead, with its reason.

        Raises:
            WorkerFailure: see :meth:`Worker.ask`.
        """
        if self.worker is None or self.why:
            raise WorkerFailure(self.why or "it was not started")
        try:
            return self.worker.ask(do, **arguments)
        except WorkerFailure as error:
            if not self.worker.is_alive:
                self.why = str(error)
            raise


def measure_case(
    contenders: list[Contender], suite: str, case: str, structures: list[dict[str, Any]], repeats: int
) -> list[Row]:
    """Times one case.

    Args:
        contenders: that take part.
        suite: inference, training or cost.
        case: its name.
        structures: one, or the batch of a training step.
        repeats: turns of each.
    """
    atoms = sum(len(item["numbers"]) for item in structures)
    rows = [
        Row(suite, case, atoms, item.variant.name, item.variant.peer, item.built.get("parameters"))
        for item in contenders
    ]
    for row, contender in zip(rows, contenders, strict=True):
        with _failures_of(row):
            _prepare(row, contender, structures)
    for number in range(repeats):
        for row, contender in zip(rows, contenders, strict=True):
            if row.why is None:
                with _failures_of(row):
                    _turn(row, contender, number)
    for contender in contenders:
        if contender.why is None:
            try:
                contender.ask("release")
            except WorkerFailure as error:
                contender.why = str(error)
    return rows


def evaluations_per_turn(seconds: float) -> int:
    """As many as fill a turn."""
    return max(1, min(MOST_PER_TURN, math.ceil(TURN / seconds)))


def _prepare(row: Row, contender: Contender, structures: list[dict[str, Any]]) -> None:
    contender.ask("prepare", suite=row.suite, structures=structures)
    warm = contender.ask("warm_up", least=LEAST_WARM_UP, most=MOST_WARM_UP)
    row.first, row.answer = warm["seconds"][0], warm["answer"]
    row.evaluations_per_turn = evaluations_per_turn(min(warm["seconds"]))
    row.growth_MiB = contender.ask("memory")["growth_MiB"]


def _turn(row: Row, contender: Contender, number: int) -> None:
    count = row.evaluations_per_turn
    time.sleep(PAUSE)
    reply = contender.ask("turn", number=number, count=count, lead=1 if count > 1 else 0)
    row.turns.append(statistics.median(reply["seconds"]))


@contextmanager
def _failures_of(row: Row) -> Iterator[None]:
    """A row that failed once tells its reason and no times."""
    try:
        yield
    except WorkerFailure as error:
        row.why, row.turns = str(error), []
