"""Recipes, data cards and decks: the packaged copy, else the repository's folder."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from escaip.errors import ConfigError, DataError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DATASET_PREFIX = "dataset:"


@dataclass(frozen=True)
class DatasetCard:
    """What ``datasets/<name>/`` says of a data set.

    Attributes:
        name: of the folder.
        title: in words.
        manifest: the parsed ``manifest.toml``: origin, licence, level of theory, units, files, sample.
        path: the folder.
    """

    name: str
    title: str
    manifest: dict[str, Any]
    path: Path

    @property
    def text(self) -> str:
        """The card itself, ``README.md``."""
        return (self.path / "README.md").read_text(encoding="utf-8")


def resource_dir(kind: str) -> Path:
    """Returns the folder of ``configs``, ``datasets`` or ``md``: the packaged copy, else the repository's.

    Raises:
        ConfigError: neither exists.
    """
    package = Path(__file__).resolve().parent
    for candidate in (package / "_resources" / kind, package.parent / kind):
        if candidate.is_dir():
            return candidate
    raise ConfigError(f"this installation has no {kind} folder: install escaip again")


def list_configs() -> list[str]:
    """Returns the names of the recipes that can be passed as ``--config NAME``."""
    return sorted(path.stem for path in resource_dir("configs").glob("*.yaml"))


def config_path(name: str) -> Path:
    """Returns the file of a recipe: a path as it is, else a recipe's name with or without ``.yaml``.

    Raises:
        ConfigError: neither a file nor a recipe; the message lists the recipes.
    """
    given = Path(name)
    if given.is_file():
        return given
    packaged = resource_dir("configs") / (given.name if given.suffix else f"{given.name}.yaml")
    if given.parent == Path(".") and packaged.is_file():
        return packaged
    raise ConfigError(f"config {name!r} is neither a file nor a recipe: recipes are {', '.join(list_configs())}")


def list_datasets() -> list[DatasetCard]:
    """Returns the cards of all data sets, by name."""
    return [_read_card(path.parent) for path in sorted(resource_dir("datasets").glob("*/manifest.toml"))]


def dataset_card(name: str) -> DatasetCard:
    """Returns one card.

    Raises:
        DataError: no such card; the message lists those there are.
    """
    path = resource_dir("datasets") / name
    if not (path / "manifest.toml").is_file():
        names = ", ".join(card.name for card in list_datasets())
        raise DataError(f"data set {name!r} has no card: there are {names}")
    return _read_card(path)


def resolve(path: str | Path) -> Path:
    """Turns ``dataset:NAME/FILE`` into the path of a file shipped with a card; other paths stay as they are.

    Raises:
        DataError: the card has no such file.
    """
    text = str(path)
    if not text.startswith(DATASET_PREFIX):
        return Path(path)
    name, _, file = text.removeprefix(DATASET_PREFIX).partition("/")
    resolved = dataset_card(name).path / file
    if not file or not resolved.is_file():
        raise DataError(f"{text} does not exist: the card of {name} holds {_files(resolved.parent)}")
    return resolved


def _read_card(path: Path) -> DatasetCard:
    with (path / "manifest.toml").open("rb") as stream:
        manifest = tomllib.load(stream)
    return DatasetCard(path.name, str(manifest.get("dataset", {}).get("title", path.name)), manifest, path)


def _files(folder: Path) -> str:
    return (
        ", ".join(sorted(entry.name for entry in folder.iterdir() if entry.is_file())) if folder.is_dir() else "nothing"
    )
