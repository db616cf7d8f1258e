"""Measured tiles in files: those of the user's ``escaip tune``, and those that the package ships.

A file serves one device, one version of Triton and one state of the kernels. It is read once per process, at the first
launch on its device, so that a process computes the same bits throughout.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import tempfile
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton

from escaip.errors import ConfigError, DataError
from escaip.ops.native.build import cache_folder
from escaip.ops.triton.tiles import KERNELS, MODES, SIZES, USES, Tile, TileKey

SCHEMA = 1
SHIPPED = Path(__file__).parent / "measured"
SOURCES = ("backward_kernels", "chunks", "double_backward_kernels", "forward_kernels", "pieces")
_WARPS = (1, 2, 4, 8, 16, 32)
_LARGEST = 256  # tokens of a side
_DEEPEST = 8  # stages


@dataclass(frozen=True)
class Identity:
    """What a file is measured for.

    Attributes:
        device: name of the GPU.
        arch: its compute capability times ten.
        triton: version of Triton.
        kernels: digest of the kernels' source.
    """

    device: str
    arch: int
    triton: str
    kernels: str

    @property
    def stem(self) -> str:
        """Name of its file in the user's cache, without the suffix."""
        return f"{self.slug}-triton-{self.triton}-{self.kernels}"

    @property
    def slug(self) -> str:
        """Name of its file in the package, without the suffix."""
        return re.sub(r"[^A-Za-z0-9.]+", "-", self.device).strip("-")


@dataclass(frozen=True)
class Entry:
    """A tile that was the fastest, with its time and that of the table's tile in ms (None: it did not run)."""

    key: TileKey
    tile: Tile
    ms: float
    default_ms: float | None


@dataclass(frozen=True)
class MeasuredTiles:
    """What holds on a device: ``entries`` of ``files``, the first file first."""

    entries: tuple[Entry, ...] = ()
    files: tuple[Path, ...] = ()

    @functools.cached_property
    def _by_kind(self) -> dict[tuple[Any, ...], list[Entry]]:
        kinds: dict[tuple[Any, ...], list[Entry]] = {}
        for entry in self.entries:
            kinds.setdefault(entry.key.kind, []).append(entry)
        return kinds

    def find(self, key: TileKey) -> Tile | None:
        """The tile measured with the fewest columns of its kind that are at least those of the key: it fits these."""
        enough = [entry for entry in self._by_kind.get(key.kind, ()) if entry.key.columns >= key.columns]
        return min(enough, key=lambda entry: entry.key.columns).tile if enough else None


def digest_of(folder: Path) -> str:
    """Of the kernels' source in a folder."""
    digest = hashlib.sha256()
    for name in SOURCES:
        digest.update(name.encode() + (folder / f"{name}.py").read_bytes())
    return digest.hexdigest()[:12]


@functools.cache
def kernels_digest() -> str:
    """Changes with whatever is compiled."""
    return digest_of(Path(__file__).parent)


def identity_of(device: torch.device) -> Identity:
    """Of a CUDA device, and of the kernels as they are."""
    major, minor = torch.cuda.get_device_capability(device)
    return Identity(torch.cuda.get_device_name(device), 10 * major + minor, triton.__version__, kernels_digest())


def user_file(identity: Identity) -> Path | None:
    """Where the user's tiles are; None where there is no cache.

    Raises:
        ConfigError: the cache belongs to another user.
    """
    folder = cache_folder("tiles")
    return None if folder is None else folder / f"{identity.stem}.json"


def measured_tiles(device: torch.device) -> MeasuredTiles:
    """The tiles measured for a CUDA device; of a file that cannot be used a warning says so."""
    index = torch.cuda.current_device() if device.index is None else device.index
    return _of_index(index)


def forget() -> None:
    """Reads the files again at the next launch."""
    _of_index.cache_clear()


@functools.cache
def _of_index(index: int) -> MeasuredTiles:
    return load(identity_of(torch.device("cuda", index)))


def load(identity: Identity) -> MeasuredTiles:
    """The user's file before the shipped one; a warning for each that is there and cannot be used."""
    entries: dict[TileKey, Entry] = {}
    files: list[Path] = []
    for find in (user_file, _shipped_file):
        try:
            path = find(identity)
            if path is None or not path.is_file():
                continue
            found = read(path, identity, any_patch=find is _shipped_file)
        except (ConfigError, DataError) as error:
            warnings.warn(f"{error}; until then attention takes other tiles", stacklevel=2)
            continue
        files.append(path)
        entries = {**{entry.key: entry for entry in found}, **entries}
    return MeasuredTiles(tuple(entries.values()), tuple(files))


