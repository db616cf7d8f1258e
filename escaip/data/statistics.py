"""What a potential needs to know about its training set: element references, force scale, counts."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from escaip.data.validation import MAX_ATOMIC_NUMBER
from escaip.errors import DataError

if TYPE_CHECKING:
    from escaip.data.atomic_data import AtomicData

_BLOCK = 2048
_RANK_TOLERANCE = 1e-9


@dataclass(frozen=True)
class Statistics:
    """Statistics of a training set.

    Attributes:
        element_references: eV per atom of each element, by atomic number.
        force_rms: eV/Å, root mean square over the force components of labelled, free atoms; NaN without forces.
        energy_residual_rms_per_atom: eV/atom, root mean square of ``(energy − sum of references) / n``; NaN without
            energies.
        elements: atomic numbers present, sorted.
        num_structures: structures looked at.
        num_atoms: atoms in them.
        label_counts: structures that carry ``energy``, ``forces``, ``stress``.
        references_unique: False when the compositions do not determine the references (a single molecule, a fixed
            stoichiometry): the references are then those of least norm, their sum still right for such compositions.
        mean_neighbors: neighbors per atom, where it was measured.
    """

    element_references: dict[int, float]
    force_rms: float
    energy_residual_rms_per_atom: float
    elements: tuple[int, ...]
    num_structures: int
    num_atoms: int
    label_counts: dict[str, int] = field(default_factory=dict)
    references_unique: bool = True
    mean_neighbors: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; NaN becomes None."""
        values = asdict(self)
        values["element_references"] = {str(z): energy for z, energy in self.element_references.items()}
        values["elements"] = list(self.elements)
        for key in ("force_rms", "energy_residual_rms_per_atom"):
            values[key] = None if np.isnan(values[key]) else values[key]
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Statistics:
        """Undoes :meth:`to_dict`.

        Raises:
            DataError: unknown or missing entries.
        """
        entries = dict(values)
        try:
            entries["element_references"] = {int(z): float(e) for z, e in entries["element_references"].items()}
            entries["elements"] = tuple(int(z) for z in entries["elements"])
            for key in ("force_rms", "energy_residual_rms_per_atom"):
                entries[key] = float("nan") if entries[key] is None else float(entries[key])
            return cls(**entries)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"statistics: cannot be read ({error!r}); fit them again") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes JSON, aside first and then under its name."""
        target = Path(path)
        aside = target.with_name(f".{target.name}.{os.getpid()}")
        aside.write_text(json.dumps(self.to_dict(), indent=1), encoding="utf-8")
        os.replace(aside, target)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Statistics:
        """Reads what :meth:`save` wrote.

        Raises:
            DataError: no such file, or damaged.
        """
        try:
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: statistics cannot be read ({error}); fit them again") from error


def fit_statistics(
    dataset: Iterable[AtomicData],
    isolated_energies: Mapping[int, float] | None = None,
    *,
    require_energy: bool = True,
) -> Statistics:
    """Statistics in one pass over a training set, with memory independent of its size.

    References minimise ``sum_s [(E_s − sum_Z n_sZ e_Z) / n_s]²`` in float64, through a QR factorisation updated
    block by block (normal equations would square the condition number). Where compositions do not determine them, the
    solution of least norm is taken, which is the limit of ridge regression for a vanishing penalty.

    Args:
        dataset: structures; NaN labels are missing.
        isolated_energies: eV of isolated atoms by atomic number, used instead of fitting.
        require_energy: refuse a set without energies; False leaves its references empty.

    Raises:
        DataError: no structures, no energy on any structure (when references have to be fitted), or an element without
            isolated-atom energy.
    """
    accumulator = _Accumulator()
    for data in dataset:
        accumulator.add(data)
    if accumulator.num_structures == 0:
        raise DataError("statistics: 0 structures; check the training set, its filters and split")
    statistics = accumulator.counts()
    if isolated_energies is not None:
        references = _given_references(isolated_energies, statistics.elements)
        unique = True
    elif accumulator.labels["energy"] == 0:
        if not require_energy:
            return statistics
        raise DataError("statistics: no structure has an energy, so element references cannot be fitted; check keys")
    else:
        references, unique = accumulator.solve(statistics.elements)
    return replace(
        statistics,
        element_references=references,
        references_unique=unique,
        energy_residual_rms_per_atom=accumulator.residual_rms(references),
    )


class _Accumulator:
    """Sums of one pass. ``factor`` is the R of a QR factorisation of rows ``[n_sZ / n_s, E_s / n_s]``."""

    def __init__(self) -> None:
        self.num_structures = 0
        self.num_atoms = 0
        self.labels = {"energy": 0, "forces": 0, "stress": 0}
        self._present = np.zeros(MAX_ATOMIC_NUMBER + 1, dtype=bool)
        self._force_sum, self._force_count = 0.0, 0
        self._rows: list[NDArray[np.float64]] = []
        self._factor = np.zeros((0, MAX_ATOMIC_NUMBER + 2))

    def add(self, data: AtomicData) -> None:
        counts = np.bincount(data.atomic_numbers.numpy(), minlength=MAX_ATOMIC_NUMBER + 1)
        n = int(counts.sum())
        self.num_structures += 1
        self.num_atoms += n
        self._present |= counts > 0
        for label in self.labels:
            self.labels[label] += data.has_label(label)
        energy = float(data.energy)
        if not np.isnan(energy):
            self._rows.append(np.append(counts / n, energy / n))
            if len(self._rows) == _BLOCK:
                self._reduce()
        forces = data.forces.numpy()[~data.fixed.numpy()]
        forces = forces[~np.isnan(forces).any(axis=1)]
        self._force_sum += float((forces**2).sum())
        self._force_count += forces.size

    def _reduce(self) -> None:
        if self._rows:
            stacked = np.concatenate([self._factor, np.stack(self._rows)])
            self._factor = np.asarray(np.linalg.qr(stacked, mode="r"))
            self._rows = []

    def counts(self) -> Statistics:
        rms = float(np.sqrt(self._force_sum / self._force_count)) if self._force_count else float("nan")
        return Statistics(
            element_references={},
            force_rms=rms,
            energy_residual_rms_per_atom=float("nan"),
            elements=tuple(int(z) for z in np.flatnonzero(self._present)),
            num_structures=self.num_structures,
            num_atoms=self.num_atoms,
            label_counts=dict(self.labels),
        )

    def solve(self, elements: tuple[int, ...]) -> tuple[dict[int, float], bool]:
        self._reduce()
        columns = self._factor[:, list(elements)]
        solution, _, rank, _ = np.linalg.lstsq(columns, self._factor[:, -1], rcond=_RANK_TOLERANCE)
        return {z: float(e) for z, e in zip(elements, solution, strict=True)}, bool(rank == len(elements))

    def residual_rms(self, references: Mapping[int, float]) -> float:
        self._reduce()
        if self.labels["energy"] == 0:
            return float("nan")
        vector = np.zeros(MAX_ATOMIC_NUMBER + 1)
        vector[list(references)] = list(references.values())
        residual = self._factor[:, :-1] @ vector - self._factor[:, -1]
        return float(np.sqrt((residual**2).sum() / self.labels["energy"]))


def _given_references(energies: Mapping[int, float], elements: tuple[int, ...]) -> dict[int, float]:
    from ase.data import chemical_symbols

    missing = [chemical_symbols[z] for z in elements if z not in energies]
    if missing:
        raise DataError(
            f"isolated_energies: no energy for {', '.join(missing)}; add it or drop isolated_energies to fit"
        )
    return {z: float(energies[z]) for z in elements}
