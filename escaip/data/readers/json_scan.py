"""Finds the members of a JSON object of objects by their bytes, at the speed of reading, in bounded memory.

Only quotes and braces are looked at: quotes say what is inside a string, braces how deep. What is between a member's
first and last byte is left to a JSON parser.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from escaip.errors import DataError

BLOCK = 1 << 19
"""Bytes looked at together; they and what is found in them fit a processor's cache."""

MAX_MEMBER = 1 << 28
"""Bytes of one member beyond which the layout is another one."""

MAX_GAP = 1 << 20
"""Bytes between members beyond which this is no such file."""

_QUOTE, _OPEN, _CLOSE = 1, 2, 3
_KINDS = bytes({ord('"'): _QUOTE, ord("{"): _OPEN, ord("}"): _CLOSE}.get(code, 0) for code in range(256))
_STEPS = np.array([0, 0, 1, -1], dtype=np.int8)
_ESCAPED = re.compile(rb"\\.", re.DOTALL)
_FIRST = re.compile(rb"[ \t\r\n]*\{[ \t\r\n]*")
_BETWEEN = re.compile(rb"[ \t\r\n]*,[ \t\r\n]*")
_END = re.compile(rb"[ \t\r\n]*")


@dataclass(frozen=True)
class Member:
    """One member ``"key": {...}`` of the outermost object.

    Attributes:
        start: offset of the quote before the key.
        stop: offset behind its closing brace.
        inner: objects that are members of its value.
        text: its bytes.
    """

    start: int
    stop: int
    inner: int
    text: bytes


def scan_members(file: BinaryIO, what: str, start: int = 0, stop: int | None = None) -> Iterator[Member]:
    """Members of the object that a file holds, in order.

    Args:
        file: opened for bytes.
        what: the file's name, for messages.
        start: 0, or the ``start`` of a member.
        stop: the ``stop`` of a member; None reads to the end, which must be the end of the object.

    Raises:
        DataError: no object of objects, truncated, or damaged; with the offset and the last whole member.
    """
    scanner = _Scanner(what, start, whole=stop is None, inside=start > 0)
    file.seek(start)
    position = start
    while True:
        block = file.read(BLOCK if stop is None else min(BLOCK, stop - position))
        position += len(block)
        if not block:
            break
        yield from scanner.feed(block)
    scanner.close(stop)


class _Scanner:
    """What is known at a border between blocks."""

    def __init__(self, what: str, start: int, *, whole: bool, inside: bool) -> None:
        self.what, self.whole = what, whole
        self.depth = 1 if inside else 0
        self.in_string = self.escaped = False
        self.opened: int | None = None  # offset of the key of a member that is not over
        self.inner = 0
        self.held = bytearray()  # bytes from `base` on that are not given out
        self.base = self.position = start
        self.first = True
        self.inside = inside
        self.last = "none"

    def feed(self, block: bytes) -> Iterator[Member]:
        """Members that end in this block."""
        self.held += block
        places, events = self._events(block)
        for place, event in zip(places.tolist(), events.tolist(), strict=True):
            if event == 2:
                self.inner += 1
            elif event == 1:
                if self.opened is not None:
                    raise self._damaged(place, "expected an object after the key")
                self._check_gap(place)
                self.opened, self.inner = place, 0
            elif event == 3:
                if self.opened is None:
                    raise self._damaged(place, "an object without a key")
                yield self._taken(place + 1)
            else:
                self._check_end(place)
        self.position += len(block)
        if self.opened is not None and self.position - self.opened > MAX_MEMBER:
            raise DataError(
                f"{self.what}: the member at byte {self.opened} is larger than {MAX_MEMBER >> 20} MiB; "
                f"this is no file of materials (last whole member: {self.last})"
            )
        if self.opened is None and len(self.held) > MAX_GAP:
            raise self._damaged(self.base, f"nothing in {MAX_GAP >> 20} MiB")

    def close(self, stop: int | None) -> None:
        """Checks that the end is the end."""
        if self.depth < 0:  # behind the last brace
            if not _END.fullmatch(self.held):
                raise self._damaged(self.base, "there is more after the end of the object")
        elif self.first and self.depth == 0 and self.held.strip():
            raise self._damaged(self.base, "expected an object of objects")
        elif self.position != stop or self.depth != 1 or self.opened is not None:
            raise DataError(
                f"{self.what}: is truncated at byte {self.position}; the last whole member is {self.last}, up to byte "
                f"{self.base}; download the file again"
            )

    def _events(self, block: bytes) -> tuple[np.ndarray, np.ndarray]:
        """Offsets of what matters, and what it is.

        1: a key of the outermost object begins, 2: an object in a member ends, 3: a member ends, 4: the outermost
        object ends.
        """
        escaped_first, self.escaped = self.escaped, False
        if escaped_first:
            block = b" " + block[1:]
        if b"\\" in block:
            block = _ESCAPED.sub(b"  ", block)
            self.escaped = block.endswith(b"\\")
        kinds = np.frombuffer(block.translate(_KINDS), dtype=np.uint8)
        places = np.flatnonzero(kinds != 0)
        if not len(places):
            return places, places
        kinds = kinds[places]
        quotes = kinds == _QUOTE
        # Of a brace, whether it is in a string; of a quote, whether one begins here.
        inside = np.bitwise_xor.accumulate(quotes.view(np.uint8)) ^ np.uint8(self.in_string)
        steps = _STEPS[kinds]
        steps[inside == 1] = 0
        depth = np.cumsum(steps, dtype=np.int32)
        depth += self.depth
        self.in_string = bool(inside[-1])
        if self.depth >= 0:
            self.depth = int(depth[-1])
        shallow = np.flatnonzero(depth <= 2)
        kinds, inside, steps, depth = kinds[shallow], inside[shallow], steps[shallow], depth[shallow]
        closed = steps < 0
        events = np.select(
            [(kinds == _QUOTE) & (inside == 1) & (depth == 1), closed & (depth == 2), closed & (depth == 1), closed],
            [1, 2, 3, 4],
        )
        chosen = events != 0
        return self.position + places[shallow[chosen]], events[chosen]

    def _taken(self, stop: int) -> Member:
        assert self.opened is not None
        start = self.opened
        text = bytes(memoryview(self.held)[start - self.base : stop - self.base])
        del self.held[: stop - self.base]
        self.base, self.opened, self.first = stop, None, False
        self.last = text[: text.find(b'"', 1) + 1].decode(errors="replace")[:80]
        return Member(start, stop, self.inner, text)

    def _check_gap(self, place: int) -> None:
        """Between two members is a comma, before the first one the object's brace."""
        gap = bytes(memoryview(self.held)[: place - self.base])
        pattern = (_END if self.inside else _FIRST) if self.first else _BETWEEN
        if not pattern.fullmatch(gap):
            raise self._damaged(self.base, "expected a comma" if not self.first else "expected an object of objects")

    def _check_end(self, place: int) -> None:
        gap = bytes(memoryview(self.held)[: place - self.base])
        if self.opened is not None:
            raise self._damaged(place, "expected an object after the key")
        if self.depth < 0 or not self.whole or not (_FIRST if self.first else _END).fullmatch(gap):
            raise self._damaged(place, "a brace too many")
        del self.held[: place + 1 - self.base]
        self.base = place + 1
        self.depth = -1

    def _damaged(self, place: int, why: str) -> DataError:
        return DataError(
            f"{self.what}: is damaged at byte {place} ({why}); the last whole member is {self.last}; "
            "download the file again"
        )
