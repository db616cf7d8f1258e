"""Files of a study: written whole, and claimed by one process at a time."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import IO

from escaip.errors import DataError


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes aside and renames.

    Raises:
        DataError: the file cannot be written; nothing of it is left.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        aside.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(aside, path)
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror or error}: check its folder and the disk") from error
    finally:
        aside.unlink(missing_ok=True)


def claim(folder: Path) -> IO[bytes] | None:
    """The open lock of a folder, or None where another process has it.

    Processes that inherit the file hold the lock too: it is free again when the last of them has ended, however.
    """
    stream = (folder / "lock").open("ab")
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        stream.close()
        return None
    return stream
