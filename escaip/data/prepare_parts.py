"""The parts of a store in the making: one by one or by several processes, each part whole or not there."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from itertools import chain, islice
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from escaip.data.readers import DataFile, checked, read_file
from escaip.data.readers.policy import Part, ReadPolicy, ReadReport
from escaip.data.shards import disk_errors
from escaip.data.store_writer import PartWriter, read_part
from escaip.data.structure import LabelKeys
from escaip.units import Units

if TYPE_CHECKING:
    from escaip.data.structure import AtomicData

MAKING = "making-"


@dataclass(frozen=True)
class Reading:
    """How structures are read: the arguments of :func:`escaip.data.open_source`, as plain values."""

    keys: Mapping[str, str | None] | None = None
    units: Mapping[str, str] | None = None
    on_error: str = "raise"
    required_labels: tuple[str, ...] = ()
    check_units: bool = True
    max_force: float | None = None
    limit: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def policy(self, report: ReadReport) -> ReadPolicy:
        """Where the structures of one part enter."""
        units = Units.parse(self.units) if self.units is not None else None
        return ReadPolicy(units, self.on_error, report, tuple(self.required_labels), self.max_force)

    def stream(self, item: WorkItem, report: ReadReport) -> Iterator[AtomicData]:
        """Structures of one part."""
        policy, keys = self.policy(report), LabelKeys.parse(self.keys)
        files = [read_file(file, policy, part=item.part, keys=keys, **self.options) for file in item.files]
        stream: Iterator[AtomicData] = islice(chain.from_iterable(files), self.limit)
        return checked(stream) if self.check_units else stream


@dataclass(frozen=True)
class WorkItem:
    """One part of the work.

    Attributes:
        number: its place.
        files: one file, or all of a split when a limit is counted through them.
        part: the range of the one file, None for all of it.
        split: code of the split it belongs to.
    """

    number: int
    files: tuple[DataFile, ...]
    part: Part | None
    split: int


@dataclass(frozen=True)
class Recipe:
    """How each part is made.

    Attributes:
        reading: of the structures.
        dtype: of forces and stress.
        shard_atoms: atoms of a shard.
    """

    reading: Reading
    dtype: str
    shard_atoms: int


def part_folder(work: Path, number: int) -> Path:
    """Where a whole part is."""
    return work / f"part-{number:06d}"


def make_parts(work: Path, items: Sequence[WorkItem], recipe: Recipe, workers: int, *, progress: bool = False) -> None:
    """Makes the parts that are not there, in this process or in several.

    Args:
        work: folder of the parts.
        items: all of them.
        recipe: how.
        workers: processes.
        progress: show a bar.

    Raises:
        DataError: from the first part that cannot be made; the others that are whole stay.
    """
    for leftover in work.glob(f"{MAKING}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    todo = [item for item in items if read_part(part_folder(work, item.number)) is None]
    with tqdm(total=len(items), initial=len(items) - len(todo), unit=" parts", disable=not progress) as bar:
        if workers == 1 or len(todo) <= 1:
            for item in todo:
                make_part(work, item, recipe)
                bar.update()
            return
        # Spawned, not forked: handles of HDF5 and LMDB and threads must not be inherited.
        pool = ProcessPoolExecutor(
            min(workers, len(todo)), mp_context=get_context("spawn"), initializer=_follow, initargs=(os.getpid(),)
        )
        try:
            running: set[Future[None]] = set()
            for item in todo:
                running.add(pool.submit(make_part, work, item, recipe))
                # A few ahead of the workers: a data set may have tens of thousands of parts.
                if len(running) >= 2 * workers:
                    running = _collect(running, bar)
            while running:
                running = _collect(running, bar)
        finally:
            pool.shutdown(cancel_futures=True)


def make_part(work: Path, item: WorkItem, recipe: Recipe) -> None:
    """Reads one part into a folder aside and gives it its name.

    Raises:
        DataError: unreadable data, a bad structure, a full disk.
    """
    messages: list[str] = []
    report = ReadReport(log=messages.append)
    aside = work / f"{MAKING}{item.number:06d}-{os.getpid()}"
    with disk_errors(work, "whole parts were kept for the next run"):
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        writer = PartWriter(aside, dtype=recipe.dtype, shard_atoms=recipe.shard_atoms)
        for data in recipe.reading.stream(item, report):
            writer.write(data)
        writer.close(skipped=report.skipped, filtered=report.filtered, messages=messages)
        try:
            os.replace(aside, part_folder(work, item.number))
        except OSError:
            # A worker of a killed run may have outlived it and come first; its part is as good.
            if read_part(part_folder(work, item.number)) is None:
                raise
            shutil.rmtree(aside)


def _collect(running: set[Future[None]], bar: Any) -> set[Future[None]]:
    done, rest = wait(running, return_when=FIRST_COMPLETED)
    for future in done:
        future.result()
        bar.update()
    return rest


def _follow(parent: int) -> None:
    """Ends this worker when the process that started it is gone, killed for instance."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
