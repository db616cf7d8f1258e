"""The state of a run between two steps, in one file that contains no code."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms

from escaip.errors import SimulationError
from escaip.files import write_aside

SCHEMA_VERSION = 2


@dataclass(frozen=True)
class RestartState:
    """Everything that a run needs to continue bit for bit."""

    step: int
    target: int  # steps asked for
    physics: dict[str, Any]  # settings that must not change
    positions: np.ndarray  # (n, 3) Å
    momenta: np.ndarray  # (n, 3) in ASE's unit
    cell: np.ndarray  # (3, 3) Å
    atomic_numbers: np.ndarray  # (n,)
    energy: float  # potential energy in eV, to recognise the potential
    rng: dict[str, Any]  # state of the random number generator
    integrator: dict[str, np.ndarray]  # internal variables of thermostat and barostat, by name
    max_temperature: float  # K at which the run stops
    log_position: int  # where the log ends
    trajectory_position: int  # where the trajectory ends
    saved: Sequence[int]  # step and end of the last frame saved for its spread, if any

    def save(self, path: Path) -> None:
        """Replaces the file, whole or not at all; raises SimulationError where that is impossible."""
        arrays: dict[str, Any] = {name: value for name, value in vars(self).items() if isinstance(value, np.ndarray)}
        header = {name: value for name, value in vars(self).items() if name not in arrays}
        header |= {"schema": SCHEMA_VERSION, "integrator": sorted(self.integrator)}
        arrays |= {f"integrator.{name}": value for name, value in self.integrator.items()}
        text = np.frombuffer(json.dumps(header).encode(), dtype=np.uint8)
        with write_aside(path, SimulationError) as aside, aside.open("wb") as stream:
            np.savez(stream, header=text, **arrays)
            stream.flush()
            os.fsync(stream.fileno())

    @classmethod
    def load(cls, path: Path) -> RestartState:
        """Reads a file written by ``save``; raises SimulationError if it is missing, damaged, or of another schema."""
        if not path.is_file():
            raise SimulationError(f"there is no restart file {path} to resume from: run without --resume first")
        try:
            with path.open("rb") as stream, np.load(stream, allow_pickle=False) as stored:
                header = json.loads(stored["header"].tobytes())
                if header.pop("schema") != SCHEMA_VERSION:
                    raise SimulationError(f"{path} is of another version of escaip: resume with that version")
                integrator = {name: stored[f"integrator.{name}"] for name in header.pop("integrator")}
                arrays = {name: stored[name] for name in stored if name != "header" and "." not in name}
            return cls(**header, **arrays, integrator=integrator)
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
            raise SimulationError(f"restart file {path} is damaged ({error}): start anew with --overwrite") from error

    def apply(self, atoms: Atoms, physics: dict[str, Any], path: Path) -> None:
        """Puts the state into ``atoms``, after making sure that it belongs to this run.

        Raises:
            SimulationError: another structure, other settings, or another potential: the energy of the stored positions
                differs by more than 1 meV per atom.
        """
        if not np.array_equal(self.atomic_numbers, atoms.numbers):
            raise SimulationError(f"{path} belongs to another structure than {atoms.symbols}: use its own")
        for name, value in physics.items():
            if self.physics.get(name) != value:
                raise SimulationError(
                    f"{path} was written with {name} = {self.physics.get(name)}, not {value}: resume with the same "
                    "settings, or start anew with another --out"
                )
        atoms.set_cell(self.cell, scale_atoms=False)
        atoms.set_positions(self.positions, apply_constraint=False)
        atoms.set_momenta(self.momenta, apply_constraint=False)
        energy = atoms.get_potential_energy()
        if not abs(energy - self.energy) <= 1e-3 * len(atoms):
            raise SimulationError(
                f"{path} was written with another potential: its energy is {self.energy:.6f} eV, this one gives "
                f"{energy:.6f} eV: resume with the same model"
            )
