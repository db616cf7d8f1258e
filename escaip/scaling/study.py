"""The plan of a study, the runs that it consists of, and the records of finished runs."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from escaip.errors import ConfigError, DataError
from escaip.files import config_path, read_yaml, write_json
from escaip.models import EScAIPConfig

RECORDS = "records.jsonl"
"""The file in the folder of a study that holds its records."""
_WRITTEN_ALONE = {"settings", "widths", "width_per_layer"}  # entries of the file that a plan does not keep
# Every job draws no pictures and shows no progress bar, whatever its recipe says.
_QUIET = {"trainer": {"enable_progress_bar": False}, "evaluation": {"max_structures": 0}}


@dataclass(frozen=True)
class LearningRate:
    """How the learning rate of each size is found.

    Attributes:
        value: one rate for all sizes; or
        sweep: rates that are tried for each size, of which the best is taken; with ``base_width`` for that size alone.
        base_width: ``hidden_size`` from which rates are transferred to other widths (``escaip.train.mup``).
        data_size: of the sweep; default the smallest of the study.
        epochs: of the sweep; default those of the study.
    """

    value: float | None = None
    sweep: tuple[float, ...] = ()
    base_width: int | None = None
    data_size: float | None = None
    epochs: int | None = None

    def __post_init__(self) -> None:
        if (self.value is None) == (not self.sweep):
            raise ConfigError("learning_rate: give value, or sweep with two or more rates")
        if len(self.sweep) == 1:
            raise ConfigError("learning_rate: a sweep has two or more rates")


@dataclass(frozen=True)
class Job:
    """One run of a study.

    Attributes:
        id: place in the grid, and eight digits of the configuration's digest.
        budget: FLOPs to spend, in a study of budgets; the number of steps is found when the data are read.
        config: the whole configuration of ``escaip fit``.
    """

    id: str
    variant: str
    size: str
    seed: int
    budget: float | None
    config: Mapping[str, Any] = field(repr=False)

    @property
    def learning_rate(self) -> float:
        """The highest rate of the schedule, before it is divided for wide weights."""
        return float(self.config["model"]["learning_rate"])


@dataclass(frozen=True)
class StudyPlan:
    """A grid of runs: variants × sizes × (data sizes or budgets) × seeds.

    Attributes:
        recipe: the configuration of ``escaip fit`` that every run starts from, with the changes for every run.
        variants: name to changes of the configuration, for architectures or options that are compared.
        sizes: name to settings of ``model.architecture``.
        data_sizes: fractions (at most 1) or numbers of the training structures, nested.
        seeds: of weights and order of the data.
        epochs: passes of each run over its data; or
        steps: of the optimizer, the same for every run; or
        budgets: FLOPs, each spent by every size on all data.
        source: the plan as it was written.
    """

    recipe: dict[str, Any]
    variants: dict[str, dict[str, Any]]
    sizes: dict[str, dict[str, Any]]
    data_sizes: tuple[float, ...]
    seeds: tuple[int, ...]
    epochs: int | None
    steps: int | None
    budgets: tuple[float, ...]
    learning_rate: LearningRate
    source: dict[str, Any] = field(repr=False)

    @classmethod
    def read(cls, path: str | os.PathLike[str], changes: Sequence[str] = ()) -> StudyPlan:
        """Reads a file, or a recipe of ``configs/scaling`` by name.

        Changes are ``KEY=VALUE`` put into ``settings``, such as ``data.train=train.xyz``, with values as in YAML.

        Raises:
            ConfigError: there is no such file, or an entry is unknown or impossible; the message names it.
        """
        file = config_path(os.fspath(path), "scaling")
        content = read_yaml(file)
        try:
            content["settings"] = merged(_mapping("settings", content.get("settings")), *map(_change, changes))
            return cls.parse(content)
        except ConfigError as error:
            raise ConfigError(f"{file}: {error}") from error

    @classmethod
    def parse(cls, content: Mapping[str, Any]) -> StudyPlan:
        """Makes a plan from the content of a file; see ``read``."""
        given = {"variants": {"default": {}}, "data_sizes": [1.0], "seeds": [0], **content}
        _check_keys("", given, {one.name for one in fields(cls)} - {"source"} | _WRITTEN_ALONE)
        for key in ("recipe", "learning_rate"):
            if key not in given:
                raise ConfigError(f"{key} is missing")
        recipe = read_yaml(config_path(str(given["recipe"])))
        recipe.setdefault("model", {}).setdefault("architecture", {"preset": "1m"})
        recipe = merged(recipe, _QUIET, _mapping("settings", given.get("settings")))
        rate = given["learning_rate"]
        rate = dict(rate) if isinstance(rate, Mapping) else {"value": rate}
        _check_keys("learning_rate.", rate, {one.name for one in fields(LearningRate)})
        rate["sweep"] = _numbers("learning_rate.sweep", rate.get("sweep", []))
        for key in ("value", "data_size"):
            if rate.get(key) is not None:
                rate[key] = _number(f"learning_rate.{key}", rate[key])
        for key in ("epochs", "base_width"):
            rate[key] = _count(f"learning_rate.{key}", rate.get(key))
        return cls(
            recipe=recipe,
            variants=_mappings("variants", given["variants"]),
            sizes=_sizes(recipe["model"]["architecture"], given),
            data_sizes=_numbers("data_sizes", given["data_sizes"]),
            seeds=tuple(int(x) for x in _numbers("seeds", given["seeds"], least=0)),
            epochs=_count("epochs", given.get("epochs")),
            steps=_count("steps", given.get("steps")),
            budgets=_numbers("budgets", given.get("budgets", [])),
            learning_rate=LearningRate(**rate),
            source=copy.deepcopy(dict(content)),
        )

    def __post_init__(self) -> None:
        for name in ("variants", "sizes", "data_sizes", "seeds"):
            if not getattr(self, name):
                raise ConfigError(f"{name}: there are none")
        lengths = [name for name in ("epochs", "steps", "budgets") if getattr(self, name)]
        if len(lengths) != 1:
            raise ConfigError(f"the length of a run is epochs, steps or budgets: give one (found {lengths or 'none'})")
        rate = self.learning_rate
        if self.budgets and rate.sweep and rate.epochs is None:
            raise ConfigError("learning_rate.epochs: a sweep in a study of budgets needs its own length")
        if self.budgets and len(self.data_sizes) > 1:
            raise ConfigError("budgets are spent on one set of data: leave data_sizes out, or give one")
        for variant in self.variants:
            for size in self.sizes:
                config = self.architecture(variant, size)  # refuses what cannot be built
                if rate.base_width is not None:
                    config.at_width(rate.base_width)
            if rate.sweep and not self.swept_sizes(variant):
                raise ConfigError(f"learning_rate.base_width {rate.base_width}: variant {variant} has no such size")

    def jobs(self, rates: Mapping[tuple[str, str], float] | None = None) -> list[Job]:
        """Returns the runs of the grid, small ones first; where ``sweep_jobs`` search the rates, with those found."""
        found = []
        grid = product(self.budgets or (None,), self.data_sizes, self.sizes, self.variants, self.seeds)
        for budget, data_size, size, variant, seed in grid:
            rate = self.learning_rate.value if rates is None else rates[variant, size]
            found.append(self._job(variant, size, data_size, budget, seed, rate))
        return found

    def sweep_jobs(self) -> list[Job]:
        """Returns the runs of the search of learning rates, one seed each; none where the rate is given."""
        rate = self.learning_rate
        data_size = min(self.data_sizes) if rate.data_size is None else rate.data_size
        return [
            self._job(variant, size, data_size, None, self.seeds[0], value, sweep=True)
            for variant in self.variants
            for size in self.swept_sizes(variant)
            for value in rate.sweep
        ]

    def swept_sizes(self, variant: str) -> list[str]:
        """Returns the sizes whose learning rate is searched: the one of the base width, or all."""
        base = self.learning_rate.base_width
        names = list(self.sizes)
        return names if base is None else [n for n in names if self.architecture(variant, n).hidden_size == base][:1]

    def architecture(self, variant: str, size: str) -> EScAIPConfig:
        """Returns the configuration of the model of a variant and size."""
        return EScAIPConfig.from_dict(self._merged(variant, size)["model"]["architecture"])

    def _merged(self, variant: str, size: str) -> dict[str, Any]:
        return merged(self.recipe, {"model": {"architecture": self.sizes[size]}}, self.variants[variant])

    def _job(
        self, variant: str, size: str, data_size: float, budget: float | None, seed: int, rate: float | None,
        sweep: bool = False,
    ) -> Job:  # fmt: skip
        epochs = self.learning_rate.epochs or self.epochs if sweep else self.epochs
        steps = None if sweep and self.learning_rate.epochs else self.steps
        trainer = {"max_steps": -1, "max_epochs": epochs} if steps is None else {"max_steps": steps, "max_epochs": -1}
        model = {"learning_rate": rate, "base_width": self.learning_rate.base_width}
        data = {"train_size": int(data_size) if data_size > 1 else data_size}
        run = {"seed_everything": seed, "model": model, "data": data, "trainer": trainer}
        config = merged(self._merged(variant, size), run)
        place = [variant, size, f"d{data_size:g}", f"s{seed}"]
        place += [f"c{budget:.3g}"] if budget is not None else []
        place += [f"lr{rate:.3g}"] if sweep else []
        digest = hashlib.sha256(json.dumps([config, budget], sort_keys=True).encode()).hexdigest()[:8]
        return Job("-".join([*place, digest]), variant, size, seed, budget, config)

    def claim_folder(self, folder: Path, sweep: Sequence[Job], jobs: Sequence[Job] | None = None) -> None:
        """Makes sure that a folder holds this study or a smaller part of it, and writes the plan to ``study.json``.

        Nothing is written where the jobs of the grid are not known yet (None).

        Raises:
            DataError: the folder holds another study.
        """
        file = folder / "study.json"
        now = {"sweep": [job.id for job in sweep], **({} if jobs is None else {"jobs": [job.id for job in jobs]})}
        if file.is_file():
            before = json.loads(file.read_text(encoding="utf-8"))
            missing = [name for part, names in now.items() for name in before[part] if name not in set(names)]
            if missing:
                raise DataError(
                    f"{folder} holds another study: its run {missing[0]} is not of this one "
                    f"({len(missing)} such): choose another --out, or go back to the configuration in {file.name}"
                )
        if jobs is not None:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(file, {"study": self.source, **now})


def merged(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Merges nested mappings; any other value of a later layer replaces that of an earlier one."""
    result: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            if isinstance(value, Mapping):
                before = result.get(key)
                value = merged(before if isinstance(before, dict) else {}, value)
            result[key] = value
    return result


