"""Recipes, data cards and decks: the packaged copy, else the repository's folder."""

from __future__ import annotations

import os
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
EXAMPLE_PREFIX = "example:"


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
    packaged, checkout = package / "_resources" / kind, package.parent
    if packaged.is_dir():
        return packaged
    # Beside an installed package, a folder of that name would be another project's, such as Hugging Face's datasets.
    if (checkout / "pyproject.toml").is_file() and (checkout / kind).is_dir():
        return checkout / kind
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
        ConfigError: no such card; the message lists those there are.
        DataError: its manifest cannot be read.
    """
    folder = resource_dir("datasets")
    names = sorted(path.parent.name for path in folder.glob("*/manifest.toml"))
    if name not in names:
        raise ConfigError(f"data set {name!r} has no card: there are {', '.join(names)}")
    return _read_card(folder / name)


def resolve(path: str | os.PathLike[str]) -> Path:
    """Turns ``dataset:NAME/FILE`` into the path of a file or folder shipped with a card; other paths stay as they are.

    ``example:NAME`` is a potential or a structure of ``md``, by its name without suffix.

    Raises:
        ConfigError: no such card.
        DataError: the card has no such file, or there is no such example.
    """
    text = os.fspath(path)
    if text.startswith(EXAMPLE_PREFIX):
        return _example(text)
    if not text.startswith(DATASET_PREFIX):
        return Path(path)
    name, _, file = text.removeprefix(DATASET_PREFIX).partition("/")
    folder = dataset_card(name).path
    held = sorted(entry.relative_to(folder).as_posix() for entry in folder.rglob("*") if entry.name != "__pycache__")
    if file.rstrip("/") not in held:
        raise DataError(f"{text} does not exist: the card of {name} holds {', '.join(held)}")
    return folder / file


def _example(text: str) -> Path:
    folder = resource_dir("md")
    files = [file for part in ("potentials", "structures") for file in sorted((folder / part).glob("[!.]*"))]
    held = {file.stem: file for file in files if file.suffix != ".md"}
    name = text.removeprefix(EXAMPLE_PREFIX)
    if name not in held:
        raise DataError(f"{text} does not exist: examples are {', '.join(held)}")
    return held[name]


def _read_card(path: Path) -> DatasetCard:
    manifest_path = path / "manifest.toml"
    try:
        manifest = tomllib.loads(manifest_path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{manifest_path} is no valid TOML ({error}): repair it or install escaip again") from error
    return DatasetCard(path.name, str(manifest.get("dataset", {}).get("title", path.name)), manifest, path)
