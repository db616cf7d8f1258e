"""Conditions that stop a run, NaN, heat, atoms in contact, a committee that disagrees; and the range of training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from ase import Atoms
from ase.data import covalent_radii

from escaip.calculators.ase import PotentialCalculator
from escaip.errors import ConfigError
from escaip.graph import neighbor_list
from escaip.simulate.ensembles import MDSettings
from escaip.simulate.output import ExtxyzTrajectory, make_frame

DEVIATION_COLUMN = "max_forces_spread_eV_A"
"""Column of the log of a committee."""
# No bond is shorter than this fraction of the sum of covalent radii: 0.25 Å for H-H, 0.61 Å for C-C.
_TOUCHING = 0.4


def find_problem(atoms: Atoms, temperature: float, max_temperature: float) -> str | None:
    """Describes why a step cannot be trusted; None when it can. Cheap enough for every step."""
    for what, values in (("positions", atoms.positions), ("forces", atoms.get_forces())):
        if not np.isfinite(values).all():
            index = int(np.argmax(~np.isfinite(values).all(axis=1)))
            return f"{what} of atom {index} ({atoms.symbols[index]}) are NaN or infinite"
    if not np.isfinite(atoms.get_potential_energy()):
        return "the energy is NaN or infinite"
    if not temperature <= max_temperature:
        return f"the temperature is {temperature:.0f} K, above {max_temperature:.0f} K"
    return None


def find_contact(atoms: Atoms) -> str | None:
    """Describes the two atoms that are closest to each other, if they are too close; None otherwise. O(N)."""
    radii = _TOUCHING * covalent_radii[atoms.numbers]
    first, second, distance = _pairs(atoms, 2.0 * float(radii.max(initial=0.1)))
    near = np.flatnonzero(distance < radii[first] + radii[second])
    return _apart(atoms, first, second, distance, near[np.argmin(distance[near])]) if len(near) else None


class RangeMonitor:
    """Notices atoms at distances that training did not show, by the guards of potentials: closer, or in a gap.

    Without a potential that has guards nothing is noticed; any member of a committee counts. ``looks`` and ``outside``
    count the structures looked at and those outside, ``first`` says the first of these in words.
    """

    def __init__(self, atoms: Atoms) -> None:
        self.looks, self.outside, self.first = 0, 0, ""
        self._ranges: list[list[np.ndarray]] = []  # where distances that training did not show begin and end
        for potential in atoms.calc.potentials if isinstance(atoms.calc, PotentialCalculator) else ():
            core, bond = potential.core_guard, potential.bond_guard
            for guard, start in ((core, core.onset - torch.inf), (bond, bond.start)):
                if guard:
                    self._ranges.append([table.cpu().double().numpy() for table in (start, guard.onset)])

    def look(self, atoms: Atoms, step: int) -> None:
        """Looks at a structure; O(N)."""
        present = np.ix_(np.unique(atoms.numbers), np.unique(atoms.numbers))
        reach = max((float(end[present].max(initial=0.0)) for _, end in self._ranges), default=0.0)
        if reach == 0.0:
            return
        self.looks += 1
        first, second, distance = _pairs(atoms, reach)
        kinds = atoms.numbers[first], atoms.numbers[second]
        inside = np.stack([np.minimum(distance - start[kinds], end[kinds] - distance) for start, end in self._ranges])
        if inside.max(initial=0.0) <= 0.0:
            return
        self.outside += 1
        if not self.first:
            number, worst = np.unravel_index(int(inside.argmax()), inside.shape)
            closer = np.isinf(self._ranges[number][0][0, 0])
            why = "closer than in training" if closer else "between bonds and the next distance of training"
            self.first = f"step {step}: {_apart(atoms, first, second, distance, int(worst))}, {why}"

    def __str__(self) -> str:
        """Says how often; empty where nothing was noticed."""
        often = f"{self.outside} of {self.looks} frames looked at, first at {self.first}"
        return f"outside of the training range in {often}" if self.outside else ""


def _pairs(atoms: Atoms, reach: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns pairs of atoms within ``reach`` Å, in both directions, and their distances."""
    # ASE's neighbor list divides an open box into bins, which for a molecule in 50 Å takes as long as a hundred steps.
    arrays = {"positions": atoms.positions, "cell": atoms.cell.array[None], "pbc": atoms.pbc[None]}
    found = neighbor_list(SimpleNamespace(**{name: torch.tensor(values) for name, values in arrays.items()}), reach)
    first, second, shift = (x.numpy() for x in (found.center, found.neighbor, found.shift))
    apart = atoms.positions[second] - atoms.positions[first] + shift @ atoms.cell.array
    return first, second, np.linalg.norm(apart, axis=1)