def _shipped_file(identity: Identity) -> Path | None:
    """That of the device, where it was measured with a Triton of the same major and minor version."""
    path = SHIPPED / f"{identity.slug}.json"
    if path.is_file() and _minor(_content(path).get("triton")) != _minor(identity.triton):
        return None
    return path


def read(path: Path, identity: Identity, any_patch: bool = False) -> list[Entry]:
    """The entries of a file.

    Args:
        path: the file.
        identity: what it must be measured for.
        any_patch: whether a Triton will do whose version differs behind the second point.

    Raises:
        DataError: damaged, or measured for another device, Triton or state of the kernels.
    """
    content = _content(path)
    if any_patch and _minor(content.get("triton")) == _minor(identity.triton):
        identity = replace(identity, triton=content["triton"])
    try:
        for name, expected in vars(identity).items():
            _expect(content.get(name) == expected, f"{name} is {content.get(name)!r} there and {expected!r} here")
        _expect(isinstance(content.get("tiles"), list), "no list of tiles")
        return [_parse(item) for item in content["tiles"]]
    except ValueError as error:
        raise _unusable(path, error) from error


def _content(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        _expect(isinstance(content, dict) and content.get("schema") == SCHEMA, f"no tiles of schema {SCHEMA}")
    except (OSError, ValueError) as error:  # JSON's and Unicode's errors are of the second kind
        raise _unusable(path, error) from error
    return dict(content)


def _unusable(path: Path, error: Exception) -> DataError:
    return DataError(f"tiles in {path} cannot be used ({error}): delete the file or run escaip tune")


def _minor(version: object) -> list[str]:
    return str(version).split(".")[:2]


def write(path: Path, identity: Identity, entries: Iterable[Entry]) -> None:
    """Adds entries to a file, in the place of those with the same keys; a file that cannot be used is replaced."""
    try:
        kept = {entry.key: entry for entry in read(path, identity)} if path.is_file() else {}
    except DataError:
        kept = {}
    kept |= {entry.key: entry for entry in entries}
    content = {"schema": SCHEMA, **vars(identity), "tiles": [_item(entry) for entry in kept.values()]}
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, aside = tempfile.mkstemp(prefix=f"{path.stem}-", suffix=".json", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(_lines(content))
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(aside, path)
    finally:
        Path(aside).unlink(missing_ok=True)


def _item(entry: Entry) -> dict[str, Any]:
    tile = [entry.tile.own, entry.tile.other, entry.tile.warps, entry.tile.stages]
    return {**vars(entry.key), "tile": tile, "ms": entry.ms, "default_ms": entry.default_ms}


def _lines(content: dict[str, Any]) -> str:
    """JSON with a line for each tile."""
    *head, last = (f" {json.dumps(name)}: {json.dumps(value)}" for name, value in content.items() if name != "tiles")
    tiles = ",\n".join(f"  {json.dumps(item)}" for item in content["tiles"])
    return "{\n" + ",\n".join([*head, last]) + f',\n "tiles": [\n{tiles}\n ]\n}}\n'


def _parse(item: Any) -> Entry:
    """An entry from JSON; raises ValueError for what no tuner writes."""
    _expect(isinstance(item, dict), "a tile is no object")
    choices = {"kernel": KERNELS, "use": USES, "mode": MODES, "own": SIZES, "other": SIZES}
    for name, allowed in choices.items():
        _expect(item.get(name) in allowed, f"{name} {item.get(name)!r} does not exist")
    widest, columns, numbers = item.get("widest"), item.get("columns"), item.get("tile")
    _expect(_is_count(widest) and _is_count(columns), f"columns are {widest!r} and {columns!r}")
    valid = isinstance(numbers, list) and len(numbers) == 4 and all(map(_is_count, numbers))
    _expect(valid, f"tile {numbers!r} is not four counts")
    tile = Tile(*numbers)
    sides = all(side & (side - 1) == 0 and 16 <= side <= _LARGEST for side in (tile.own, tile.other))
    _expect(sides, f"a side of tile {numbers} is no power of two from 16 to {_LARGEST}")
    _expect(tile.warps in _WARPS and tile.stages <= _DEEPEST, f"warps or stages of tile {numbers} do not exist")
    ms, default_ms = item.get("ms"), item.get("default_ms")
    _expect(_is_time(ms) and (default_ms is None or _is_time(default_ms)), f"times are {ms!r} and {default_ms!r}")
    key = TileKey(widest=widest, columns=columns, **{name: item[name] for name in choices})
    return Entry(key, tile, ms, default_ms)


def _is_count(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and x > 0


def _is_time(x: Any) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool) and x > 0


def _expect(fine: bool, otherwise: str) -> None:
    if not fine:
        raise ValueError(otherwise)
