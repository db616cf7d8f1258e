"""Files: written whole, locked, hashed, cached in private folders; recipes, data cards and decks of the package."""

from __future__ import annotations

import dataclasses
import fcntl
import grp
import hashlib
import json
import math
import os
import pwd
import shutil
import stat
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import IO, Any

from escaip.errors import CheckpointError, ConfigError, DataError, EscaipError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DATASET_PREFIX = "dataset:"
EXAMPLE_PREFIX = "example:"


@contextmanager
def write_aside(path: str | os.PathLike[str], error: type[EscaipError] = DataError) -> Iterator[Path]:
    """Yields a path beside ``path`` to write a file or a folder to, and renames it to ``path`` at the end.

    After an exception, whatever its kind, ``path`` is as it was and nothing is left beside it.

    Args:
        path: the file to write or replace. Its folder must exist. A folder that exists is not replaced.
        error: class of the error raised.

    Raises:
        EscaipError: of class ``error``; the file cannot be written.
    """
    target = Path(path)
    aside = target.with_name(f".{target.stem}.{os.getpid()}.part{target.suffix}")
    try:
        yield aside
        os.replace(aside, target)
    except OSError as failure:
        reason = failure.strerror or failure
        raise error(f"cannot write {target}: {reason}: check its folder and the space on the disk") from failure
    finally:
        if aside.is_dir():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            aside.unlink(missing_ok=True)


