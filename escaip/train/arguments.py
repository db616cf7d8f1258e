"""Arguments of ``escaip fit | validate | test``: what can be checked before heavy imports."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from escaip.errors import CheckpointError, ConfigError
from escaip.files import config_path, read_yaml

BEST, LAST = "best.ckpt", "last.ckpt"
_GROUPS = (
    "config", "print_config", "help", "seed_everything", "trainer", "model", "data", "name", "out", "ema", "checkpoint",
    "evaluation", "ckpt_path", "weights_only", "verbose",
)  # fmt: skip
# Settings whose values are mappings: their nested options are merged here, since the parser keeps only the last.
_MAPPINGS = tuple(
    f"data.{name}" for name in ("train", "val", "test", "replay", "split", "sampling", "isolated_energies")
)
# Classes that a configuration may name: importing a package runs its code.
_PACKAGES = ("escaip", "lightning", "pytorch_lightning", "torch")
_CLASS_SETTINGS = ("accelerator", "callbacks", "logger", "plugins", "profiler", "strategy")


def prepare(argv: list[str]) -> tuple[list[str], str, dict[str, Any]]:
    """Resolves recipes and merges nested options into the mappings of the configuration.

    Args:
        argv: ``["fit", "--config", NAME, "--data.train.keys.energy", "E", ...]``.

    Returns:
        The arguments for LightningCLI; the name of the run, from the last configuration; and settings by name, among
        them ``data.train``, ``data.val``, ``data.test`` and ``ckpt_path``.

    Raises:
        ConfigError: no such recipe or option, options that cannot be merged, or a class of another package.
    """
    arguments, name, settings = [argv[0]], "run", dict[str, Any]()
    nested: dict[str, dict[str, str]] = {}
    for option, value in pairs(argv[1:]):
        key = option.removeprefix("--").removesuffix("+")
        if option.startswith("--") and key.partition(".")[0] not in _GROUPS:
            raise ConfigError(f"unrecognized option {option}: see escaip {argv[0]} --help")
        parent = next((mapping for mapping in _MAPPINGS if key.startswith(f"{mapping}.")), None)
        if value is not None and option in ("--config", "-c"):
            path = config_path(value)
            name = path.stem if path.stem != "config" else path.resolve().parent.parent.name
            settings.update(_read_config(path))
            value = str(path)
        elif value is not None and parent is not None:
            nested.setdefault(parent, {})[key] = value
            continue
        elif value is not None:
            settings[key] = _parsed(value)
        arguments.append(option if value is None else f"{option}={value}")
    for parent, options in nested.items():
        settings[parent] = _merged(parent, settings.get(parent), options)
        arguments.append(f"--{parent}={json.dumps(settings[parent], default=str)}")
    return arguments, name, settings


def find_checkpoint(given: str | os.PathLike[str], folder: Path) -> Path:
    """Returns the checkpoint meant by a path, ``last`` or ``best``: the newest of that name in the runs of ``folder``.

    Raises:
        CheckpointError: there is none.
    """
    names = {"last": LAST, "best": BEST}
    if str(given) not in names:
        if not Path(given).is_file():
            raise CheckpointError(f"checkpoint {given} does not exist: pass a .ckpt file, last or best")
        return Path(given)
    found = [path for path in folder.glob(f"version_*/{names[str(given)]}") if path.is_file()]
    if not found:
        file = names[str(given)]
        raise CheckpointError(f"no run in {folder} has a {file}: name the run with --name, or pass the file")
    return max(found, key=lambda path: path.stat().st_mtime_ns)


def pairs(arguments: list[str]) -> Iterator[tuple[str, str | None]]:
    """Yields each option with its value, None for one without."""
    rest = list(arguments)
    while rest:
        option, equals, value = rest.pop(0).partition("=")
        if equals:
            yield option, value
        elif option.startswith("-") and rest and not rest[0].startswith("--"):
            yield option, rest.pop(0)
        else:
            yield option, None


def _parsed(text: str) -> Any:
    """Reads a value of the command line; JSON first, since YAML takes ``1e-3`` for text."""
    try:
        return json.loads(text)
    except ValueError:
        try:
            return yaml.safe_load(text)
        except yaml.YAMLError:
            return text


def _read_config(path: Path) -> dict[str, Any]:
    """Returns the settings of a configuration file, those of ``data`` under names such as ``data.train``."""
    config = read_yaml(path)
    for name in _classes(config):
        if name.partition(".")[0] not in _PACKAGES:
            raise ConfigError(
                f"config {path} names the class {name}: a file may name classes of {', '.join(_PACKAGES)} only, "
                "pass others on the command line"
            )
    data = config.get("data")
    return {**config, **({f"data.{key}": value for key, value in data.items()} if isinstance(data, Mapping) else {})}


def _classes(value: Any, key: str = "") -> Iterator[str]:
    """Yields the classes that a configuration names with their module; Lightning knows the others."""
    if isinstance(value, Mapping):
        for name, entry in value.items():
            yield from _classes(entry, str(name))
    elif isinstance(value, list):
        for entry in value:
            yield from _classes(entry, key)
    elif isinstance(value, str) and key in ("class_path", *_CLASS_SETTINGS) and "." in value:
        yield value


def _merged(parent: str, base: Any, options: Mapping[str, str]) -> dict[str, Any]:
    """Returns a mapping with nested options added.

    Raises:
        ConfigError: an option below a value that is no mapping.
    """
    merged = {parent: copy.deepcopy(base)}
    for key, text in options.items():
        place, name = merged, parent
        for part in key.removeprefix(f"{parent}.").split("."):
            if place.get(name) is None:
                place[name] = {}
            if not isinstance(place[name], dict):
                hint = f"write --{parent}.path {base} for the path" if place is merged else "leave one of them out"
                raise ConfigError(f"--{key} cannot be merged with {place[name]!r}: {hint}")
            place, name = place[name], part
        place[name] = _parsed(text)
    found: dict[str, Any] = merged[parent]
    return found


def paths_of(spec: Any) -> Iterator[str]:
    """Yields the paths of a data specification: a path, a list, a mapping with a path, or sets by name."""
    if isinstance(spec, str):
        yield spec
    elif isinstance(spec, list):
        for entry in spec:
            yield from paths_of(entry)
    elif isinstance(spec, Mapping):
        for entry in [spec["path"]] if "path" in spec else spec.values():
            yield from paths_of(entry)