def _check_keys(prefix: str, given: Mapping[str, Any], known: set[str]) -> None:
    for key in given:
        if key not in known:
            raise ConfigError(f"{prefix}{key} does not exist: choose from {', '.join(sorted(known))}")


def _change(text: str) -> dict[str, Any]:
    """Turns ``a.b=1`` into ``{a: {b: 1}}``."""
    key, equals, value = text.partition("=")
    if not equals or not all(key.split(".")):
        raise ConfigError(f"{text!r}: write KEY=VALUE, such as data.train=train.xyz")
    try:
        result = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"{key}: {value!r} is no YAML") from error
    for part in reversed(key.split(".")):
        result = {part: result}
    return dict(result)


def _sizes(architecture: dict[str, Any], given: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Reads sizes by name, or derives them from widths: more heads of the same size, layers as ``width_per_layer``."""
    if ("sizes" in given) == ("widths" in given):
        raise ConfigError("sizes are written one by one as sizes, or follow from widths: give one of them")
    if "sizes" in given:
        return _mappings("sizes", given["sizes"])
    start = EScAIPConfig.from_dict(architecture)
    per_layer = given.get("width_per_layer")
    found = {}
    for width in _numbers("widths", given["widths"]):
        config = start.at_width(int(width))
        layers = start.num_layers
        if per_layer is not None:
            layers = max(1, math.floor(width / _number("width_per_layer", per_layer) + 0.5))
        heads = {"hidden_size": config.hidden_size, "num_heads": config.num_heads}
        found[f"w{int(width)}"] = {**heads, "num_layers": layers}
    return found


def _mapping(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping | None):
        raise ConfigError(f"{name} is {value!r}: it must be a mapping")
    return {str(key): entry for key, entry in (value or {}).items()}


def _mappings(name: str, value: Any) -> dict[str, dict[str, Any]]:
    return {key: _mapping(f"{name}.{key}", entry) for key, entry in _mapping(name, value).items()}


def _numbers(name: str, values: Any, least: float = 1e-300) -> tuple[float, ...]:
    found = tuple(_number(name, value, least) for value in (values if isinstance(values, list | tuple) else [values]))
    if len(set(found)) < len(found):
        raise ConfigError(f"{name} is {values!r}: give each number once")
    return found


def _number(name: str, value: Any, least: float = 1e-300) -> float:
    try:
        number = float(value)  # YAML reads 1e18 as text
    except (TypeError, ValueError):
        number = math.nan
    if not least <= number < math.inf:
        raise ConfigError(f"{name} is {value!r}: it must be a number above 0")
    return number


def _count(name: str, value: Any) -> int | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ConfigError(f"{name} is {value!r}: it must be a whole number, at least 1")
    return value


@dataclass(frozen=True)
class Record:
    """One finished run.

    Attributes:
        parameters: N, without embeddings of elements; ``parameters_total`` is with them.
        structures: D, distinct training structures; of less than an epoch, those that were seen.
        atoms: in those structures.
        flops: C, floating-point operations of the whole training by formula.
        learning_rate: the highest of the schedule.
        losses: metric to the last validation value, of averaged weights where the recipe averages them: ``energy_mae``
            eV/atom, ``forces_mae`` eV/Å, ``stress_mae`` eV/Å³, ``loss``. A run that diverged has none.
        curve: ``(step, flops so far, validation loss)`` over the run.
        profiled: operations of a training step on two structures by PyTorch's counter over those of the formula; None
            where they were not measured.
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
        fitted = {name: getattr(self, name) for name in ("parameters", "structures", "flops", "learning_rate")}
        if not isinstance(self.losses, Mapping):
            raise DataError(f"losses is {self.losses!r}, not a mapping: run that point again")
        for name, value in {**fitted, **{f"losses.{metric}": x for metric, x in self.losses.items()}}.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise DataError(f"{name} is {value!r}, not a number above zero: run that point again")

    def to_json(self) -> str:
        """Returns one line of JSON without its end."""
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_json(cls, line: str) -> Record:
        """Reads a line that ``to_json`` wrote.

        Raises:
            DataError: the line is no JSON, or a field is unknown, missing or impossible.
        """
        try:
            values = json.loads(line)
            values["curve"] = tuple(map(tuple, values.get("curve", ())))
            return cls(**values)
        except (ValueError, TypeError, AttributeError) as error:
            reason = str(error).replace("Record.__init__() ", "")
            raise DataError(f"no record ({reason}): remove its line and run the study again") from None
        except DataError as error:
            raise DataError(f"record {values.get('id')}: {error}") from None


def read_records(path: str | os.PathLike[str]) -> tuple[Record, ...]:
    """Reads the records of a study, of its folder or file, in the order written; one that is there twice counts once.

    Raises:
        DataError: there is no file, a line is damaged, or one id has two different records.
    """
    file = Path(path)
    file = file / RECORDS if file.is_dir() else file
    if not file.is_file():
        raise DataError(f"{file}: no records: run `escaip scaling run` first, or name the folder of a study")
    found: dict[str, Record] = {}
    text = file.read_text(encoding="utf-8", errors="replace")
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: names may hold other ends of lines
        if not line.strip():
            continue
        try:
            record = Record.from_json(line)
        except DataError as error:
            raise DataError(f"{file}: line {number}: {error}") from None
        if found.setdefault(record.id, record) != record:
            raise DataError(f"{file}: line {number}: a second, different record of {record.id!r}: keep one of them")
    if not found:
        raise DataError(f"{file}: no records: run `escaip scaling run` first")
    return tuple(found.values())


def variants(records: Iterable[Record]) -> dict[str, list[Record]]:
    """Returns the records of each variant, in the order in which variants first appear."""
    found: dict[str, list[Record]] = {}
    for record in records:
        found.setdefault(record.variant, []).append(record)
    return found