def _apart(atoms: Atoms, first: np.ndarray, second: np.ndarray, distance: np.ndarray, pair: int) -> str:
    i, j = int(first[pair]), int(second[pair])
    return f"atoms {i} ({atoms.symbols[i]}) and {j} ({atoms.symbols[j]}) are {distance[pair]:.2f} Å apart"


def is_committee(atoms: Atoms) -> bool:
    """Whether the calculator reports how much its members disagree."""
    return "forces_spread" in getattr(atoms.calc, "implemented_properties", ())


def largest_spread(atoms: Atoms) -> tuple[float, int]:
    """Returns the largest spread of a committee's forces on an atom in eV/Å, and the index of that atom."""
    spread = atoms.calc.get_property("forces_spread", atoms)
    index = int(np.argmax(spread))
    return float(spread[index]), index


class DeviationMonitor:
    """Stops a run when a committee's forces spread too much, and saves frames for labelling.

    At most one frame per ``trajectory_interval`` is saved, into a file that is created with the first. ``saved`` are
    step and end in bytes of the last one that a resumed run has saved, if any; what follows is removed.

    Raises:
        ConfigError: a spread is given and the calculator is no committee.
        SimulationError: the file ends before.
    """

    def __init__(self, atoms: Atoms, path: Path, settings: MDSettings, saved: Sequence[int]) -> None:
        self._path, self._settings, self._saved = path, settings, tuple(saved)
        self._is_on = settings.max_spread is not None or settings.save_spread is not None
        if self._is_on and not is_committee(atoms):
            raise ConfigError("max_spread and save_spread need a committee: give further models with --committee")
        self._file = ExtxyzTrajectory(path, self._saved[1]) if self._saved else None
        if not self._saved:
            path.unlink(missing_ok=True)

    def find_problem(self, atoms: Atoms, step: int) -> str | None:
        """Saves the frame if it is due, and describes why the run must stop; None when it may go on."""
        if not self._is_on:
            return None
        spread, index = largest_spread(atoms)
        most, least = self._settings.max_spread, self._settings.save_spread
        stops = most is not None and not spread <= most
        due = not self._saved or step >= self._saved[0] + self._settings.trajectory_interval
        if stops or (least is not None and spread > least and due):
            self._save(atoms, step)
        if not stops:
            return None
        return (
            f"the committee's forces on atom {index} ({atoms.symbols[index]}) spread by {spread:.3g} eV/Å, above "
            f"{most:g} eV/Å"
        )

    def saved(self) -> tuple[int, ...]:
        """Returns step and end of the last saved frame, once it is on disk; nothing where there is none."""
        if self._file is not None:
            self._saved = self._saved[0], self._file.position()
        return self._saved

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()

    def _save(self, atoms: Atoms, step: int) -> None:
        self._file = self._file or ExtxyzTrajectory(self._path, None)
        frame = make_frame(atoms, step, step * self._settings.timestep)
        frame.arrays["forces_spread"] = np.array(atoms.calc.get_property("forces_spread", atoms))
        frame.info["energy_spread"] = float(atoms.calc.get_property("energy_spread", atoms))
        self._file.write(frame)
        self._saved = (step,)
