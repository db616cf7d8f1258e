"""Native files into a prepared store: in parallel, in bounded memory, and again after a kill where it was.

The files are divided into parts. Each part is read, checked and written to a folder of its own, which takes its name
when it is whole; the work folder ``.NAME.work`` beside the store keeps them until all are there. The same command
run again keeps the whole parts and makes the others. Then the shards move into the store, the index is joined,
splits and statistics are made from it, and the store takes its name.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from escaip.data.prepare_parts import Reading, Recipe, WorkItem, make_parts, part_folder
from escaip.data.readers import READERS, PathLike, list_files
from escaip.data.readers.policy import ReadReport
from escaip.data.shards import PRECISIONS, Arrays, disk_errors, read_text, write_bytes
from escaip.data.splits import PARTS, SplitSettings, assign_parts
from escaip.data.statistics import fit_index_statistics
from escaip.data.store import Store
from escaip.data.store_index import count_duplicates, index_histograms
from escaip.data.store_writer import (
    DEFAULT_SHARD_ATOMS,
    SCHEMA_VERSION,
    SplitCodes,
    assemble,
    check_target,
    publish,
    read_part,
)
from escaip.data.structure import LabelKeys
from escaip.errors import ConfigError, DataError
from escaip.files import DATASET_PREFIX, list_datasets, resolve

PART_SIZE = 5_000
"""Structures of a part, where a file can be divided: what a kill can cost each worker."""
SKIPPED = "skipped.txt"


@dataclass(frozen=True)
class PrepareReport:
    """What became of the files.

    Attributes:
        path: the store.
        written: structures in it.
        skipped: bad structures left out; every reason is in ``skipped.txt`` of the store.
        filtered: structures left out by a filter.
        kept_parts: parts that an earlier, interrupted run had finished.
        splits: structures of each split.
        duplicates: structures that occur again in another split.
        messages: the first reasons for leaving out.
        seconds: it took.
    """

    path: Path
    written: int
    skipped: int
    filtered: int
    kept_parts: int
    splits: dict[str, int]
    duplicates: int
    messages: tuple[str, ...]
    seconds: float

    def summary(self) -> str:
        """A few lines."""
        lines = [
            f"{self.path}: {self.written} structures written, {self.skipped} skipped, {self.filtered} filtered out, "
            f"in {self.seconds:.1f} s"
        ]
        if list(self.splits) != ["all"]:
            lines.append("splits: " + ", ".join(f"{name} {count}" for name, count in self.splits.items()))
        if self.kept_parts:
            lines.append(f"{self.kept_parts} parts were there from an earlier run")
        if self.duplicates:
            lines.append(
                f"warning: {self.duplicates} structures of other splits are also in {next(iter(self.splits))}: "
                "errors on them say little; split by group, or remove them"
            )
        if self.messages:
            lines.append(f"first left out: {self.messages[0]} (all in {SKIPPED})")
        return "\n".join(lines)


def prepare(
    source: PathLike | Sequence[PathLike] | Mapping[str, PathLike | Sequence[PathLike]],
    out: PathLike,
    *,
    format: str | None = None,
    reading: Reading | None = None,
    split: SplitSettings | Mapping[str, Any] | None = None,
    seed: int = 0,
    workers: int = 1,
    dtype: str = "float64",
    shard_atoms: int = DEFAULT_SHARD_ATOMS,
    part_size: int = PART_SIZE,
    overwrite: bool = False,
    restart: bool = False,
    progress: bool = False,
    facts: Mapping[str, Any] | None = None,
) -> PrepareReport:
    """Makes a prepared store of native files.

    Args:
        source: path, pattern or list of them, or a mapping of them by split (``{"train": ..., "val": ...}``) for sets
            that come divided.
        out: directory to create.
        format: layout of the files; default found from each.
        reading: labels, units and policies.
        split: ``{by: group | structure, val: ..., test: ...}`` to divide what does not come divided.
        seed: of the split.
        workers: processes.
        dtype: of forces and stress in the store.
        shard_atoms: atoms of a shard.
        part_size: structures of a part, where a file can be divided.
        overwrite: replace a store that is there.
        restart: throw away what an interrupted run with other settings left.
        progress: show a bar.
        facts: further entries of the manifest (name of the set, level of theory), plain JSON values.

    Raises:
        DataError: unreadable data, 0 structures, a full disk, work of another plan in the way, another process at
            work. Whole parts stay for the next run.
        ConfigError: an option that cannot be used.
    """
    began = time.perf_counter()
    reading, target = reading or Reading(), Path(out)
    recipe = Recipe(reading, dtype, shard_atoms)
    settings = SplitSettings.parse(split) if split is not None else None
    _check_settings(recipe, workers, settings, source)
    check_target(target, overwrite)
    names = list(source) if isinstance(source, Mapping) else ["all"]
    items = _plan(source, names, format, reading, part_size)
    work = target.parent / f".{target.name}.work"
    with disk_errors(target, "whole parts were kept for the next run"), _locked(work, target):
        _check_plan(work, items, [asdict(recipe), part_size, SCHEMA_VERSION], restart)
        kept = sum(read_part(part_folder(work, item.number)) is not None for item in items)
        make_parts(work, items, recipe, workers, progress=progress)
        parts = [part_folder(work, item.number) for item in items]
        reports = [read_part(folder) or {} for folder in parts]
        messages = [message for report in reports for message in report["messages"]]
        counts = {key: sum(report[key] for report in reports) for key in ("skipped", "filtered")}
        store = work / "store"
        divide = _splitter(names, items, reports, settings, seed)
        about = {"read": counts, **(facts or {})}
        manifest = assemble(parts, store, dtype=dtype, source=_describe(source), split=divide, **about)
        if messages:
            write_bytes(store / SKIPPED, "".join(f"{message}\n" for message in messages).encode())
        duplicates = _finish(store)
        publish(store, target)
    return PrepareReport(
        path=target,
        written=manifest["num_structures"],
        skipped=counts["skipped"],
        filtered=counts["filtered"],
        kept_parts=kept,
        splits=manifest["splits"],
        duplicates=duplicates,
        messages=tuple(messages[:20]),
        seconds=time.perf_counter() - began,
    )


def _check_settings(recipe: Recipe, workers: int, split: SplitSettings | None, source: Any) -> None:
    """What can be refused before any file is opened."""
    if workers < 1:
        raise ConfigError(f"workers: {workers} is not a positive number")
    if recipe.dtype not in PRECISIONS:
        raise ConfigError(f"dtype: {recipe.dtype!r} is not {' or '.join(PRECISIONS)}")
    LabelKeys.parse(recipe.reading.keys)
    recipe.reading.policy(ReadReport())
    if split is not None and isinstance(source, Mapping):
        raise ConfigError("split: the sources are named by split already; name them or divide them, not both")


def prepare_named(
    name: str, sources: Sequence[str], out: PathLike, *, options: Mapping[str, Any], **settings: Any
) -> PrepareReport:
    """:func:`prepare` for files of a data set with a card, or of a layout.

    Args:
        name: of a card (``escaip data list``), whose layouts, labels and options are the defaults, or of a layout in
            :data:`escaip.data.readers.READERS`.
        sources: paths, each bare or as ``SPLIT=PATH``.
        out: directory to create.
        options: arguments of :func:`escaip.data.open_source`, those of the layout among them.
        **settings: of :func:`prepare`.

    Raises:
        ConfigError: neither a card nor a layout, or paths with and without a split.
        DataError: as :func:`prepare`; or files of another layout than the set's.
    """
    cards = {card.name: card for card in list_datasets()}
    facts: dict[str, Any] = {"dataset": name}
    merged = dict(options)
    if name in cards:
        about = cards[name].manifest["dataset"]
        # The sample that comes with a card has labels of its own.
        is_sample = any(DATASET_PREFIX in source for source in sources)
        described = cards[name].manifest.get("sample", {}) if is_sample else about
        facts["level_of_theory"] = described.get("level_of_theory", "")
        # What a card says of labels and options is meant for the layout that it names.
        given = _by_split(sources)
        listed = [path for paths in given.values() for path in paths] if isinstance(given, dict) else given
        if {file.source for file in list_files(listed, merged.get("format"))} == {about.get("format")}:
            merged = {**about.get("options", {}), **merged}
            if "keys" in about:
                merged["keys"] = {**about["keys"], **merged.get("keys", {})}
    elif name in READERS:
        facts = {"dataset": ""}
        merged["format"] = name
    else:
        raise ConfigError(
            f"{name!r} is neither a data set ({', '.join(cards)}) nor a layout ({', '.join(READERS)}): choose one"
        )
    known = {item.name for item in fields(Reading)} - {"options"}
    layout = merged.pop("format", None)
    reading = Reading(
        **{key: value for key, value in merged.items() if key in known},
        options={key: value for key, value in merged.items() if key not in known},
    )
    return prepare(_by_split(sources), out, format=layout, reading=reading, facts=facts, **settings)


def _by_split(sources: Sequence[str]) -> list[Path] | dict[str, list[Path]]:
    """Paths, or paths by split for ``train=PATH``; a path that exists is never taken for one with a split."""
    pairs = [("", text) if Path(text).exists() else text.partition("=")[::2] for text in sources]
    pairs = [(name, path) if path else ("", name) for name, path in pairs]
    if not any(name for name, _ in pairs):
        return [resolve(path) for _, path in pairs]
    if not all(name for name, _ in pairs):
        bare = next(path for name, path in pairs if not name)
        raise ConfigError(f"{bare}: has no split while others do; write train={bare} or drop the splits")
    named: dict[str, list[Path]] = {}
    for name, path in pairs:
        named.setdefault(name, []).append(resolve(path))
    return named


def _plan(source: Any, names: Sequence[str], format: str | None, reading: Reading, part_size: int) -> list[WorkItem]:
    """The parts, in order. A limit is counted through all files, so that it makes one part of each split."""
    items: list[WorkItem] = []
    for code, name in enumerate(names):
        files = list_files(source[name] if isinstance(source, Mapping) else source, format)
        if reading.limit is not None:
            items.append(WorkItem(len(items), tuple(files), None, code))
            continue
        for file in files:
            divided = file.parts(part_size) if "index" not in reading.options else []
            for part in divided or [None]:
                items.append(WorkItem(len(items), (file,), part, code))
    return items


def _check_plan(work: Path, items: Sequence[WorkItem], settings: Any, restart: bool) -> None:
    """Keeps the parts whose files are unchanged; refuses to mix parts made with other options."""
    described = [
        [item.split, item.part, [[file.source, file.name, _stamp(file.path)] for file in item.files]] for item in items
    ]
    plan = json.loads(json.dumps({"settings": settings, "items": described}, default=list))
    file = work / "plan.json"
    if file.is_file():
        before = json.loads(file.read_text(encoding="utf-8"))
        if before["settings"] != plan["settings"] and not restart:
            raise DataError(
                f"{work}: holds unfinished work with other options; run that command again to finish it, or add "
                "--restart to throw it away"
            )
        same = before["settings"] == plan["settings"]
        stale = [k for k, entry in enumerate(before["items"]) if not same or entry not in plan["items"][k : k + 1]]
        for number in stale:
            shutil.rmtree(part_folder(work, number), ignore_errors=True)
        if stale:
            shutil.rmtree(work / "store", ignore_errors=True)
    write_bytes(file, json.dumps(plan).encode())


def _stamp(path: Path) -> list[Any]:
    """What changes when a file does."""
    paths = [path] if path.is_file() else sorted(entry for entry in path.iterdir() if entry.is_file())
    return [[entry.name, entry.stat().st_size, entry.stat().st_mtime_ns] for entry in paths]


def _splitter(
    names: Sequence[str],
    items: Sequence[WorkItem],
    reports: Sequence[dict[str, Any]],
    settings: SplitSettings | None,
    seed: int,
) -> SplitCodes:
    """Splits as the sources name them, or as the settings divide them."""

    def named(index: Arrays) -> tuple[list[str], NDArray[np.uint8]]:
        counts = [sum(shard["num_structures"] for shard in report["shards"]) for report in reports]
        return list(names), np.repeat(np.array([item.split for item in items], dtype="u1"), counts)

    def divided(index: Arrays) -> tuple[list[str], NDArray[np.uint8]]:
        assert settings is not None
        if settings.by == "structure":
            count = len(index["natoms"])
            codes = assign_parts([str(k) for k in range(count)], np.ones(count), settings, seed=seed)
        else:
            groups = [read_text(index, "group", code) for code in range(len(index["group_offsets"]) - 1)]
            counts = np.bincount(index["group_codes"], minlength=len(groups))
            codes = assign_parts(groups, counts, settings, seed=seed)[index["group_codes"]]
        kept = np.unique(codes)  # a part that was not asked for has no name
        return [PARTS[code] for code in kept.tolist()], np.searchsorted(kept, codes).astype(np.uint8)

    return named if settings is None else divided


def _finish(store: Path) -> int:
    """Statistics and histograms of the first split into ``statistics.json``; returns the number of duplicates."""
    opened = Store(store)
    first = opened.split_indices(opened.splits[0])
    if len(first) == 0:
        raise DataError(f"{store}: 0 structures in the split {opened.splits[0]}; check the source, filters and split")
    statistics = fit_index_statistics(opened.index, first, require_energy=False)
    duplicates = count_duplicates(opened.index)
    content = {
        "split": opened.splits[0],
        "statistics": statistics.to_dict(),
        "histograms": index_histograms(opened.index, first, statistics.element_references),
        "duplicates_across_splits": duplicates,
    }
    write_bytes(store / "statistics.json", json.dumps(content, indent=1).encode())
    return duplicates


def _describe(source: Any) -> str:
    if isinstance(source, Mapping):
        return "; ".join(f"{name}={_describe(given)}" for name, given in source.items())
    given = [source] if isinstance(source, str | os.PathLike) else source
    return ", ".join(os.fspath(item) for item in given)


@contextmanager
def _locked(work: Path, target: Path) -> Iterator[None]:
    """One process at a time; the lock of a killed one is gone with it. The folder goes when the work is done."""
    work.mkdir(parents=True, exist_ok=True)
    with open(work / "lock", "w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise DataError(f"{target}: another process is preparing it; wait for that one") from error
        try:
            yield
        except BaseException:
            if not any(work.glob("part-*/shard-*")):  # nothing to go on with
                shutil.rmtree(work, ignore_errors=True)
            raise
        shutil.rmtree(work, ignore_errors=True)
