"""What HDF5 leaves to be done beneath it: files whose writer was killed, and disks that fill up."""

from __future__ import annotations

import io
import os
import struct
from pathlib import Path

# HDF5 file format specification, version 3.0, II.A.: superblock of version 2 or 3 with addresses of 8 bytes.
_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_VERSIONS, _ADDRESS_SIZE = (2, 3), 8
_VERSION_AT, _ADDRESS_SIZE_AT, _MARK_AT, _END_AT, _CHECKSUM_AT = 8, 9, 11, 28, 44
_SIZE = 48


class UnmarkedFile(io.FileIO):
    """The bytes of an HDF5 file, but for the mark of a writer that is at work or was killed.

    The mark makes HDF5 refuse a file. In single-writer-multiple-reader mode HDF5 opens it, but where a checksum is
    wrong it waits, for ever if the writer is dead. Here the mark is taken off in what HDF5 is given to read, never in
    the file, and a wrong checksum is an error at once. The end of a marked file, which its writer notes early or late,
    is that which it has: what lies beyond cannot be read.

    Args:
        path: the file.

    Raises:
        OSError: not HDF5 of a version that carries the mark, or its head is damaged.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path, "rb")
        try:
            self._head = _unmarked(super().read(_SIZE), os.fstat(self.fileno()).st_size)
        except BaseException:
            self.close()
            raise
        self.seek(0)

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Reads what fits, with the head replaced."""
        place = self.tell()
        count = super().readinto(buffer) or 0
        inside = min(_SIZE - place, count)
        if inside > 0:
            memoryview(buffer).cast("B")[:inside] = self._head[place : place + inside]
        return count


class Room:
    """Space on the disk, set aside before HDF5 needs it: a write that fails within HDF5 ends in a crash of the process.

    Args:
        path: the file, open for writing in HDF5, whose first frames it holds.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = os.open(path, os.O_RDWR)

    def ensure(self, used: int, needed: int) -> None:
        """Makes sure that the file can grow from ``used`` by ``needed`` bytes, until HDF5 flushes it: that cuts it off.

        Raises:
            OSError: the disk, a quota or a limit does not allow it.
        """
        if os.fstat(self._descriptor).st_size < used + needed:
            os.posix_fallocate(self._descriptor, used, needed)

    def give_back(self) -> None:
        """Cuts off what was not needed, after HDF5 has closed the file."""
        os.close(self._descriptor)
        with self._path.open("rb") as stream:
            head = stream.read(_SIZE)
        _unmarked(head, 0)  # raises where it is none
        (end,) = struct.unpack_from("<Q", head, _END_AT)
        if end < self._path.stat().st_size:
            os.truncate(self._path, end)


def is_marked(path: Path) -> bool:
    """Whether a writer is at work or was killed.

    Raises:
        OSError: as of :class:`UnmarkedFile`.
    """
    with path.open("rb") as stream:
        head = stream.read(_SIZE)
    return head != _unmarked(head, 0)


def _unmarked(head: bytes, size: int) -> bytes:
    if (
        len(head) < _SIZE
        or not head.startswith(_SIGNATURE)
        or head[_VERSION_AT] not in _VERSIONS
        or head[_ADDRESS_SIZE_AT] != _ADDRESS_SIZE
        or head[_CHECKSUM_AT:] != _checksum(head[:_CHECKSUM_AT])
    ):
        raise OSError("its head is not that of an HDF5 file of version 1.10 or newer")
    if head[_MARK_AT] == 0:
        return head
    cleared = bytearray(head[:_CHECKSUM_AT])
    cleared[_MARK_AT] = 0
    struct.pack_into("<Q", cleared, _END_AT, size)
    return bytes(cleared) + _checksum(cleared)


def _checksum(data: bytes | bytearray) -> bytes:
    """Jenkins' lookup3 hash, which HDF5 guards its metadata with (II.A., V.A.); four bytes."""
    a = b = c = (0xDEADBEEF + len(data)) & _WORD
    padded = bytes(data) + b"\0" * (-len(data) % 12)
    words = struct.unpack(f"<{len(padded) // 4}I", padded)
    for start in range(0, len(words), 3):
        a, b, c = (a + words[start]) & _WORD, (b + words[start + 1]) & _WORD, (c + words[start + 2]) & _WORD
        if start + 3 < len(words):
            for first, second, third in ((4, 6, 8), (16, 19, 4)):
                a, c = (a - c) & _WORD ^ _turned(c, first), (c + b) & _WORD
                b, a = (b - a) & _WORD ^ _turned(a, second), (a + c) & _WORD
                c, b = (c - b) & _WORD ^ _turned(b, third), (b + a) & _WORD
    for turn in ((14, 11, 25), (16, 4, 14), (24, 0, 0)):
        c = ((c ^ b) - _turned(b, turn[0])) & _WORD
        if turn[1]:
            a = ((a ^ c) - _turned(c, turn[1])) & _WORD
            b = ((b ^ a) - _turned(a, turn[2])) & _WORD
    return struct.pack("<I", c)


_WORD = 0xFFFFFFFF


def _turned(value: int, count: int) -> int:
    """``value`` rotated to the left as 32 bits."""
    return (value << count | value >> (32 - count)) & _WORD
