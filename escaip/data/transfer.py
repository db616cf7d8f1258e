"""One file over HTTP: continued after an interruption, checked, and given its name when it is whole.

Bytes are only appended to the part, so that a kill at any moment costs at most the block on its way; a beginning whose
origin is in doubt is thrown away. Continuing: RFC 9110, sections 13.1.5 (If-Range) and 14 (range requests).
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING

from escaip.data.transfer_disk import (
    DiskFullError,
    Listener,
    Record,
    State,
    Stopped,
    boot_id,
    bytes_text,
    corrupt_path,
    disk_errors,
    forget,
    hash_file,
    locked,
    part_path,
    sync_folder,
)
from escaip.data.transfer_http import (
    Passing,
    RemoteFile,
    RetryPolicy,
    check_kind,
    differ,
    length,
    reason_of,
    refusal,
    request,
    validator,
)
from escaip.errors import DataError

if TYPE_CHECKING:
    from requests import Response

BLOCK = 1 << 17
"""Bytes read at once from the network, and what a kill can cost."""
SYNC_EVERY = 1 << 28
"""Bytes between two moments at which a crash of the machine, too, would lose nothing."""


def fetch(remote: RemoteFile, target: Path, policy: RetryPolicy, listener: Listener, stop: Event) -> Record:
    """Downloads one file, or what is missing of it.

    Args:
        remote: what to download.
        target: the name that it takes when it is whole and its checksum is right.
        policy: patience.
        listener: progress and messages.
        stop: set by someone else to stop.

    Returns:
        The record, which is also kept beside the file.

    Raises:
        DataError: refused, not found, unreachable, another length or checksum than published, a full disk, another
            process at work. What is of use to the next run is kept.
        Stopped: ``stop`` was set.
    """
    part = part_path(target)
    with disk_errors(remote.name):
        part.parent.mkdir(parents=True, exist_ok=True)
        with locked(part, remote.name) as descriptor:
            if target.exists():  # another process finished it a moment ago
                forget(part)
                record = Record.read(target)
                if record is None or not record.fits(target):
                    raise DataError(f"{remote.name}: {target} appeared meanwhile, from elsewhere: run it again")
                return record
            return _Transfer(remote, target, descriptor, policy, listener, stop).run()


class _Transfer:
    """The file that is being received; its part is open and locked."""

    def __init__(
        self, remote: RemoteFile, target: Path, descriptor: int, policy: RetryPolicy, listener: Listener, stop: Event
    ) -> None:
        self._remote, self._target, self._descriptor = remote, target, descriptor
        self._policy, self._listener, self._stop = policy, listener, stop
        self._part = part_path(target)
        self._boot = boot_id()
        self._restarts = 0
        self._offset = self._unsynced = 0
        self._size: int | None = None
        self._validator: str | None = None
        self._whole = False
        self._hash = hashlib.new(remote.algorithm, usedforsecurity=False)

    def run(self) -> Record:
        name, expected = self._remote.name, self._remote.digest
        wrong: list[str] = []
        self._take_up()
        while True:
            try:
                self._complete()
            finally:
                self._leave()
            digest = self._hash.hexdigest()
            if expected in (None, digest):
                return self._publish(digest)
            wrong.append(digest)
            if len(wrong) == 2:
                break
            self._listener.say(f"{name}: starting over, the checksum of what was received is wrong")
            self._clear()
        kept = corrupt_path(self._target)
        os.replace(self._part, kept)
        forget(self._part)
        twice = "twice the same: the published file has changed, or the card is wrong"
        cause = twice if wrong[0] == wrong[1] else "and another the first time: the connection damages data"
        raise DataError(
            f"{name}: {self._remote.algorithm} is {wrong[1]}, published is {expected} ({cause}); "
            f"kept as {kept.name}: see {self._remote.homepage or self._remote.url}"
        )

    def _take_up(self) -> None:
        """Goes on with what an earlier run left, as far as it can be trusted."""
        there = os.fstat(self._descriptor).st_size
        state = State.read(self._part)
        if there == 0 or state is None:
            self._clear()
            return
        size = self._remote.size
        doubt = ""
        if state.url != self._remote.url:
            doubt = "the card names another address than before"
        elif (size is not None and state.size not in (None, size)) or (state.size is not None and there > state.size):
            doubt = "what is there is no beginning of this file"
        if doubt:
            self._listener.say(f"{self._remote.name}: starting over, {doubt}")
            self._clear()
            return
        if there > state.synced and (state.boot != self._boot or not self._boot):
            there = state.synced
            os.ftruncate(self._descriptor, there)
        self._offset, self._size, self._validator = there, state.size, state.validator
        self._listener.begin(0, self._size or self._remote.size)
        self._hash = hash_file(self._descriptor, self._remote.algorithm, there, self._listener, self._stop)
        self._whole = there == self._size

    def _complete(self) -> None:
        """Attempts until every byte is there."""
        failures = best = 0
        self._listener.begin(self._offset, self._size or self._remote.size)
        while not self._whole:
            if self._stop.is_set():
                raise Stopped
            restarts, best = self._restarts, max(best, self._offset)
            try:
                self._attempt()
            except Passing as error:
                if self._restarts > restarts:
                    best = 0
                failures = 1 if self._offset > best else failures + 1
                if failures >= self._policy.attempts or self._restarts >= self._policy.attempts:
                    raise DataError(
                        f"{self._remote.name}: {error}, {max(failures, self._restarts)} times; "
                        f"{bytes_text(self._offset)} are kept: run the same command again to continue"
                    ) from error
                wait = self._policy.delay(failures) if error.wait is None else error.wait
                self._listener.say(f"{self._remote.name}: {error}; next attempt in {wait:.3g} s")
                if self._stop.wait(wait):
                    raise Stopped from error

    def _attempt(self) -> None:
        headers = {}
        if self._offset and self._validator is None and self._remote.digest is None:
            self._start_over("neither the server nor the card could tell whether the file is still the same")
        if self._offset:
            headers = {"Range": f"bytes={self._offset}-"} | ({"If-Range": self._validator} if self._validator else {})
        with request(self._remote, "GET", headers, self._policy) as response:
            if response.status_code == 200:
                if self._offset:
                    changed = differ(self._validator, validator(response))
                    self._start_over("the file changed on the server" if changed else "the server cannot continue")
                self._begin(response)
            elif response.status_code == 206 and self._offset:
                self._check_rest(response)
            elif response.status_code == 416 and self._offset:
                self._start_over("the file changed on the server")
                raise Passing("the server has less of the file than before", wait=0.0)
            else:
                raise refusal(self._remote, response, self._policy)
            self._receive(response)

    def _begin(self, response: Response) -> None:
        """Accepts a response with the whole file."""
        check_kind(self._remote, response)
        size = length(response)
        self._check_size(size)
        if size is None:
            chunked = "chunked" in response.headers.get("Transfer-Encoding", "").lower()
            if not chunked and self._remote.size is None and self._remote.digest is None:
                raise DataError(
                    f"{self._remote.name}: neither the server nor the card states a length or checksum: nobody could "
                    f"tell whether it is whole; see {self._remote.homepage or self._remote.url}"
                )
            size = self._remote.size
        free = shutil.disk_usage(self._part.parent).free
        if size is not None and size > free:
            raise DiskFullError(
                f"{self._remote.name}: needs {bytes_text(size)}, {bytes_text(free)} are free on the disk of "
                f"{self._part.parent}: free space or choose another --root"
            )
        self._size, self._validator = size, validator(response)
        self._write_state()
        self._listener.begin(0, size)

    def _check_rest(self, response: Response) -> None:
        """Accepts a response with the rest of the file, or throws away what is there."""
        match = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", response.headers.get("Content-Range", ""))
        total = int(match[3]) if match and match[3] != "*" else None
        doubt = ""
        if match is None or int(match[1]) != self._offset:
            doubt = "the server sent another range than it was asked for"
        elif differ(self._validator, validator(response)) or (total and self._size not in (None, total)):
            doubt = "the file changed on the server"
        if doubt:
            self._start_over(doubt)
            raise Passing(doubt, wait=0.0)
        check_kind(self._remote, response)
        self._check_size(total)
        self._size = self._size if total is None else total

    def _check_size(self, size: int | None) -> None:
        if size is not None and self._remote.size not in (None, size):
            raise DataError(
                f"{self._remote.name}: the server offers {size} bytes, the card says {self._remote.size}: the "
                f"published file has changed, or the address leads elsewhere; see "
                f"{self._remote.homepage or self._remote.url}"
            )

    def _receive(self, response: Response) -> None:
        from urllib3.exceptions import HTTPError

        blocks = response.raw.stream(BLOCK, decode_content=False)
        while True:
            try:
                block = next(blocks, b"")
            except (HTTPError, OSError) as error:
                raise Passing(f"the connection broke off ({reason_of(error)})") from error
            if not block:
                break
            if self._size is not None and self._offset + len(block) > self._size:
                self._start_over("more bytes came than were announced")
                raise Passing("more bytes came than were announced")
            self._append(block)
            if self._stop.is_set():
                raise Stopped
        if self._size is not None and self._offset < self._size:
            raise Passing("the connection broke off")
        self._size, self._whole = self._offset, True

    def _append(self, block: bytes) -> None:
        view = memoryview(block)
        while view:
            view = view[os.write(self._descriptor, view) :]
        self._hash.update(block)
        self._offset += len(block)
        self._unsynced += len(block)
        self._listener.advance(len(block))
        if self._unsynced >= SYNC_EVERY:
            self._write_state()

    def _write_state(self) -> None:
        os.fsync(self._descriptor)
        State(self._remote.url, self._validator, self._size, self._boot, self._offset).write(self._part)
        self._unsynced = 0

    def _start_over(self, reason: str) -> None:
        self._listener.say(f"{self._remote.name}: starting over, {reason}")
        self._restarts += 1
        self._clear()

    def _clear(self) -> None:
        # The bytes go before anything is said about new ones: never old bytes under a new state.
        os.ftruncate(self._descriptor, 0)
        State.remove(self._part)
        self._hash = hashlib.new(self._remote.algorithm, usedforsecurity=False)
        self._offset = self._unsynced = 0
        self._size = self._validator = None
        self._whole = False

    def _leave(self) -> None:
        """Everything for the next run, on the disk; nothing where there is nothing."""
        if self._offset or self._whole:
            self._write_state()
        else:
            forget(self._part)

    def _publish(self, digest: str) -> Record:
        status = os.fstat(self._descriptor)
        record = Record(
            url=self._remote.url,
            size=status.st_size,
            mtime_ns=status.st_mtime_ns,
            algorithm=self._remote.algorithm,
            digest=digest,
            published=self._remote.digest is not None,
        )
        # The record first: a kill in between leaves a whole part, never an unknown file.
        record.write(self._target)
        os.replace(self._part, self._target)
        forget(self._part)
        corrupt_path(self._target).unlink(missing_ok=True)
        sync_folder(self._target.parent)
        return record
