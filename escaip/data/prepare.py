"""Native files into a prepared store: in parallel, in bounded memory, and resumed after a kill.

The files are divided into parts. Each part is read, checked and written to a folder of its own, which takes its name
once it is whole; the work folder ``.NAME.work`` beside the store keeps the parts. The same command run again keeps
whole parts and makes the others. Then the shards are linked into the store, the indices are joined, splits and
statistics are made, and the store takes its name.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from escaip.data.readers import READERS, DataFile, PathLike, Reading, ReadReport, list_files
from escaip.data.readers.policy import Part
from escaip.data.splits import PARTS, SplitSettings, divide
from escaip.data.statistics import TrainingSums
from escaip.data.store import SCHEMA_VERSION, Arrays, Store, group_names
from escaip.data.store_writer import (
    DEFAULT_SHARD_ATOMS,
    PartWriter,
    assemble,
    check_target,
    disk_errors,
    publish,
    read_part,
)
from escaip.errors import ConfigError, DataError
from escaip.files import DATASET_PREFIX, list_datasets, resolve, try_lock, write_json
from escaip.types import TARGETS, Target, register_target

PART_SIZE = 5_000
"""Structures of a part, where a file can be divided: a kill costs each worker at most these."""
SKIPPED = "skipped.txt"
_KEPT = "whole parts were kept for the next run"
_MAKING = "making-"


@dataclass(frozen=True)
class WorkItem:
    """One part of the work.

    Attributes:
        folder: where the part is once it is whole.
        files: one file, or all of a split when a limit is counted through them.
        part: range of the one file; None for all of it.
        split: code of its split.
    """

    folder: Path
    files: tuple[DataFile, ...]
    part: Part | None
    split: int

    def make(self, reading: Reading, dtype: str, shard_atoms: int) -> None:
        """Reads the part into a folder aside and gives it its name."""
        messages: list[str] = []
        report = ReadReport(log=messages.append)
        aside = self.folder.with_name(f"{_MAKING}{self.folder.name}-{os.getpid()}")
        with disk_errors(self.folder.parent, _KEPT):
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir()
            writer = PartWriter(aside, dtype=dtype, shard_atoms=shard_atoms)
            for data in reading.stream(self.files, report, self.part):
                writer.write(data)
            writer.close(
                skipped=report.skipped, filtered=report.filtered, messages=messages, absent=report.absent,
                first_absent=report.first_absent, levels=sorted(report.levels),
            )  # fmt: skip
            try:
                os.replace(aside, self.folder)
            except OSError:
                # A worker of a killed run may have outlived it and come first; its part is as good.
                if read_part(self.folder) is None:
                    raise
                shutil.rmtree(aside)

    def describe(self) -> list[Any]:
        """Returns JSON values that change when the files do."""
        stamps = []
        for file in self.files:
            path = file.path
            entries = [path] if path.is_file() else sorted(entry for entry in path.iterdir() if entry.is_file())
            facts = [[entry.name, entry.stat().st_size, entry.stat().st_mtime_ns] for entry in entries]
            stamps.append([file.reader, file.name, facts])
        return [self.split, self.part and [*self.part], stamps]


@dataclass(frozen=True)
class PrepareReport:
    """Outcome of a preparation.

    Attributes:
        path: the store.
        written: structures in it.
        skipped: bad structures left out; every reason is in ``skipped.txt`` of the store.
        filtered: structures left out by a filter.
        kept_parts: parts that an earlier, interrupted run had finished.
        splits: structures of each split.
        duplicates: structures that occur again in another split.
        absent: structures without a label whose key was named, by target.
        messages: the first reasons for leaving out.
        seconds: duration.
    """

    path: Path
    written: int
    skipped: int
    filtered: int
    kept_parts: int
    splits: dict[str, int]
    duplicates: int
    absent: dict[str, int]
    messages: tuple[str, ...]
    seconds: float

    def summary(self) -> str:
        """Returns a few lines."""
        lines = [
            f"{self.path}: {self.written} structures written, {self.skipped} skipped, {self.filtered} filtered out, "
            f"in {self.seconds:.1f} s"
        ]
        if list(self.splits) != ["all"]:
            lines.append("splits: " + ", ".join(f"{name} {count}" for name, count in self.splits.items()))
        if self.absent:
            lines.append("structures " + ", ".join(f"without {target} {n}" for target, n in self.absent.items()))
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
    overwrite: bool = False,
    restart: bool = False,
    progress: bool = False,
    facts: Mapping[str, Any] | None = None,
) -> PrepareReport:
    """Makes a prepared store of native files.

    Args:
        source: path, pattern or list of them, or a mapping of them by split (``{"train": ..., "val": ...}``) for sets
            that come divided.
        out: folder to create.
        format: layout of the files; default found from each.
        reading: labels, units and policies.
        split: ``{by: group | structure, val: ..., test: ...}`` to divide a set that does not come divided.
        seed: of the split.
        workers: processes.
        dtype: of forces and stress in the store.
        shard_atoms: atoms of a shard.
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
    settings = SplitSettings.parse(split) if split is not None else None
    if workers < 1:
        raise ConfigError(f"workers: {workers} is not a positive number")
    if settings is not None and isinstance(source, Mapping):
        raise ConfigError("split: the sources are named by split already; name them or divide them, not both")
    # Wrong settings are refused before any file is opened.
    PartWriter(target, dtype=dtype, shard_atoms=shard_atoms)
    reading.stream([], ReadReport())
    check_target(target, overwrite)
    work = target.parent / f".{target.name}.work"
    sources = dict(source) if isinstance(source, Mapping) else {"all": source}
    items = _plan(work, sources, format, reading)
    with disk_errors(target, _KEPT), _locked(work, target):
        recipe = [asdict(reading), dtype, shard_atoms, PART_SIZE, SCHEMA_VERSION, list(TARGETS)]
        _check_plan(work, items, recipe, restart)
        kept = sum(read_part(item.folder) is not None for item in items)
        _make_parts(work, items, (reading, dtype, shard_atoms), workers, progress=progress)
        reports = [read_part(item.folder) or {} for item in items]
        messages = [message for report in reports for message in report["messages"]]
        sizes = [sum(shard["num_structures"] for shard in report["shards"]) for report in reports]
        total = _joined(reports, sum(sizes))
        _check_absent(total, items)
        counts = {"skipped": total.skipped, "filtered": total.filtered}
        facts = dict(facts or {})
        if level := total.level_of_theory(_described(source), facts.get("level_of_theory", "")):
            facts["level_of_theory"] = level
        named = np.repeat(np.array([item.split for item in items], dtype="u1"), sizes)
        about = {
            "read": {**counts, "absent": total.absent}, **facts, "dtype": dtype, "source": _described(source),
            "split": lambda index: (list(sources), named) if settings is None else _divided(index, settings, seed),
        }  # fmt: skip
        manifest = assemble([item.folder for item in items], work / "store", **about)
        duplicates = _finish(work / "store", messages)
        publish(work / "store", target)
    return PrepareReport(
        target, manifest["num_structures"], **counts, kept_parts=kept, splits=manifest["splits"], duplicates=duplicates,
        absent=total.absent, messages=tuple(messages[:20]), seconds=time.perf_counter() - began,
    )  # fmt: skip


