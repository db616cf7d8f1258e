"""What the terminal shows of a run, kept in a file."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any, TextIO


class RunLog:
    """Copies what is printed while it is entered, and the error that ends it, to a file.

    What is printed before the file is opened waits in memory, and is dropped where it never is. Bars, which are drawn
    again and again, are left out.
    """

    def __init__(self) -> None:
        self._waiting: list[str] = []
        self._file: TextIO | None = None
        self._streams = contextlib.ExitStack()

    def __reduce__(self) -> tuple[Any, ...]:
        return RunLog, ()  # another process prints for itself

    def open(self, path: Path) -> None:
        """Opens the file, to append to, and writes what waited."""
        self._file = path.open("a", encoding="utf-8", buffering=1)
        self._file.writelines(self._waiting)
        self._waiting.clear()

    def write(self, text: str) -> None:
        """Adds text, unless it draws a bar."""
        if "\r" in text:
            return
        if self._file is None:
            self._waiting.append(text)
        elif not self._file.closed:
            self._file.write(text)

    def __enter__(self) -> RunLog:
        copied: list[Any] = [_Copied(stream, self) for stream in (sys.stdout, sys.stderr)]
        self._streams.enter_context(contextlib.redirect_stdout(copied[0]))
        self._streams.enter_context(contextlib.redirect_stderr(copied[1]))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        self._streams.close()
        if error is not None and not isinstance(error, SystemExit):
            self.write(f"{type(error).__name__}: {error}\n")
        if self._file is not None:
            self._file.close()


class _Copied:
    """A stream whose text also goes to a log."""

    def __init__(self, stream: TextIO, log: RunLog) -> None:
        self._stream, self._log = stream, log

    def write(self, text: str) -> int:
        self._log.write(text)
        return self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
