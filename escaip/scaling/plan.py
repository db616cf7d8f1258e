"""The plan of a study: a file that says which runs make it up, and those runs."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from escaip.errors import ConfigError, DataError
from escaip.files import config_path
from escaip.models import EScAIPConfig
from escaip.scaling.files import write_whole

# What a job needs of a recipe whatever the recipe says: no pictures, no progress bar for each of a hundred runs.
_QUIET = {"trainer": {"enable_progress_bar": False}, "evaluation": {"max_structures": 0}}


@dataclass(frozen=True)
class LearningRate:
    """How the learning rate of each size is found.

    Attributes:
        value: of all sizes; or
        sweep: rates that are tried for each size, and the best is taken; with ``base_width`` for the base size alone.
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
        if len(set(self.sweep)) == 1 or any(not rate > 0 for rate in (*self.sweep, self.value or 1.0)):
            raise ConfigError("learning_rate: rates must be above 0, and a sweep has two or more")


@dataclass(frozen=True)
class Job:
    """One run.

    Attributes:
        id: of the study; what the run is, and eight digits of its configuration.
        variant, size, seed, data_size: its place in the grid.
        budget: FLOPs that it is to spend, in a study of budgets; its epochs are found when its data are read.
        sweep: a run of the search of learning rates, which enters no fit.
        config: of ``escaip fit``, whole.
    """

    id: str
    variant: str
    size: str
    seed: int
    data_size: float
    budget: float | None
    sweep: bool
    config: Mapping[str, Any] = field(repr=False)

    @property
    def learning_rate(self) -> float:
        """The highest of the schedule, before it is divided for wide weights."""
        return float(self.config["model"]["learning_rate"])


