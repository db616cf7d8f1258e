"""Labels by a calculator in processes of its own, kept in a log that any number of kills leave whole."""

from __future__ import annotations

import hashlib
import json
import os
import queue
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms

from escaip.calculators.remote import Worker, message_of
from escaip.distil.structures import Structure
from escaip.errors import ConfigError, DataError, EscaipError

_PATIENCE = 0.1  # s
_FIRST = 10  # jobs that are looked at before a teacher that answers none is given up


@dataclass(frozen=True)
class Job:
    """Something that a calculator does with a structure.

    Attributes:
        structure: where it begins.
        kind: ``label``, ``relax`` or ``dynamics``.
        settings: of the kind, as ``escaip.calculators.worker`` reads them.
    """

    structure: Structure
    kind: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def message(self) -> dict[str, Any]:
        """What a worker reads, with a key: a digest of everything else, so that equal jobs are done once."""
        content = message_of(self.structure.atoms, self.kind, **self.settings)
        return {"key": hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:24], **content}

    @property
    def key(self) -> str:
        """Name of the job in a log."""
        return str(self.message["key"])


class LabelLog:
    """A file of JSON lines, one for each job that is done, written through to the disk one by one.

    A line that a kill cut short is removed when the file is opened; no line counts twice.

    Attributes:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        """Opens a log, or begins one.

        Raises:
            DataError: a line in its midst is damaged.
        """
        self.path = path
        self._places: dict[str, int] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        with open(path, "r+b") as file:
            whole = 0
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    file.truncate(whole)
                    break
                try:
                    self._places.setdefault(json.loads(line)["key"], whole)
                except (ValueError, KeyError, TypeError) as error:
                    raise DataError(f"{path}: line {number} is damaged: remove the line and run again") from error
                whole += len(line)

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def __getitem__(self, key: str) -> dict[str, Any]:
        with open(self.path, "rb") as file:
            file.seek(self._places[key])
            found: dict[str, Any] = json.loads(file.readline())
        return found

    def add(self, answer: Mapping[str, Any]) -> None:
        """Appends an answer and waits until the disk has it.

        Raises:
            DataError: it cannot be written.
        """
        if answer["key"] in self._places:
            return
        try:
            with open(self.path, "ab") as file:
                place = file.tell()
                file.write((json.dumps(answer) + "\n").encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise DataError(f"{self.path}: cannot be written ({error.strerror}); what was labelled is kept") from error
        self._places[answer["key"]] = place


@dataclass(frozen=True)
class Labeler:
    """A calculator, and the Python that runs it.

    Attributes:
        calculator: ``module:NAME`` of a class or function that makes it.
        arguments: of the class or function.
        python: an interpreter that has the module and ASE; by default this one.
        max_force: eV/Å; frames with larger forces are no labels.
        max_stress: eV/Å³; likewise.
        timeout: s, of a job.
    """

    calculator: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    python: str = sys.executable
    max_force: float = 50.0
    max_stress: float = 0.6
    timeout: float = 3600.0

    def run(
        self, jobs: Sequence[Job], log: LabelLog, workers: int = 1, progress: Callable[[int, int], None] | None = None,
        stop: Callable[[], bool] = lambda: False,
    ) -> str:  # fmt: skip
        """Runs the jobs that the log lacks; returns name and version of the calculator's package.

        Args:
            jobs: in the order in which they begin.
            log: of answers.
            workers: processes.
            progress: called with the jobs done and those failed.
            stop: asked every tenth of a second; True raises KeyboardInterrupt.

        Raises:
            ConfigError: the calculator cannot be made, or fails in each of the first jobs.
            DataError: the log cannot be written.
        """
        waiting = list({job.key: job for job in jobs if job.key not in log}.values())
        if not waiting:
            return ""
        version, done, failed = "", 0, list[str]()
        printed = log.path.with_suffix(".log")
        for answer in self._answers(waiting, min(workers, len(waiting)), printed, stop):
            if "version" in answer:
                version = answer["version"]
                continue
            log.add(answer)
            done += 1
            if answer.get("error"):
                failed.append(answer["error"])
            if len(failed) == done >= min(_FIRST, len(waiting)):
                raise ConfigError(
                    f"{self.calculator} failed in each of the first {done} jobs, at last: {failed[-1]}: check its "
                    f"arguments and the structures; then remove {log.path}"
                )
            if progress:
                progress(done, len(failed))
        return version

    def _answers(
        self, jobs: Sequence[Job], workers: int, printed: Path, stop: Callable[[], bool]
    ) -> Iterator[dict[str, Any]]:
        """Yields answers of processes, as they come; what they print goes to a file."""
        waiting: queue.SimpleQueue[Job] = queue.SimpleQueue()
        for job in jobs:
            waiting.put(job)
        answers: queue.Queue[dict[str, Any] | EscaipError | None] = queue.Queue()
        processes = [_Process(self, waiting, answers, printed) for _ in range(workers)]
        try:
            for process in processes:
                process.start()
            running = workers
            while running:
                if stop():
                    raise KeyboardInterrupt
                try:
                    answer = answers.get(timeout=_PATIENCE)
                except queue.Empty:
                    continue
                if isinstance(answer, EscaipError):
                    raise answer
                if answer is None:
                    running -= 1
                else:
                    yield answer
        finally:  # whatever ends this, no process goes on
            for process in processes:
                process.stop()
            for process in processes:
                process.join()


class _Process(threading.Thread):
    """Feeds one worker at a time; one that dies or takes too long costs its job and is followed by another."""

    def __init__(
        self, labeler: Labeler, waiting: queue.SimpleQueue[Job], answers: queue.Queue[Any], printed: Path
    ) -> None:
        super().__init__(daemon=True)
        self._labeler, self._waiting, self._answers, self._printed = labeler, waiting, answers, printed
        self._worker: Worker | None = None
        self._stopped = self._late = False

    def stop(self) -> None:
        """Ends the worker; what waits for its answer gets none."""
        self._stopped = True
        if self._worker is not None:
            self._worker.kill()

    def run(self) -> None:
        try:
            while not self._stopped:
                answer = self._ask(self._waiting.get_nowait())
                if not self._stopped:
                    self._answers.put(answer)
        except queue.Empty:
            self._answers.put(None)
        except EscaipError as error:
            self._answers.put(error)
        finally:
            if self._worker is not None:
                self._worker.close()

    def _ask(self, job: Job) -> dict[str, Any]:
        labeler = self._labeler
        if self._worker is None:
            self._worker = Worker(labeler.calculator, labeler.arguments, labeler.python, self._printed)
            self._answers.put({"version": self._worker.version})
        if self._stopped:  # while the worker began
            self._worker.kill()
        self._late = False
        timer = threading.Timer(labeler.timeout, self._give_up)
        timer.start()
        bounds = {"max_force": labeler.max_force, "max_stress": labeler.max_stress}
        answer = self._worker.ask({**job.message, **bounds})
        timer.cancel()
        if answer is not None:
            return answer
        status, self._worker = self._worker.close(), None
        took = f"it took more than {labeler.timeout:g} s" if self._late else f"its process ended ({status})"
        return {"key": job.key, "frames": [], "error": took}

    def _give_up(self) -> None:
        self._late = True
        if self._worker is not None:
            self._worker.kill()


def frames_of(job: Job, answer: Mapping[str, Any]) -> list[Atoms]:
    """Returns the labelled frames of an answer, with labels in a single-point calculator."""
    from ase.calculators.singlepoint import SinglePointCalculator

    found = []
    for frame in answer["frames"]:
        atoms = job.structure.atoms.copy()
        atoms.positions = np.array(frame["positions"])
        if "cell" in frame:
            atoms.set_cell(frame["cell"])
        labels = {name: np.array(frame[name]) for name in ("forces", "stress") if name in frame}
        atoms.calc = SinglePointCalculator(atoms, energy=frame["energy"], **labels)
        found.append(atoms)
    return found
