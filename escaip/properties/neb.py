"""Minimum-energy path between two structures, by nudged elastic bands.

Improved tangent (Henkelman and Jónsson, J. Chem. Phys. 113, 9978, 2000), climbing image (Henkelman, Uberuaga and
Jónsson, J. Chem. Phys. 113, 9901, 2000), started from an image-dependent pair potential (Smidstrup et al., J. Chem.
Phys. 140, 214106, 2014).
"""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from ase import Atoms
from ase.geometry import find_mic
from ase.mep import NEB
from ase.optimize import BFGS, FIRE
from ase.utils.forcecurve import fit_images

from escaip.errors import ConfigError, SimulationError
from escaip.files import write_results
from escaip.properties.common import MODEL, RELAXATIONS, at_rest, new_figure, table
from escaip.simulate.output import freeze

OPTIMIZERS = {"fire": FIRE, "bfgs": BFGS}
_ROUGH = 5.0  # times fmax: the image climbs once the band lies near the path, or it might climb another ridge
_SAME = 0.05  # Å


@dataclass(frozen=True)
class MinimumEnergyPath:
    """A minimum-energy path.

    Attributes:
        images: structures along the path with both ends, energies and forces.
        energies: (m,) eV.
        distances: (m,) Å, length of the path up to each image.
        steps: of the optimizer.
        largest_force: eV/Å, on the band.
        climbed: whether the highest image climbed to the saddle point.
    """

    images: list[Atoms]
    energies: np.ndarray
    distances: np.ndarray
    steps: int
    largest_force: float
    climbed: bool

    @property
    def saddle(self) -> int:
        """Index of the highest image."""
        return int(self.energies.argmax())

    @property
    def forward(self) -> float:
        """Barrier from the first structure, eV."""
        return float(self.energies.max() - self.energies[0])

    @property
    def backward(self) -> float:
        """Barrier from the last structure, eV."""
        return float(self.energies.max() - self.energies[-1])

    @property
    def reaction_energy(self) -> float:
        """Energy of the last structure less that of the first, eV."""
        return float(self.energies[-1] - self.energies[0])

    def summary(self) -> str:
        """Returns a table of the images, and the barriers."""
        rows = [["image", "path (Å)", "energy (eV)"]]
        for index, (distance, energy) in enumerate(zip(self.distances, self.energies)):
            mark = " *" if index == self.saddle else ""
            rows.append([f"{index}{mark}", f"{distance:.3f}", f"{energy - self.energies[0]:.4f}"])
        way = "climbing image" if self.climbed else "highest image, which need not be the saddle"
        return (
            f"{table(rows)}\nbarrier {self.forward:.4f} eV forward, {self.backward:.4f} eV backward ({way}); reaction "
            f"energy {self.reaction_energy:+.4f} eV\n{self.steps} steps, largest force on the band "
            f"{self.largest_force:.4f} eV/Å"
        )

    def write(self, folder: str | os.PathLike[str], about: Mapping[str, str] | None = None) -> None:
        """Writes ``neb.json``, ``neb.png`` and the images, ``neb.extxyz``.

        ``about``, such as the origin of the model, stands first in the JSON.
        """
        figure = new_figure()
        axis = figure.subplots()
        curve = fit_images(self.images)
        axis.plot(curve.fit_path, curve.fit_energies, color=MODEL, linewidth=1)
        axis.plot(self.distances, self.energies - self.energies[0], "o", color=MODEL)
        axis.set(xlabel="path (Å)", ylabel="energy (eV)")
        axis.set_title(f"barrier {self.forward:.3f} eV forward, {self.backward:.3f} eV backward")
        values = {
            **(about or {}),
            "formula": self.images[0].get_chemical_formula(), "barrier_forward_eV": self.forward,
            "barrier_backward_eV": self.backward, "reaction_energy_eV": self.reaction_energy,
            "climbing_image": self.climbed, "saddle_image": self.saddle, "distances_A": self.distances,
            "energies_eV": self.energies, "steps": self.steps, "largest_force_eV/A": self.largest_force,
        }  # fmt: skip
        write_results(folder, {"neb.json": values, "neb.png": figure, "neb.extxyz": self.images})


class _Band(NEB):
    """Keeps its largest force; with a shared calculator, asking again would evaluate every image again."""

    largest_force = float("inf")

    def get_forces(self) -> np.ndarray:
        """Returns the forces ``(images · n, 3)`` on the band, eV/Å."""
        forces = super().get_forces()
        self.largest_force = float(np.sqrt((forces**2).sum(axis=1).max()))
        return forces


