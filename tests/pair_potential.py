"""Pair potentials of tests: smooth, quick and without memory, so that runs can be compared bit for bit."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from ase import Atoms
from ase.calculators.calculator import Calculator, all_changes
from ase.stress import full_3x3_to_voigt_6_stress
from vesin import NeighborList


class PairPotential(Calculator):
    """A sum over the pairs of ``edges`` of the energies that ``pair`` gives."""

    implemented_properties = ["energy", "free_energy", "forces", "stress"]  # noqa: RUF012
    cutoff: float

    def pair(self, distances: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns energies ``E`` and ``dE/dr / r``."""
        raise NotImplementedError

    def edges(self, atoms: Atoms) -> tuple[np.ndarray, np.ndarray]:
        """Returns first atoms and vectors to the second atoms, each pair in both directions."""
        search = NeighborList(cutoff=self.cutoff, full_list=True, n_threads=1)
        first, vectors = search.compute(atoms.positions, atoms.cell.array, atoms.pbc, "iD")
        return first.astype(np.int64), vectors

    def check_state(self, atoms: Atoms, tol: float = 1e-15) -> list[str]:
        """ASE's own takes longer than many of these potentials."""
        known = self.atoms is not None and np.array_equal(self.atoms.positions, atoms.positions)
        return [] if known and np.array_equal(self.atoms.cell.array, atoms.cell.array) else list(all_changes)

    def calculate(
        self, atoms: Atoms | None = None, properties: Sequence[str] = (), system_changes: Sequence[str] = ()
    ) -> None:
        super().calculate(atoms, properties, system_changes or all_changes)
        first, vectors = self.edges(self.atoms)
        energies, slopes = self.pair(np.sqrt((vectors**2).sum(axis=1)))
        pulls = slopes[:, None] * vectors
        forces = np.zeros_like(self.atoms.positions)
        np.add.at(forces, first, pulls)
        energy = 0.5 * float(energies.sum())
        self.results = {"energy": energy, "free_energy": energy, "forces": forces}
        if self.atoms.pbc.all():
            virial = 0.5 * vectors.T @ pulls
            self.results["stress"] = full_3x3_to_voigt_6_stress(virial / self.atoms.get_volume())


class Springs(PairPotential):
    """``k/2 (r − length)²`` between atoms nearer than ``1.2 length``."""

    def __init__(self, stiffness: float, length: float) -> None:
        super().__init__()
        self.stiffness, self.length, self.cutoff = stiffness, length, 1.2 * length

    def pair(self, distances: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        stretch = distances - self.length
        return 0.5 * self.stiffness * stretch**2, self.stiffness * stretch / distances


class Argon(PairPotential):
    """Lennard-Jones times ``(1 − (r/c)²)²``; forces of the first atom are NaN ``nan_after`` calls."""

    EPSILON, SIGMA, cutoff = 0.0104, 3.4, 8.0

    def __init__(self, nan_after: float = np.inf) -> None:
        super().__init__()
        self.nan_after, self.num_calls = nan_after, 0

    def pair(self, distances: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        square = distances**2
        inverse, window = self.SIGMA**6 / square**3, 1 - square / self.cutoff**2
        energy = 4 * self.EPSILON * (inverse**2 - inverse)
        slope = 8 * self.EPSILON * (-6 * inverse**2 + 3 * inverse) / square * window**2
        return energy * window**2, slope - 4 * energy * window / self.cutoff**2

    def calculate(self, *args: object, **options: object) -> None:
        super().calculate(*args, **options)  # type: ignore[arg-type]
        self.num_calls += 1
        if self.num_calls > self.nan_after:
            self.results["forces"][0, 0] = np.nan