def _check_absent(total: ReadReport, items: Sequence[WorkItem]) -> None:
    """Raises DataError where a named key is in no structure, mistyped for instance: no run can use these parts."""
    try:
        total.check_absent()
    except DataError:
        for item in items:
            shutil.rmtree(item.folder, ignore_errors=True)
        raise


def _joined(reports: Sequence[Mapping[str, Any]], read: int) -> ReadReport:
    """Returns what was read of all parts together."""
    counts = {key: sum(report[key] for report in reports) for key in ("skipped", "filtered")}
    total = ReadReport(read=read, **counts)
    for report in reports:
        total.levels.update(report.get("levels", ()))
        for label, count in report.get("absent", {}).items():
            total.absent[label] = total.absent.get(label, 0) + count
            total.first_absent.setdefault(label, report["first_absent"][label])
    return total


def _divided(index: Arrays, settings: SplitSettings, seed: int) -> tuple[list[str], NDArray[np.uint8]]:
    """Returns names of splits, and that of each structure."""
    codes = divide(group_names(index), index["group_codes"], settings, seed=seed)
    present = np.unique(codes)  # a part that was not asked for has no name
    return [PARTS[code] for code in present.tolist()], np.searchsorted(present, codes).astype(np.uint8)


def prepare_named(
    name: str, sources: Sequence[str], out: PathLike, *, options: Mapping[str, Any], **settings: Any
) -> PrepareReport:
    """Runs ``prepare`` on files of a data set with a card, or of a layout.

    ``name`` is that of a card, whose layout, labels and options are the defaults, or of a layout in ``READERS``;
    ``sources`` are paths, each bare or as ``SPLIT=PATH``; ``options`` are those of ``escaip.data.open_source``.

    Raises:
        ConfigError: neither a card nor a layout, or paths with and without a split.
        DataError: as ``prepare``; or files of another layout than the set's.
    """
    cards = {card.name: card for card in list_datasets()}
    merged, facts, given = dict(options), {"dataset": name}, _by_split(sources)
    if name in cards:
        about = cards[name].manifest["dataset"]
        # The sample that comes with a card has labels of its own.
        is_sample = any(DATASET_PREFIX in source for source in sources)
        described = cards[name].manifest.get("sample", {}) if is_sample else about
        facts["level_of_theory"] = described.get("level_of_theory", "")
        facts |= {key: described[key] for key in ("licence", "citation") if key in described}
        # Labels and options of a card are meant for the layout that it names.
        listed = [*chain.from_iterable(given.values())] if isinstance(given, dict) else given
        if {file.reader for file in list_files(listed, merged.get("format"))} == {about.get("format")}:
            merged = {**about.get("options", {}), **merged}
            if "keys" in about:
                merged["keys"] = {**about["keys"], **merged.get("keys", {})}
    elif name in READERS:
        facts, merged["format"] = {"dataset": ""}, name
    else:
        raise ConfigError(
            f"{name!r} is neither a data set ({', '.join(cards)}) nor a layout ({', '.join(READERS)}): choose one"
        )
    layout, known = merged.pop("format", None), {item.name for item in fields(Reading)} - {"options"}
    own = {key: merged.pop(key) for key in [*merged] if key not in known}
    return prepare(given, out, format=layout, reading=Reading(**merged, options=own), facts=facts, **settings)


