"""What a source is: how to know its files, how to divide them, how to read them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from escaip.data.atomic_data import AtomicData

Part = tuple[int, int]
"""Records ``start <= k < stop`` of one file, in the source's own order: frames, keys, molecules, bytes."""


@dataclass(frozen=True)
class Source:
    """A layout of files as published.

    Attributes:
        name: what ``--format`` calls it.
        what: in words, for ``--help``.
        read: ``read(path, door, *, name, keys, part=None, **options)`` yields the structures of one file in order; with
            ``part`` those of these records only, under the same ids. Structures go through ``door.admit``.
        matches: ``matches(path, head)`` says from the name and the first 4096 bytes (none of a directory) whether a
            file, or a directory, has this layout. Nothing is decoded.
        parts: ``parts(path, size)`` divides a file into ranges of about ``size`` structures, in order, without decoding
            structures: reading one after the other is reading the whole. None where a file can only be read whole.
        expand: files of a directory that ``matches``; None where directories mean nothing.
    """

    name: str
    what: str
    read: Callable[..., Iterator[AtomicData]]
    matches: Callable[[Path, bytes], bool]
    parts: Callable[[Path, int], list[Part]] | None = None
    expand: Callable[[Path], list[Path]] | None = None
