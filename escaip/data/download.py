"""``escaip data download``: the files of a data card, in parallel, continued after an interruption, checked.

Files go to ``ROOT/NAME/FILE``. A file that is whole is not asked for again. How one file comes is in
:mod:`escaip.data.transfer`, how archives are unpacked in :mod:`escaip.data.unpack`.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Event, Thread

from tqdm import tqdm

from escaip.data.download_plan import PlannedFile, choose_files, plan_file, read_files
from escaip.data.transfer import fetch
from escaip.data.transfer_disk import (
    DiskFullError,
    Listener,
    Record,
    Stopped,
    bytes_text,
    disk_errors,
    forget,
    hash_file,
    part_path,
)
from escaip.data.transfer_http import RetryPolicy, remote_size
from escaip.data.unpack import archive_suffix, unpack
from escaip.errors import ConfigError, DataError, EscaipError
from escaip.files import DatasetCard, dataset_card

ROOT_VARIABLE = "ESCAIP_DATA"
_PATIENCE_WITH_THREADS = 3.0


@dataclass(frozen=True)
class DownloadedFile:
    """A file that is there now.

    Attributes:
        path: of it.
        size: bytes.
        digest: ``ALGORITHM:HEX`` of its contents.
        published: the digest agreed with a published one; else nobody published any.
        new: it came in this run; else it was there.
        folder: of its contents, where it was unpacked.
    """

    path: Path
    size: int
    digest: str
    published: bool
    new: bool
    folder: Path | None


@dataclass(frozen=True)
class DownloadReport:
    """What was asked for and what came.

    Attributes:
        folder: of the data set.
        plan: before anything was downloaded.
        files: afterwards; empty for a dry run.
        needed: bytes still to come, unpacking included, as far as sizes are known.
        free: bytes on the disk, before.
        messages: what was told on the way: attempts, starts from the beginning.
        seconds: it took.
    """

    folder: Path
    plan: tuple[PlannedFile, ...]
    files: tuple[DownloadedFile, ...]
    needed: int
    free: int
    messages: tuple[str, ...]
    seconds: float

    def table(self) -> str:
        """The plan: files, sizes, what is there, the sum, free space."""
        rows = [("file", "split", "size", "there")]
        for item in self.plan:
            size = bytes_text(item.size) if item.exact or item.size is None else f"about {bytes_text(item.size)}"
            there = "whole" if item.whole else bytes_text(item.there) if item.there else "-"
            gated = " (by hand: conditions)" if item.remote.gated and not item.whole else ""
            rows.append((item.remote.name, item.remote.split or "-", size, there + gated))
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
        unknown = sum(item.missing is None for item in self.plan)
        more = f", and {unknown} files of unknown size" if unknown else ""
        short = f": {bytes_text(self.needed - self.free)} too little" if self.needed > self.free else ""
        lines.append(f"{len(self.plan)} files into {self.folder}; needed {bytes_text(self.needed)}{more}")
        return "\n".join([*lines, f"free on that disk {bytes_text(self.free)}{short}"])

    def summary(self) -> str:
        """A line for each file and one for all."""
        lines = []
        for file in self.files:
            checked = "as published" if file.published else "no checksum published"
            state = "downloaded" if file.new else "was there"
            unpacked = f", unpacked into {file.folder}" if file.folder else ""
            lines.append(f"{file.path}: {bytes_text(file.size)}, {state}, {file.digest} ({checked}){unpacked}")
        new = [file.size for file in self.files if file.new]
        lines.append(
            f"{self.folder}: {len(new)} files downloaded ({bytes_text(sum(new))}), {len(self.files) - len(new)} were "
            f"there, in {self.seconds:.1f} s"
        )
        return "\n".join(lines)


def download(
    name_or_card: str | DatasetCard,
    *,
    split: str | None = None,
    files: Sequence[str] | None = None,
    root: str | os.PathLike[str] | None = None,
    jobs: int = 4,
    dry_run: bool = False,
    extract: bool = False,
    verify: bool = False,
    progress: bool = True,
    retries: RetryPolicy | None = None,
) -> DownloadReport:
    """Downloads the files of a data set, those that are not there yet.

    The same call after an interruption, of whatever kind, goes on where it was. Checksums are computed while the bytes
    come; what does not agree with the published one never takes the file's name. ``http_proxy``, ``https_proxy``,
    ``no_proxy``, ``REQUESTS_CA_BUNDLE`` and ``SSL_CERT_FILE`` are obeyed. One connection per file: what makes it
    faster is ``jobs``.

    Args:
        name_or_card: data set.
        split: only the files of this split.
        files: only these files, by name or pattern (``train/*``).
        root: folder of data sets; default ``$ESCAIP_DATA``, else ``data`` in the current folder.
        jobs: files at the same time.
        dry_run: only say what would be done; :meth:`DownloadReport.table`.
        extract: also unpack archives, each into a folder of its name without suffix.
        verify: compute the checksums of files that are there; else their size and time must be as remembered.
        progress: bars on a terminal, and messages, on standard error.
        retries: patience with the server.

    Raises:
        ConfigError: an unknown data set, split or file.
        DataError: a card that is wrong, a gated file, too little space, a file that cannot be had or is wrong.
        KeyboardInterrupt: what was received is kept.
    """
    began = time.perf_counter()
    if jobs < 1:
        raise ConfigError(f"jobs: {jobs} is not a positive number")
    policy = retries or RetryPolicy()
    card = name_or_card if isinstance(name_or_card, DatasetCard) else dataset_card(name_or_card)
    chosen = choose_files(card, read_files(card), split, files)
    folder = Path(root or os.environ.get(ROOT_VARIABLE) or "data") / card.name
    plan = [plan_file(remote, folder, policy) for remote in chosen]
    unpacking = sum(item.unpacking for item in plan) if extract else 0
    needed = sum(item.missing or 0 for item in plan) + unpacking
    free = _free(folder)
    results: list[DownloadedFile] = []
    messages: list[str] = []
    if not dry_run:
        _refuse_early(plan, needed, free, folder)
        results = _Run(plan, policy, extract=extract, verify=verify, progress=progress, messages=messages).all(jobs)
    seconds = time.perf_counter() - began
    return DownloadReport(folder, tuple(plan), tuple(results), needed, free, tuple(messages), seconds)


def _free(folder: Path) -> int:
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    with disk_errors(str(folder)):
        return shutil.disk_usage(folder).free


def _refuse_early(plan: Sequence[PlannedFile], needed: int, free: int, folder: Path) -> None:
    gated = [item for item in plan if item.remote.gated and not item.whole]
    if gated:
        first = gated[0]
        others = f" (and {len(gated) - 1} more)" if len(gated) > 1 else ""
        raise DataError(
            f"{first.remote.name}{others}: cannot be downloaded without a person: {first.remote.how or 'see the page'}"
            f" ({first.remote.url}), and put it at {first.path}"
        )
    if needed > free:
        raise DataError(
            f"{folder}: {bytes_text(needed)} are needed and {bytes_text(free)} are free, {bytes_text(needed - free)} "
            "too little: choose files with --split or --file, free space, or name another disk with --root"
        )


class _Run:
    """The files of a plan, several at a time."""

    def __init__(
        self,
        plan: Sequence[PlannedFile],
        policy: RetryPolicy,
        *,
        extract: bool,
        verify: bool,
        progress: bool,
        messages: list[str],
    ) -> None:
        self._plan, self._policy, self._extract, self._verify = plan, policy, extract, verify
        self._progress, self._messages = progress, messages
        self._stop = Event()
        self._waiting: SimpleQueue[int] = SimpleQueue()
        self._results: dict[int, DownloadedFile] = {}
        self._errors: dict[int, Exception] = {}

    def all(self, jobs: int) -> list[DownloadedFile]:
        """Every file; where some fail the others are finished first."""
        for number in range(len(self._plan)):
            self._waiting.put(number)
        disable = None if self._progress and len(self._plan) > 1 else True
        with tqdm(total=len(self._plan), unit=" files", dynamic_ncols=True, disable=disable) as total:
            # Daemons: after Ctrl-C the program must not wait for a server that says nothing.
            threads = [
                Thread(target=self._work, args=(slot, total), daemon=True) for slot in range(min(jobs, len(self._plan)))
            ]
            try:
                for thread in threads:
                    thread.start()
                while any(thread.is_alive() for thread in threads):
                    for thread in threads:
                        thread.join(0.1)
            except KeyboardInterrupt:
                self._stop.set()
                deadline = time.monotonic() + _PATIENCE_WITH_THREADS
                for thread in threads:
                    thread.join(max(0.0, deadline - time.monotonic()))
                print("what was received is kept: run the same command again to continue", file=sys.stderr)
                raise
        self._raise_errors()
        return [self._results[number] for number in range(len(self._plan))]

    def _raise_errors(self) -> None:
        for error in self._errors.values():
            if not isinstance(error, EscaipError):
                raise error
        if self._errors:
            first = self._errors[min(self._errors)]
            if len(self._plan) == 1:
                raise first
            done = f"{len(self._results)} are there" if self._results else "none is there"
            raise DataError(f"{first} ({len(self._errors)} of {len(self._plan)} files failed, {done})") from first

    def _work(self, slot: int, total: tqdm) -> None:
        while not self._stop.is_set():
            try:
                number = self._waiting.get_nowait()
            except Empty:
                return
            bar = _Bar(self._plan[number].remote.name, slot, self._progress, self._messages)
            try:
                self._results[number] = self._one(self._plan[number], bar)
                total.update()
            except Stopped:
                return
            except Exception as error:
                self._errors[number] = error
                if isinstance(error, DiskFullError) or not isinstance(error, EscaipError):
                    self._stop.set()
            finally:
                bar.close()

    def _one(self, item: PlannedFile, listener: Listener) -> DownloadedFile:
        if item.whole:
            with disk_errors(item.remote.name):
                record = self._check(item, listener)
                forget(part_path(item.path))  # a kill right after the renaming leaves a state
        else:
            record = fetch(item.remote, item.path, self._policy, listener, self._stop)
        folder = None
        if self._extract and archive_suffix(item.path.name):
            folder = unpack(item.path, record.digest, listener, self._stop)
        digest = f"{record.algorithm}:{record.digest}"
        return DownloadedFile(item.path, record.size, digest, record.published, not item.whole, folder)

    def _check(self, item: PlannedFile, listener: Listener) -> Record:
        """Whether a file that is there is the published one, as remembered or by its checksum."""
        remote, path = item.remote, item.path
        record = Record.read(path)
        if record is not None and record.fits(path) and not self._verify:
            agrees = remote.digest is None or (record.algorithm, record.digest) == (remote.algorithm, remote.digest)
            if agrees and remote.size in (None, record.size):
                return record
        size, expected, algorithm = remote.size, remote.digest, remote.algorithm
        if expected is None and record is not None:
            expected, algorithm = record.digest, record.algorithm
        if size is None and expected is None and not remote.gated:
            size = remote_size(remote, self._policy)
        status = path.stat()
        remedy = "move or delete it and run the same command again"
        if size not in (None, status.st_size):
            raise DataError(f"{path}: has {status.st_size} bytes, published are {size}: {remedy}")
        listener.begin(0, status.st_size)
        with open(path, "rb") as file:
            digest = hash_file(file.fileno(), algorithm, status.st_size, listener, self._stop).hexdigest()
        if expected not in (None, digest):
            origin = "published is" if remote.digest is not None else "when it was downloaded it was"
            raise DataError(f"{path}: {algorithm} is {digest}, {origin} {expected}: {remedy}")
        checked = remote.digest is not None
        found = Record(remote.url, status.st_size, status.st_mtime_ns, algorithm, digest, published=checked)
        found.write(path)
        return found


class _Bar(Listener):
    """One file on the terminal; messages go there and to the report."""

    def __init__(self, name: str, slot: int, show: bool, messages: list[str]) -> None:
        self._show, self._messages = show, messages
        # None leaves bars out where there is no terminal.
        disable = None if show else True
        self._bar = tqdm(
            desc=name, position=slot + 1, leave=False, unit="B", unit_scale=True, dynamic_ncols=True, disable=disable
        )

    def begin(self, there: int, size: int | None) -> None:
        self._bar.reset(size)
        # What was there before does not count as speed.
        self._bar.initial = self._bar.n = self._bar.last_print_n = there
        self._bar.refresh()

    def advance(self, count: int) -> None:
        self._bar.update(count)

    def say(self, text: str) -> None:
        self._messages.append(text)
        if self._show:
            tqdm.write(text, file=sys.stderr)

    def close(self) -> None:
        self._bar.close()
