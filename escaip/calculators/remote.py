"""Calculators of other environments: a process of another Python that answers line by line."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.calculator import Calculator, PropertyNotImplementedError, all_changes

from escaip.errors import ConfigError, SimulationError

# Not run as a file: its neighbors, such as ase.py, would hide modules of the same name.
_PROGRAM = Path(__file__).with_name("worker.py").read_text(encoding="utf-8")
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def message_of(atoms: Atoms, kind: str = "label", **settings: Any) -> dict[str, Any]:
    """Returns a job for a ``Worker``; charge and spin multiplicity are those of ``atoms.info``."""
    charge, spin = atoms.info.get("charge"), atoms.info.get("spin_multiplicity", atoms.info.get("spin"))
    return {
        "kind": kind, "numbers": atoms.numbers.tolist(), "positions": atoms.positions.tolist(),
        "cell": atoms.cell.array.tolist(), "pbc": atoms.pbc.tolist(), "charge": int(charge or 0),
        "spin": int(spin or 1), **settings,
    }  # fmt: skip


class Worker:
    """A process that makes a calculator and runs jobs with it (``worker.py`` says which), one thread each.

    Attributes:
        version: name and version of the calculator's package.
    """

    def __init__(self, calculator: str, arguments: Mapping[str, Any], python: str, printed: Path | None = None) -> None:
        """Starts the process.

        Args:
            calculator: ``module:NAME`` of a class or function that makes it, found there or in the current folder.
            arguments: of the class or function.
            python: an interpreter with the module and ASE.
            printed: file to which what the calculator prints is appended; by default it goes to standard error.

        Raises:
            ConfigError: the interpreter or the calculator cannot be started.
        """
        self._lock = threading.Lock()
        environment = {**dict.fromkeys(_THREADS, "1"), **os.environ}
        try:
            with contextlib.nullcontext() if printed is None else open(printed, "ab") as stream:
                self.process = subprocess.Popen(
                    [python, "-c", _PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                    encoding="utf-8", stderr=stream, env=environment, start_new_session=True,
                )  # fmt: skip
        except OSError as error:
            raise ConfigError(f"{python}: {error.strerror}: name a Python interpreter with ASE") from error
        setup = {"calculator": calculator, "arguments": dict(arguments)}
        answer = self.ask(setup) or {"error": f"{python} did not start (see {printed or 'above'})"}
        if "error" in answer:
            self.close()
            raise ConfigError(
                f"calculator {calculator}: {answer['error']}: name a class or function as module:NAME, its arguments, "
                "and a Python that has it"
            )
        self.version = str(answer["version"])

    def ask(self, message: Mapping[str, Any]) -> dict[str, Any] | None:
        """Returns the answer to a job; None where the process has ended."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            with self._lock:  # threads get their own answers
                self.process.stdin.write(json.dumps(message) + "\n")
                self.process.stdin.flush()
                line = self.process.stdout.readline()
        except OSError:
            return None
        answer: dict[str, Any] | None = json.loads(line) if line.endswith("\n") else None
        return answer

    def kill(self) -> None:
        """Ends the process; who waits for an answer gets None."""
        self.process.kill()

    def close(self) -> int:
        """Ends the process, closes its pipes and returns its status."""
        with self.process as process:
            process.kill()
        return int(process.returncode)


class RemoteCalculator(Calculator):
    """A calculator that another Python runs, with the answers of an ordinary one of ASE.

    For calculators whose dependencies clash with this package's, to compare with or to check. Energy in eV (the free
    energy where a calculator tells both), forces in eV/Å, stress in eV/Å³ if there is one.
    """

    implemented_properties = ["energy", "free_energy", "forces", "stress"]  # noqa: RUF012

    def __init__(
        self, calculator: str, arguments: Mapping[str, Any] | None = None, python: str = sys.executable
    ) -> None:
        """Starts the process; the arguments are those of ``Worker``.

        Raises:
            ConfigError: the interpreter or the calculator cannot be started.
        """
        super().__init__()
        self._worker = Worker(calculator, arguments or {}, python)
        self.version = self._worker.version

    def calculate(
        self, atoms: Any = None, properties: Sequence[str] = ("energy",), system_changes: Sequence[str] = all_changes
    ) -> None:
        """Asks for everything at once.

        Raises:
            SimulationError: the calculator fails.
            PropertyNotImplementedError: it has no stress.
        """
        super().calculate(atoms, properties, system_changes)
        assert self.atoms is not None
        no_bound = {"max_force": np.finfo(float).max, "max_stress": np.finfo(float).max}
        answer = self._worker.ask({"key": "", **message_of(self.atoms), **no_bound})
        if answer is None or answer.get("error"):
            raise SimulationError((answer or {"error": "the process of the calculator has ended"})["error"])
        (frame,) = answer["frames"]
        self.results = {"energy": frame["energy"], "free_energy": frame["energy"], "forces": np.array(frame["forces"])}
        if "stress" in frame:
            self.results["stress"] = np.array(frame["stress"])
        elif "stress" in properties:
            raise PropertyNotImplementedError("the calculator has no stress")

    def close(self) -> None:
        """Ends the process."""
        self._worker.close()

    def __del__(self) -> None:
        if hasattr(self, "_worker"):
            self.close()