def _by_split(sources: Sequence[str]) -> list[Path] | dict[str, list[Path]]:
    """Returns paths, or paths by split for ``train=PATH``; an existing path is never taken for one with a split."""
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


def _described(source: Any) -> str:
    if isinstance(source, Mapping):
        return "; ".join(f"{name}={_described(given)}" for name, given in source.items())
    return ", ".join(os.fspath(item) for item in ([source] if isinstance(source, str | os.PathLike) else source))


def _plan(work: Path, sources: Mapping[str, Any], format: str | None, reading: Reading) -> list[WorkItem]:
    """Returns the parts, in order. A limit is counted through all files, so that it makes one part of each split."""
    found: list[tuple[tuple[DataFile, ...], Part | None, int]] = []
    for code, source in enumerate(sources.values()):
        files = list_files(source, format)
        if reading.limit is not None:
            found.append((tuple(files), None, code))
            continue
        for file in files:
            divided = file.parts(PART_SIZE) if "index" not in reading.options else []
            found += [((file,), part, code) for part in divided or [None]]
    return [WorkItem(work / f"part-{number:06d}", *facts) for number, facts in enumerate(found)]


def _check_plan(work: Path, items: Sequence[WorkItem], settings: list[Any], restart: bool) -> None:
    """Keeps the parts whose files are unchanged; refuses to mix parts made with other options."""
    plan = json.loads(json.dumps({"settings": settings, "items": [item.describe() for item in items]}, default=list))
    file = work / "plan.json"
    before = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else plan
    same = before["settings"] == plan["settings"]
    if not same and not restart and _has_structures(work):
        raise DataError(
            f"{work}: holds unfinished work with other options; run that command again to finish it, or add --restart "
            "to throw it away"
        )
    for number, entry in enumerate(before["items"]):
        if not same or entry not in plan["items"][number : number + 1]:
            shutil.rmtree(work / f"part-{number:06d}", ignore_errors=True)
            shutil.rmtree(work / "store", ignore_errors=True)
    write_json(file, plan)