def write_file(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Writes a whole file or nothing; see ``write_aside``."""
    with write_aside(path) as aside:
        aside.write_bytes(content.encode() if isinstance(content, str) else content)


def write_json(path: str | os.PathLike[str], value: object) -> None:
    """Writes a value as indented JSON, whole or not at all; NaN is refused with a ``ValueError``."""
    write_file(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_results(folder: str | os.PathLike[str], files: Mapping[str, Any]) -> None:
    """Writes each file whole: a dict as JSON, a figure as PNG, structures as extended XYZ.

    Args:
        folder: made where needed.
        files: name to a dict, a Figure, a list of Atoms, or a function, which is given the path to write to.

    Raises:
        DataError: the folder cannot be written.
    """
    import ase.io

    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot write {folder}: {error.strerror or error}: choose another --out") from error
    for name, content in files.items():
        with write_aside(folder / name) as aside:
            if isinstance(content, dict):
                aside.write_text(json.dumps(plain(content), indent=1, ensure_ascii=False, allow_nan=False) + "\n")
            elif hasattr(content, "savefig"):
                content.savefig(aside, format="png", dpi=150)
            elif isinstance(content, list):
                ase.io.write(aside, content, format="extxyz")
            else:
                content(aside)


def plain(value: Any) -> Any:
    """Turns a value into JSON values.

    A dataclass loses the fields hidden from its ``repr``, an ``ase.Atoms`` becomes symbols, positions and cell, and a
    number that is not finite None.
    """
    if dataclasses.is_dataclass(value):
        return {one.name: plain(getattr(value, one.name)) for one in dataclasses.fields(value) if one.repr}
    if isinstance(value, Mapping):
        return {str(name): plain(one) for name, one in value.items()}
    if hasattr(value, "get_chemical_symbols"):
        symbols = value.get_chemical_symbols()
        return plain({"symbols": symbols, "positions_A": value.positions, "cell_A": value.cell.array})
    if hasattr(value, "tolist"):  # an array, or a number of NumPy
        return plain(value.tolist())
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def aligned(rows: Sequence[Sequence[str]], numbers: bool = False) -> list[str]:
    """Returns a line for each row of a table, its columns to the left; ``numbers``, all but the first, to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    pad = str.rjust if numbers else str.ljust
    return ["  ".join([row[0].ljust(widths[0]), *map(pad, row[1:], widths[1:])]).rstrip() for row in rows]


def html_table(rows: Iterable[Sequence[str]], header: Sequence[str] = ()) -> str:
    """Returns a table for notebooks, the first column as headings; a row of one text spans all columns."""
    lines = [header, *rows] if header else list(rows)
    width = max(map(len, lines))
    html = []
    for row in lines:
        cells = [escape(text) for text in row]
        if len(cells) == 1:
            html.append(f'<td colspan="{width}">{cells[0]}</td>')
        else:
            tag = "th" if row is header else "td"
            html.append(f"<th>{cells[0]}</th>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in cells[1:]))
    return "<table>" + "".join(f"<tr>{row}</tr>" for row in html) + "</table>"


def try_lock(path: str | os.PathLike[str]) -> IO[bytes] | None:
    """Locks a file, creating it where needed, and returns it open; None where another process holds the lock.

    The lock ends when the file is closed, also by the end of the process. Child processes that inherit the open file
    hold it too.
    """
    stream = Path(path).open("ab")  # noqa: SIM115
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        stream.close()
        return None
    return stream


def sha256(path: str | os.PathLike[str]) -> str:
    """Returns the hexadecimal SHA-256 digest of a file."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def one_line(error: BaseException) -> str:
    """Returns an error's message in one line, or the name of its class where it has none."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, or the name of its class where it has none."""
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__


def cache_folder(name: str) -> Path | None:
    """Returns a folder of the user's cache for generated code, making it where needed; None where that is impossible.

    The cache is ``$ESCAIP_CACHE``, else ``$XDG_CACHE_HOME/escaip``, else ``~/.cache/escaip``.

    Raises:
        ConfigError: somebody else could have written to it, so that code in it must not be run.
    """
    root = os.environ.get("ESCAIP_CACHE")
    if not root:
        shared = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
        root = os.path.join(shared, "escaip")
    folder = Path(root) / name
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        check_private(folder)
    except OSError:
        return None
    return folder


def check_private(path: str | os.PathLike[str]) -> None:
    """Makes sure that nobody but this user and root can replace a file or folder that code is loaded from.

    The entry must belong to this user, its parents to this user or to root, and no other user may write to any of them.
    A parent with the sticky bit, such as the folder of temporary files, lets others add entries but not replace ours.

    Raises:
        ConfigError: somebody else could; the message names where.
        OSError: the entry cannot be looked at.
    """
    entry = Path(path).resolve()
    for place in (entry, *entry.parents):
        status = place.stat()
        sticky = place != entry and bool(status.st_mode & stat.S_ISVTX)
        trusted = status.st_uid == os.getuid() or (place != entry and status.st_uid == 0)
        if not trusted or (_others_write(status) and not sticky):
            raise ConfigError(
                f"{place} can be written by other users, so no compiled code is loaded from {entry}: "
                "take their permission away, or set ESCAIP_CACHE to a private folder"
            )


def _others_write(status: os.stat_result) -> bool:
    """Whether users other than this one and root may write; a group of this user alone is no other user."""
    if status.st_mode & stat.S_IWOTH:
        return True
    if not status.st_mode & stat.S_IWGRP or status.st_gid == 0:
        return False
    try:
        user, group = pwd.getpwuid(os.getuid()), grp.getgrgid(status.st_gid)
    except KeyError:
        return True
    return group.gr_gid != user.pw_gid or bool(set(group.gr_mem) - {user.pw_name})


@dataclass(frozen=True)
class DatasetCard:
    """Card of a data set: its folder ``datasets/<name>/``.

    Attributes:
        name: of the folder.
        title: the data set in words.
        manifest: the parsed ``manifest.toml``: origin, licence, level of theory, units, files, sample.
        path: the folder.
    """

    name: str
    title: str
    manifest: dict[str, Any]
    path: Path

    @property
    def text(self) -> str:
        """Text of the card, its ``README.md``."""
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


def list_configs(kind: str = "") -> list[str]:
    """Returns the names of the recipes that can be passed as ``--config NAME``, or of those in a folder of theirs."""
    return sorted(path.stem for path in (resource_dir("configs") / kind).glob("*.yaml"))


def config_path(name: str, kind: str = "") -> Path:
    """Returns the file of a recipe: a path as it is, else a recipe's name with or without ``.yaml``.

    Args:
        name: path or name.
        kind: folder of the recipes in ``configs``; by default those of trainings.

    Raises:
        ConfigError: neither a file nor a recipe; the message lists the recipes.
    """
    given = Path(name)
    if given.is_file():
        return given
    packaged = resource_dir("configs") / kind / (given.name if given.suffix else f"{given.name}.yaml")
    if given.parent == Path(".") and packaged.is_file():
        return packaged
    known = ", ".join(list_configs(kind))
    raise ConfigError(f"{kind} config {name!r} is neither a file nor a recipe: recipes are {known}".lstrip())


def read_yaml(path: Path) -> dict[str, Any]:
    """Returns the settings in a YAML file; none for an empty one.

    Raises:
        ConfigError: it cannot be read, or holds something else than a mapping.
    """
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"config {path} cannot be read, or is no YAML ({one_line(error)})") from error
    if not isinstance(content, dict):
        raise ConfigError(f"config {path} is no mapping of settings: see the recipes of escaip recipes")
    return content


def list_datasets() -> list[DatasetCard]:
    """Returns the cards of all data sets, by name."""
    return [dataset_card(name) for name in _card_names()]


def dataset_card(name: str) -> DatasetCard:
    """Returns one card.

    Raises:
        ConfigError: no such card; the message lists those there are.
        DataError: its manifest cannot be read.
    """
    names = _card_names()
    if name not in names:
        raise ConfigError(f"data set {name!r} has no card: there are {', '.join(names)}")
    path = resource_dir("datasets") / name
    try:
        manifest = tomllib.loads((path / "manifest.toml").read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}/manifest.toml is no valid TOML ({error}): repair it or install escaip again"
        ) from error
    return DatasetCard(name, str(manifest.get("dataset", {}).get("title", name)), manifest, path)