@dataclass(frozen=True)
class StudyPlan:
    """A grid of runs: variants × sizes × (data sizes or budgets) × seeds.

    Attributes:
        recipe: the configuration of ``escaip fit`` that every run starts from.
        settings: what is changed in it for every run.
        variants: name to what is changed for it: architectures or options that are compared.
        sizes: name to settings of ``model.architecture``.
        data_sizes: fractions (at most 1) or numbers of the training structures, nested.
        seeds: of weights and order of the data.
        epochs: passes over the data of each run; or
        steps: of the optimizer, the same for every run; or
        budgets: FLOPs, each spent by every size on all the data, in as many epochs as that takes.
        learning_rate: see :class:`LearningRate`.
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
    settings: dict[str, Any]
    source: dict[str, Any] = field(repr=False)

    @classmethod
    def read(cls, path: str | os.PathLike[str], changes: Sequence[str] = ()) -> StudyPlan:
        """Reads a file of ``configs/scaling`` or a path.

        Args:
            path: file, or name of a recipe.
            changes: ``KEY=VALUE`` put into ``settings``, such as ``data.train=train.xyz``; values as in YAML.

        Raises:
            ConfigError: it does not exist, or says what cannot be done.
        """
        import yaml

        file = study_path(os.fspath(path))
        try:
            content = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"{file}: no YAML: {' '.join(str(error).split())[:200]}") from error
        if not isinstance(content, dict):
            raise ConfigError(f"{file}: a study is a mapping: recipe, sizes, data_sizes, ...")
        try:
            content["settings"] = merged(_mapping("settings", content.get("settings")), *map(_change, changes))
            return cls.parse(content)
        except ConfigError as error:
            raise ConfigError(f"{file}: {error}") from error

    @classmethod
    def parse(cls, content: Mapping[str, Any]) -> StudyPlan:
        """Makes a plan of a mapping, and looks at each of its configurations.

        Raises:
            ConfigError: an unknown or impossible entry, which the message names.
        """
        given = {"variants": {"default": {}}, "settings": {}, "data_sizes": [1.0], "seeds": [0], **content}
        known = {
            "recipe", "settings", "variants", "sizes", "widths", "width_per_layer", "data_sizes", "seeds", "epochs",
            "steps", "budgets", "learning_rate",
        }  # fmt: skip
        for key in given:
            if key not in known:
                raise ConfigError(f"{key!r} is no entry of a study: they are {', '.join(sorted(known))}")
        for key in ("recipe", "learning_rate"):
            if key not in given:
                raise ConfigError(f"{key} is missing")
        rate = given["learning_rate"]
        plan = cls(
            recipe=_recipe(given["recipe"]),
            settings=_mapping("settings", given["settings"]),
            variants={str(k): _mapping(f"variants.{k}", v) for k, v in _mapping("variants", given["variants"]).items()},
            sizes={},
            data_sizes=tuple(float(x) for x in _numbers("data_sizes", given["data_sizes"])),
            seeds=tuple(int(x) for x in _numbers("seeds", given["seeds"], least=0)),
            epochs=_count("epochs", given.get("epochs")),
            steps=_count("steps", given.get("steps")),
            budgets=tuple(float(x) for x in _numbers("budgets", given.get("budgets", []))),
            learning_rate=_learning_rate(rate if isinstance(rate, Mapping) else {"value": rate}),
            source=copy.deepcopy(dict(content)),
        )
        plan = dataclasses.replace(plan, sizes=_sizes(plan, given))
        plan._check()
        return plan

    def jobs(self, rates: Mapping[tuple[str, str], float] | None = None) -> list[Job]:
        """The runs of the grid, small ones first.

        Args:
            rates: learning rate of each variant and size, found by :meth:`sweep_jobs`; needed where there is a sweep.
        """
        if self.learning_rate.sweep and rates is None:
            raise ConfigError("the learning rates of this study come from a sweep, which has not run")
        found = []
        for variant, size, data_size, budget, seed in self._grid():
            rate = self.learning_rate.value if rates is None else rates[variant, size]
            found.append(self._job(variant, size, data_size, budget, seed, rate, sweep=False))
        return found

    def sweep_jobs(self) -> list[Job]:
        """The runs of the search of learning rates, one seed each; none where they are given."""
        rate = self.learning_rate
        data_size = min(self.data_sizes) if rate.data_size is None else rate.data_size
        return [
            self._job(variant, size, data_size, None, self.seeds[0], value, sweep=True)
            for variant in self.variants
            for size in self.swept_sizes(variant)
            for value in rate.sweep
        ]

    def swept_sizes(self, variant: str) -> list[str]:
        """Sizes whose learning rate is searched: the one of the base width, or all."""
        base = self.learning_rate.base_width
        names = list(self.sizes)
        return names if base is None else [n for n in names if self.architecture(variant, n).hidden_size == base][:1]

    def architecture(self, variant: str, size: str) -> EScAIPConfig:
        """The model of a variant and size."""
        return EScAIPConfig.from_dict(self._merged(variant, size)["model"]["architecture"])

    def _grid(self) -> Iterator[tuple[str, str, float, float | None, int]]:
        lengths: Sequence[float | None] = self.budgets or (None,)
        for budget in lengths:
            for data_size in self.data_sizes:
                for size in self.sizes:
                    for variant in self.variants:
                        for seed in self.seeds:
                            yield variant, size, data_size, budget, seed

    def _merged(self, variant: str, size: str) -> dict[str, Any]:
        architecture = {"model": {"architecture": self.sizes[size]}}
        return merged(self.recipe, _QUIET, self.settings, architecture, self.variants[variant])

    def _job(
        self, variant: str, size: str, data_size: float, budget: float | None, seed: int, rate: float | None,
        *, sweep: bool,
    ) -> Job:  # fmt: skip
        epochs = self.learning_rate.epochs or self.epochs if sweep else self.epochs
        steps = None if sweep and self.learning_rate.epochs else self.steps
        trainer: dict[str, Any] = {"max_steps": -1, "max_epochs": epochs}
        if steps is not None:
            trainer = {"max_steps": steps, "max_epochs": -1}
        model = {"learning_rate": rate, "base_width": self.learning_rate.base_width}
        data = {"train_size": int(data_size) if data_size > 1 else data_size}
        run = {"seed_everything": seed, "model": model, "data": data, "trainer": trainer}
        config = merged(self._merged(variant, size), run)
        place = [variant, size, f"d{data_size:g}", f"s{seed}"]
        place += [f"c{budget:.3g}"] if budget is not None else []
        place += [f"lr{rate:.3g}"] if sweep else []
        digest = hashlib.sha256(json.dumps([config, budget], sort_keys=True).encode()).hexdigest()[:8]
        return Job("-".join([*place, digest]), variant, size, seed, data_size, budget, sweep, config)

    def _check(self) -> None:
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


def study_path(name: str) -> Path:
    """A file as it is, else a recipe of ``configs/scaling`` by name.

    Raises:
        ConfigError: neither.
    """
    from escaip.files import resource_dir

    if Path(name).is_file():
        return Path(name)
    folder = resource_dir("configs") / "scaling"
    file = folder / f"{name.removesuffix('.yaml')}.yaml"
    if "/" not in name and file.is_file():
        return file
    names = ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))
    raise ConfigError(f"study {name!r} is neither a file nor a recipe: recipes are {names}")


def merged(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Mappings within each other, later ones first; everything else is replaced."""
    result: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            if isinstance(value, Mapping) and isinstance(result.get(key), dict):
                result[key] = merged(result[key], value)
            else:
                result[key] = copy.deepcopy(dict(value) if isinstance(value, Mapping) else value)
    return result