def _make_parts(
    work: Path, items: Sequence[WorkItem], recipe: tuple[Reading, str, int], workers: int, *, progress: bool
) -> None:
    """Makes the parts that are not there; after an error the other parts that are whole stay."""
    for leftover in work.glob(f"{_MAKING}*"):
        # Renamed first: a worker that outlives its killed run could give the folder its name while it is emptied.
        gone = leftover.with_name(f"gone-{leftover.name}-{os.getpid()}")
        with suppress(FileNotFoundError):
            os.replace(leftover, gone)
        shutil.rmtree(gone, ignore_errors=True)
    todo = [item for item in items if read_part(item.folder) is None]
    with tqdm(total=len(items), initial=len(items) - len(todo), unit=" parts", disable=not progress) as bar:
        if workers == 1 or len(todo) <= 1:
            for item in todo:
                item.make(*recipe)
                bar.update()
            return
        # Spawned, not forked: handles of HDF5 and LMDB and threads must not be inherited.
        pool = ProcessPoolExecutor(
            min(workers, len(todo)),
            mp_context=get_context("spawn"),
            initializer=_start_worker,
            initargs=(os.getpid(), list(TARGETS.values())),
        )
        running: set[Future[None]] = set()
        try:
            for number, item in enumerate(todo, 1):
                running.add(pool.submit(item.make, *recipe))
                # A few ahead of the workers: a data set may have tens of thousands of parts.
                while running and (number == len(todo) or len(running) >= 2 * workers):
                    done, running = wait(running, return_when=FIRST_COMPLETED)
                    for future in done:
                        future.result()
                        bar.update()
        finally:
            pool.shutdown(cancel_futures=True)


def _start_worker(parent: int, targets: Sequence[Target]) -> None:
    """Registers the parent's targets, and ends this worker when the parent is gone, killed for instance."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    for target in targets:
        register_target(target)
    threading.Thread(target=watch, daemon=True).start()


def _finish(path: Path, messages: Sequence[str]) -> int:
    """Writes statistics of the first split; returns how many structures of it occur in others too."""
    if messages:
        (path / SKIPPED).write_text("".join(f"{message}\n" for message in messages), encoding="utf-8")
    store = Store(path)
    first = store.split_indices(store.splits[0])
    if len(first) == 0:
        raise DataError(f"{path}: 0 structures in the split {store.splits[0]}; check the source, filters and split")
    sums = TrainingSums()
    sums.add_rows(store, first)
    split, hashes = store.index["split"], store.index["content_hash"]
    duplicates = int(np.isin(hashes[split != 0], hashes[split == 0]).sum())
    content = {
        "split": store.splits[0],
        "statistics": sums.statistics(require_energy=False).to_dict(),
        "duplicates_across_splits": duplicates,
    }
    write_json(path / "statistics.json", content)
    return duplicates


def _has_structures(work: Path) -> bool:
    """Whether there is a whole part to go on with."""
    return any(work.glob("part-*/shard-*"))


@contextmanager
def _locked(work: Path, target: Path) -> Iterator[None]:
    """Lets one process at a time prepare a store; the work folder goes when the work is done."""
    work.mkdir(parents=True, exist_ok=True)
    lock = try_lock(work / "lock")
    if lock is None:
        raise DataError(f"{target}: another process is preparing it; wait for that one")
    with lock:
        try:
            yield
        except BaseException:
            if not _has_structures(work):
                shutil.rmtree(work, ignore_errors=True)
            raise
        shutil.rmtree(work, ignore_errors=True)
