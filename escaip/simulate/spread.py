"""How far a committee's forces are apart during a run: a guard, and frames for labelling."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
from ase import Atoms

from escaip.errors import ConfigError, SimulationError
from escaip.simulate.outputs import ExtxyzTrajectory, make_frame
from escaip.simulate.settings import MDSettings

LOG_COLUMN = "max_forces_spread_eV_A"
_STEP = re.compile(rb"(?:^| )step=(\d+)(?: |$)")


def has_spread(atoms: Atoms) -> bool:
    """Whether the calculator is a committee."""
    return "forces_spread" in getattr(atoms.calc, "implemented_properties", ())


def largest_spread(atoms: Atoms) -> tuple[float, int]:
    """Largest spread of the forces on an atom in eV/Å, and which atom."""
    spread = atoms.calc.get_property("forces_spread", atoms)
    index = int(np.argmax(spread))
    return float(spread[index]), index


class SpreadWatch:
    """Stops at one spread and writes frames above another, at most one per trajectory interval.

    Args:
        atoms: with the calculator.
        settings: ``max_spread``, ``save_spread``, ``trajectory_interval``, ``timestep``.
        path: the frames' file, made with the first of them.
        first_step: from which a run goes on: frames after it, of a part that is done again, are cut off. None for a
            new run, which replaces all of them.

    Raises:
        ConfigError: a spread is asked for and the calculator is no committee.
    """

    def __init__(self, atoms: Atoms, settings: MDSettings, path: Path, first_step: int | None) -> None:
        self.settings, self.path = settings, path
        self.is_on = settings.max_spread is not None or settings.save_spread is not None
        if self.is_on and not has_spread(atoms):
            raise ConfigError("max_spread and save_spread need a committee: give further models with --committee")
        self._last: int | None = None
        self._file: ExtxyzTrajectory | None = None
        if first_step is None:
            path.unlink(missing_ok=True)
        elif path.exists():
            self._last = cut_frames(path, first_step)

    def problem(self, atoms: Atoms, step: int) -> str | None:
        """Writes the frame where it is to be kept; says in words why the run must stop, or None."""
        if not self.is_on:
            return None
        spread, index = largest_spread(atoms)
        limit, save = self.settings.max_spread, self.settings.save_spread
        stops = limit is not None and not spread <= limit
        due = self._last is None or step >= self._last + self.settings.trajectory_interval
        if stops or (save is not None and spread > save and due):
            self._write(atoms, step)
        if not stops:
            return None
        return (
            f"the committee's forces on atom {index} ({atoms.symbols[index]}) spread by {spread:.3g} eV/Å, above "
            f"{limit:g} eV/Å"
        )

    def sync(self) -> None:
        """Frames written so far are safely on disk: a restart file counts on them."""
        if self._file is not None:
            self._file.position()

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()

    def _write(self, atoms: Atoms, step: int) -> None:
        if self._file is None:
            self._file = ExtxyzTrajectory(self.path, self.path.stat().st_size if self.path.exists() else None)
        frame = make_frame(atoms, step, step * self.settings.timestep)
        frame.arrays["forces_spread"] = np.array(atoms.calc.get_property("forces_spread", atoms))
        frame.info["energy_spread"] = float(atoms.calc.get_property("energy_spread", atoms))
        self._file.write(frame)
        self._last = step


def cut_frames(path: Path, last_step: int) -> int | None:
    """Cuts an extxyz file off before the first frame after a step, or before one that is not whole.

    Returns:
        The step of the last frame kept; None when none is.

    Raises:
        SimulationError: the file holds something else.
    """
    end, kept = 0, None
    with path.open("rb") as stream:
        while count := stream.readline():
            comment = stream.readline()
            rows = [stream.readline() for _ in range(int(count))] if count.strip().isdigit() else [b""]
            if not all(row.endswith(b"\n") for row in (count, comment, *rows)):
                break  # the process ended while it was written
            found = _STEP.search(comment)
            if found is None:
                raise SimulationError(f"{path} is no file of this run: move it away, or use another --out")
            if int(found[1]) > last_step:
                break
            end, kept = stream.tell(), int(found[1])
    os.truncate(path, end)
    return kept