def _recipe(name: Any) -> dict[str, Any]:
    import yaml

    content = yaml.safe_load(config_path(str(name)).read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ConfigError(f"recipe {name} is no configuration of escaip fit")
    content.setdefault("model", {}).setdefault("architecture", {"preset": "1m"})
    return content


def _change(text: str) -> dict[str, Any]:
    """``a.b=1`` as ``{a: {b: 1}}``."""
    import yaml

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


def _sizes(plan: StudyPlan, given: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """By name, or by the rule: heads keep their size and become more, layers are the width over a number."""
    if ("sizes" in given) == ("widths" in given):
        raise ConfigError("sizes are written one by one as sizes, or follow from widths: give one of them")
    if "sizes" in given:
        named = {str(k): _mapping(f"sizes.{k}", v) for k, v in _mapping("sizes", given["sizes"]).items()}
        if not named:
            raise ConfigError("sizes: there are none")
        return named
    start = EScAIPConfig.from_dict(merged(plan.recipe, plan.settings)["model"]["architecture"])
    per_layer = given.get("width_per_layer")
    found = {}
    for width in _numbers("widths", given["widths"]):
        config = start.at_width(int(width))
        layers = start.num_layers if per_layer is None else max(1, math.floor(width / float(per_layer) + 0.5))
        found[f"w{int(width)}"] = {
            "hidden_size": config.hidden_size, "num_heads": config.num_heads, "num_layers": layers,
        }  # fmt: skip
    return found


def _learning_rate(values: Mapping[str, Any]) -> LearningRate:
    known = {field.name for field in dataclasses.fields(LearningRate)}
    for key in values:
        if key not in known:
            raise ConfigError(f"learning_rate.{key} does not exist: there are {', '.join(sorted(known))}")
    values = {**values, "sweep": tuple(_numbers("learning_rate.sweep", values.get("sweep", [])))}
    return LearningRate(**values)


def _mapping(name: str, value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ConfigError(f"{name} is {value!r}: it must be a mapping")
    return {str(key): entry for key, entry in value.items()}


def _numbers(name: str, values: Any, least: float = 1e-300) -> list[float]:
    values = values if isinstance(values, list | tuple) else [values]
    try:
        found = [float(value) for value in values]  # YAML reads 1e18 as text
    except (TypeError, ValueError):
        raise ConfigError(f"{name} is {values!r}: it must be a list of numbers") from None
    if any(not (math.isfinite(x) and x >= least) for x in found) or len(set(found)) < len(found):
        raise ConfigError(f"{name} is {values!r}: numbers above 0, each once")
    return found


def _count(name: str, value: Any) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name} is {value!r}: it must be a whole number, at least 1")
    return value


def same_study(folder: Path, plan: StudyPlan, sweep: Sequence[Job], jobs: Sequence[Job] | None = None) -> None:
    """Makes sure that a folder holds this study or a smaller part of it, and keeps the plan there.

    Args:
        folder: of the study; it need not exist.
        plan: of the study.
        sweep: runs of the search of learning rates.
        jobs: of the grid; None where they are not known yet, and nothing is written.

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
        write_whole(file, json.dumps({"study": plan.source, **now}, indent=1) + "\n")
