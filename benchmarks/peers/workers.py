"""The driver's side of a worker process: requests and replies as lines of JSON, with a limit on the time to answer."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Any

SCRIPT = Path(__file__).resolve().parent / "adapters" / "worker.py"


class WorkerFailure(Exception):
    """A request was not carried out; one line says why."""


class Worker:
    """A process in a peer's environment that holds one model.

    Args:
        python: of the environment.
        adapter: name of the peer.
        log: file for what the process prints.
        environment: variables beside those of the driver.
        patience: seconds that a request may take.
        script: what it runs, for tests.
    """

    def __init__(
        self,
        python: Path,
        adapter: str,
        log: Path,
        environment: dict[str, str] | None = None,
        patience: float = 900.0,
        script: Path = SCRIPT,
    ) -> None:
        self.log, self.patience = log, patience
        self._pending = b""
        with log.open("w", encoding="utf-8") as stream:
            self._process = subprocess.Popen(
                [str(python), str(script), adapter],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stream,
                env={**os.environ, **(environment or {})},
            )

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Sends a request and waits for its reply.

        Raises:
            WorkerFailure: the peer raised an error, or the process died or did not answer in time; then it is ended.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            raise self._died() from None
        reply: dict[str, Any] = json.loads(self._line(do))
        if not reply.pop("ok"):
            raise WorkerFailure(reply["why"])
        return reply

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def close(self) -> None:
        """Ends the process."""
        if self.is_alive:
            self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):  # a request that nobody read
                    stream.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _line(self, do: str) -> bytes:
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        while b"\n" not in self._pending:
            ready, _, _ = select.select([descriptor], [], [], self.patience)
            if not ready:
                self.close()
                raise WorkerFailure(f"{do}: no answer in {self.patience:g} s")
            part = os.read(descriptor, 1 << 20)
            if not part:
                raise self._died()
            self._pending += part
        line, _, self._pending = self._pending.partition(b"\n")
        return line

    def _died(self) -> WorkerFailure:
        status = self._process.wait()
        lines = [line.strip() for line in self.log.read_text(encoding="utf-8", errors="replace").splitlines()]
        last = next((line for line in reversed(lines) if line), "nothing was printed")
        how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        return WorkerFailure(f"the process {how}: {last[:200]}")
