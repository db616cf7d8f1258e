"""Finished runs of a scaling study: one line of JSON each."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from escaip.errors import DataError

RECORDS = "records.jsonl"
"""The file of a study's folder that its records lie in."""


@dataclass(frozen=True)
class Record:
    """One finished run.

    Attributes:
        id: unique in the study.
        variant: name of the architecture or set of options; variants are fitted apart from each other.
        size: name of the model's size.
        seed: of weights and order of the data.
        parameters: N, without embeddings of elements.
        parameters_total: with them.
        structures: D, distinct training structures; of less than an epoch, those that were seen.
        atoms: in those structures.
        epochs: passes over them.
        steps: of the optimizer.
        flops: C, floating-point operations of the whole training run, by formula.
        learning_rate: the highest of the schedule.
        losses: metric to the last validation value of the averaged weights: ``energy_mae`` eV/atom, ``forces_mae``
            eV/Å, ``loss``. Positive; a run that diverged has none.
        curve: ``(step, flops so far, validation loss)`` over the run.
        seconds: of training.
        commit: of the code.
        config: all that defines the run.
        profiled: a training step on two of the structures by PyTorch's counter, in units of the formula; None where it
            was not measured.
    """

    id: str
    size: str
    seed: int
    parameters: int
    parameters_total: int
    structures: int
    atoms: int
    epochs: float
    steps: int
    flops: float
    learning_rate: float
    losses: Mapping[str, float]
    variant: str = "default"
    curve: tuple[tuple[float, float, float], ...] = ()
    seconds: float = 0.0
    commit: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    profiled: float | None = None

    def __post_init__(self) -> None:
        """Checks every value.

        Raises:
            DataError: a value is of the wrong kind or not possible.
        """
        for name in ("id", "size", "variant", "commit"):
            value = getattr(self, name)
            _require(isinstance(value, str) and (value != "" or name == "commit"), name, value, "a name")
        for name in ("parameters", "parameters_total", "structures", "atoms", "steps"):
            value = getattr(self, name)
            _require(_is_number(value) and value == int(value) and value > 0, name, value, "a whole number above zero")
        _require(_is_number(self.seed) and self.seed == int(self.seed), "seed", self.seed, "a whole number")
        for name in ("epochs", "flops", "learning_rate"):
            value = getattr(self, name)
            _require(_is_number(value) and value > 0, name, value, "a number above zero")
        _require(
            self.profiled is None or (_is_number(self.profiled) and self.profiled > 0),
            "profiled",
            self.profiled,
            "a number above zero, or null",
        )
        _require(_is_number(self.seconds) and self.seconds >= 0, "seconds", self.seconds, "a time in seconds")
        _require(isinstance(self.losses, Mapping), "losses", self.losses, "a mapping of metric to value")
        for metric, value in self.losses.items():
            _require(_is_number(value) and value > 0, f"losses.{metric}", value, "a number above zero")
        for point in self.curve:
            whole = len(point) == 3 and all(_is_number(value) for value in point)
            _require(whole, "curve", list(point), "a list of [step, flops, value]")
        _require(isinstance(self.config, Mapping), "config", self.config, "a mapping")

    def to_json(self) -> str:
        """Returns one line, without its end."""
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_json(cls, line: str) -> Record:
        """Reads what :meth:`to_json` wrote.

        Raises:
            DataError: no JSON, a field that is unknown, missing or impossible.
        """
        try:
            values = json.loads(line)
        except ValueError as error:
            raise DataError(f"a record is no JSON ({error}): remove its line and run the study again") from None
        if not isinstance(values, dict):
            raise DataError("a record is no mapping of fields: remove its line and run the study again")
        known = {one.name: one for one in dataclasses.fields(cls)}
        for name in values:
            if name not in known:
                raise DataError(
                    f"record {values.get('id')}: unknown field {name!r}: written by another version; rename it"
                )
        for name, one in known.items():
            optional = one.default is not dataclasses.MISSING or one.default_factory is not dataclasses.MISSING
            if name not in values and not optional:
                raise DataError(f"record {values.get('id')}: field {name!r} is missing: run that point again")
        curve = values.get("curve", ())
        if not isinstance(curve, list | tuple) or not all(isinstance(point, list | tuple) for point in curve):
            raise DataError(
                f"record {values.get('id')}: curve is no list of [step, flops, value]: run that point again"
            )
        values["curve"] = tuple(tuple(point) for point in curve)
        try:
            return cls(**values)
        except DataError as error:
            raise DataError(f"record {values.get('id')}: {error}") from None


def read_records(path: str | Path) -> tuple[Record, ...]:
    """Reads every record of a study, in the order written; a run that was written twice, alike, counts once.

    Args:
        path: folder of a study, or its file of records.

    Raises:
        DataError: no file, a damaged line, an unknown field, or two different records of one id.
    """
    file = Path(path)
    file = file / RECORDS if file.is_dir() else file
    if not file.is_file():
        raise DataError(f"{file}: no records: run `escaip scaling run` first, or name the folder of a study")
    try:
        text = file.read_bytes().decode("utf-8", errors="replace")
    except OSError as error:
        raise DataError(f"{file}: {error.strerror or error}: check the path and its permissions") from error
    found: dict[str, Record] = {}
    lines = text.split("\n")  # not splitlines: names may hold other ends of lines
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = Record.from_json(line)
        except DataError as error:
            if number == len(lines) and "no JSON" in str(error):  # no end of line either: the writer was stopped
                raise DataError(
                    f"{file}: line {number} is damaged, its writer was killed: delete that line and run the study again"
                ) from None
            raise DataError(f"{file}: line {number}: {error}") from None
        if found.setdefault(record.id, record) != record:
            raise DataError(f"{file}: line {number}: a second, different record of {record.id!r}: keep one of them")
    if not found:
        raise DataError(f"{file}: no records: run `escaip scaling run` first")
    return tuple(found.values())


def variants(records: Iterable[Record]) -> dict[str, tuple[Record, ...]]:
    """Returns the records of each variant, in the order they first appear in."""
    found: dict[str, list[Record]] = {}
    for record in records:
        found.setdefault(record.variant, []).append(record)
    return {name: tuple(group) for name, group in found.items()}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _require(condition: bool, name: str, value: object, kind: str) -> None:
    if not condition:
        raise DataError(f"{name} is {value!r}, not {kind}: run that point again or remove its line")