def _card_names() -> list[str]:
    return sorted(path.parent.name for path in resource_dir("datasets").glob("*/manifest.toml"))


def resolve(path: str | os.PathLike[str]) -> Path:
    """Returns the path of ``dataset:NAME/FILE``, a file or folder shipped with a card; other paths stay as they are.

    ``example:NAME`` is a potential or a structure of ``md``, by its name without suffix.

    Raises:
        ConfigError: no such card.
        DataError: the card has no such file, or there is no such example.
    """
    text = os.fspath(path)
    if text.startswith(EXAMPLE_PREFIX):
        examples = {**list_examples("model"), **list_examples("structure")}
        if text.removeprefix(EXAMPLE_PREFIX) not in examples:
            raise DataError(f"{text} does not exist: examples are {', '.join(examples)}")
        return examples[text.removeprefix(EXAMPLE_PREFIX)]
    if not text.startswith(DATASET_PREFIX):
        return Path(path)
    name, _, file = text.removeprefix(DATASET_PREFIX).partition("/")
    folder = dataset_card(name).path
    held = sorted(entry.relative_to(folder).as_posix() for entry in folder.rglob("*") if entry.name != "__pycache__")
    if file.rstrip("/") not in held:
        raise DataError(f"{text} does not exist: the card of {name} holds {', '.join(held)}")
    return folder / file


def sample_levels(paths: Iterable[str]) -> set[str]:
    """Returns the levels of theory of those of the paths that are ``dataset:NAME/FILE``; errors as ``resolve``."""
    names = {path[len(DATASET_PREFIX) :].partition("/")[0] for path in paths if path.startswith(DATASET_PREFIX)}
    samples = [dataset_card(name).manifest.get("sample", {}) for name in names]
    return {str(sample["level_of_theory"]) for sample in samples if "level_of_theory" in sample}


def model_file(path: str | os.PathLike[str]) -> Path:
    """Returns the file that a model is read from.

    Raises:
        CheckpointError: it does not exist.
        DataError: as ``resolve``.
    """
    file = Path(resolve(path))
    if not file.is_file():
        raise CheckpointError(f"model file {file} does not exist: pass a .ckpt or .escaip file")
    return file


def list_examples(kind: str) -> dict[str, Path]:
    """Returns the examples that ``example:NAME`` names, by name.

    Args:
        kind: ``"model"`` or ``"structure"``.
    """
    folder = resource_dir("md") / ("potentials" if kind == "model" else "structures")
    return {file.stem: file for file in sorted(folder.glob("[!.]*")) if file.suffix != ".md"}