def minimum_energy_path(
    initial: Atoms,
    final: Atoms,
    *,
    images: int = 5,
    relaxation: str = "ions",
    climb: bool = True,
    fmax: float = 0.05,
    steps: int = 500,
    spring: float = 0.1,
    optimizer: str = "fire",
    report: Callable[[int, float], None] | None = None,
) -> MinimumEnergyPath:
    """Finds the minimum-energy path between two structures by relaxing a band of images.

    Args:
        initial: first structure with the calculator of all images; it is not changed.
        final: last structure, the same atoms in the same order and cell; its calculator is not used.
        images: number of images between the ends.
        relaxation: of the ends: ``"ions"``, or ``"none"`` for ends that are minima.
        climb: whether the highest image climbs to the saddle point.
        fmax: largest force on the band at the end, eV/Å; the ends are relaxed to a fifth of it.
        steps: largest number of steps of the optimizer, and of each relaxation.
        spring: constant between neighboring images, eV/Å².
        optimizer: ``"fire"`` or ``"bfgs"``.
        report: called after each step with the step and the largest force in eV/Å.

    Raises:
        ConfigError: ends that do not belong together, no calculator, or a setting out of range.
        SimulationError: not converged, or both ends are one structure.
    """
    if len(initial) != len(final) or (initial.numbers != final.numbers).any():
        raise ConfigError(
            f"the ends are {initial.symbols} and {final.symbols}: they must be the same atoms in the same order"
        )
    if not np.allclose(initial.cell.array, final.cell.array, atol=1e-6) or (initial.pbc != final.pbc).any():
        raise ConfigError("the ends have different cells: a path at constant cell needs one for both")
    if images < 1:
        raise ConfigError(f"images is {images}: it must be at least 1")
    if relaxation not in RELAXATIONS[1:]:
        raise ConfigError(f"relaxation is {relaxation!r}: the cell is constant along a path, choose ions or none")
    if optimizer not in OPTIMIZERS:
        raise ConfigError(f"optimizer is {optimizer!r}: choose {' or '.join(OPTIMIZERS)}")
    for name, value in (("fmax", fmax), ("steps", steps), ("spring", spring)):
        if not value > 0:
            raise ConfigError(f"{name} is {value}: it must be above 0")
    ends = []
    for atoms, name in ((initial, "the first structure"), (final, "the last structure")):
        own = atoms.copy()
        own.calc = initial.calc
        ends.append(freeze(at_rest(own, relaxation, fmax / 5, steps, name)))
    _check_apart(*ends)
    band = [ends[0], *(ends[0].copy() for _ in range(images)), ends[1]]
    for image in band[1:-1]:
        image.calc = initial.calc
    chain = _Band(band, k=spring, climb=False, method="improvedtangent", allow_shared_calculator=True)
    chain.interpolate("idpp", mic=bool(initial.pbc.any()), apply_constraint=False)
    taken = _optimize(chain, OPTIMIZERS[optimizer], _ROUGH * fmax if climb else fmax, steps, report, 0)
    if climb:
        chain.climb = True
        taken = _optimize(chain, OPTIMIZERS[optimizer], fmax, steps, report, taken)
    frozen = [ends[0], *(freeze(image) for image in band[1:-1]), ends[1]]
    return MinimumEnergyPath(
        images=frozen, energies=np.array([image.get_potential_energy() for image in frozen]),
        distances=np.cumsum([0.0, *(np.linalg.norm(_moved(a, b)) for a, b in itertools.pairwise(frozen))]),
        steps=taken, largest_force=chain.largest_force, climbed=climb,
    )  # fmt: skip


def _optimize(
    chain: _Band, optimizer: Any, fmax: float, steps: int, report: Callable[[int, float], None] | None, taken: int
) -> int:
    """Runs the optimizer and returns the number of steps taken so far."""
    dynamics = optimizer(chain, logfile=None)

    def watch() -> None:
        largest = chain.largest_force
        if not np.isfinite(largest):
            raise SimulationError("forces on the band are NaN: atoms may cross, look at the two structures")
        if report is not None:
            report(taken + int(dynamics.nsteps), largest)

    dynamics.attach(watch)
    dynamics.run(fmax=fmax, steps=max(1, steps - taken))
    if chain.largest_force > fmax:
        raise SimulationError(
            f"the band is not converged after {taken + dynamics.nsteps} steps (largest force {chain.largest_force:.3f} "
            f"of {fmax:g} eV/Å): raise steps, use other images, or look for a minimum in between"
        )
    return taken + int(dynamics.nsteps)


def _moved(first: Atoms, second: Atoms) -> np.ndarray:
    """Returns the displacements ``(n, 3)`` Å of the atoms to their nearest images."""
    return np.asarray(find_mic(second.positions - first.positions, first.cell, first.pbc)[0])


def _check_apart(first: Atoms, last: Atoms) -> None:
    moved = np.linalg.norm(_moved(first, last), axis=1)
    distance = float(np.linalg.norm(moved))
    if distance < _SAME:
        raise SimulationError(
            f"the ends are one structure ({distance:.3f} Å apart after relaxing): give two different minima"
        )
    if len(first) > 1 and (moved > 3.0).sum() > len(first) // 2:
        warnings.warn("most atoms move by more than 3 Å: are those of both ends in the same order?", stacklevel=3)
