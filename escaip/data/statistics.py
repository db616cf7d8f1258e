"""Statistics of a training set: atomic energies, force scale, counts."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from escaip.data.store import Store, composition_key, compositions, label_counts
from escaip.data.structure import LABELS
from escaip.data.validation import MAX_ATOMIC_NUMBER
from escaip.errors import DataError
from escaip.files import write_json
from escaip.types import TARGETS

if TYPE_CHECKING:
    from escaip.data.structure import AtomicData

_BLOCK = 2048
_BLOCK_ROWS = 10_000_000
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
        num_structures: structures of the set.
        num_atoms: atoms in them.
        label_counts: structures that carry each of ``escaip.types.TARGETS``; further ones only where there are any.
        references_unique: False when the compositions do not determine the references (a single molecule, a fixed
            stoichiometry): the references are then those of least norm, their sum still right for such compositions.
        mean_neighbors: neighbors per atom, where it was measured.
        references_fitted: False when the references are given energies of isolated atoms.
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
    references_fitted: bool = True

    def to_dict(self) -> dict[str, Any]:
        """Returns plain JSON values; NaN becomes None."""
        values = asdict(self)
        values["element_references"] = {str(z): energy for z, energy in self.element_references.items()}
        values["elements"] = list(self.elements)
        for key in ("force_rms", "energy_residual_rms_per_atom"):
            values[key] = None if np.isnan(values[key]) else values[key]
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Statistics:
        """Returns the statistics that ``to_dict`` described.

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
        """Writes a JSON file."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Statistics:
        """Reads a file that ``save`` wrote.

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
    """Fits statistics in one pass over a training set, with memory for its compositions, not its structures.

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
    sums = TrainingSums()
    for data in dataset:
        sums.add(data)
    return sums.statistics(isolated_energies, require_energy=require_energy)


class TrainingSums:
    """Sums over a training set; energies are kept by composition."""

    def __init__(self) -> None:
        self.num_structures = 0
        self.num_atoms = 0
        self.labels = dict.fromkeys(TARGETS, 0)
        self._present = np.zeros(MAX_ATOMIC_NUMBER + 1, dtype=bool)
        self._force_sum, self._force_count = 0.0, 0
        # Energy per atom by composition: number, mean, sum of squared deviations from the mean.
        self._energies: dict[bytes, tuple[int, float, float]] = {}

    def add(self, data: AtomicData) -> None:
        """Adds one structure."""
        numbers = data.atomic_numbers.numpy()
        self.num_structures += 1
        self.num_atoms += len(numbers)
        self._present[numbers] = True
        for label in self.labels:
            self.labels[label] += data.has_label(label)
        energy = float(data.energy)
        if not np.isnan(energy):
            self._merge(composition_key(numbers), 1, energy / len(numbers), 0.0)
        forces = data.forces.numpy()[~data.fixed.numpy()]
        forces = forces[~np.isnan(forces).any(axis=1)]
        self._force_sum += float((forces**2).sum())
        self._force_count += forces.size

    def add_rows(self, store: Store, rows: NDArray[np.int64]) -> None:
        """Adds structures of a store by their positions, from its index alone."""
        keys = compositions(store.index)
        for start in range(0, len(rows), _BLOCK_ROWS):
            self._add_block(store, rows[start : start + _BLOCK_ROWS], keys)

    def _add_block(self, store: Store, rows: NDArray[np.int64], keys: list[bytes]) -> None:
        index = store.index
        natoms, codes = index["natoms"][rows], index["composition_codes"][rows]
        self.num_structures += len(rows)
        self.num_atoms += int(natoms.sum(dtype=np.int64))
        for code in np.unique(codes).tolist():
            self._present[np.frombuffer(keys[code], dtype="<i4")[::2]] = True
        for label, count in label_counts(index["labels"][rows], store.labels).items():
            self.labels[label] = self.labels.get(label, 0) + count
        self._force_sum += float(index["force_square_sum"][rows].sum())
        self._force_count += int(index["force_count"][rows].sum(dtype=np.int64))
        per_atom = index["energy"][rows] / natoms
        known = ~np.isnan(per_atom)
        per_atom, codes = per_atom[known], codes[known]
        # Deviations from one value of the composition: energies are large, their spread is not.
        shift = np.zeros(len(keys))
        shift[codes] = per_atom
        counts = np.bincount(codes, minlength=len(keys))
        deviations = per_atom - shift[codes]
        sums = np.bincount(codes, deviations, minlength=len(keys))
        squares = np.bincount(codes, deviations**2, minlength=len(keys))
        for code in np.flatnonzero(counts).tolist():
            count, offset = int(counts[code]), sums[code] / counts[code]
            spread = max(float(squares[code] - counts[code] * offset**2), 0.0)
            self._merge(keys[code], count, float(shift[code] + offset), spread)

    @property
    def elements(self) -> tuple[int, ...]:
        """Atomic numbers present, sorted."""
        return tuple(int(z) for z in np.flatnonzero(self._present))

    def statistics(
        self, isolated_energies: Mapping[int, float] | None = None, *, require_energy: bool = True
    ) -> Statistics:
        """Returns the statistics of the structures added; see ``fit_statistics``."""
        if self.num_structures == 0:
            raise DataError("statistics: 0 structures; check the training set, its filters and split")
        rms = float(np.sqrt(self._force_sum / self._force_count)) if self._force_count else float("nan")
        statistics = Statistics(
            element_references={},
            force_rms=rms,
            energy_residual_rms_per_atom=float("nan"),
            elements=self.elements,
            num_structures=self.num_structures,
            num_atoms=self.num_atoms,
            label_counts={label: count for label, count in self.labels.items() if count or label in LABELS},
        )
        factor = self._factor()
        if isolated_energies is not None:
            references, unique = _given_references(isolated_energies, statistics.elements), True
        elif not self._energies:
            if not require_energy:
                return statistics
            raise DataError(
                "statistics: no structure has an energy, so element references cannot be fitted; check keys"
            )
        else:
            columns = factor[:, list(statistics.elements)]
            solution, _, rank, _ = np.linalg.lstsq(columns, factor[:, -1], rcond=_RANK_TOLERANCE)
            references = {z: float(e) for z, e in zip(statistics.elements, solution, strict=True)}
            unique = bool(rank == len(references))
        return replace(
            statistics,
            element_references=references,
            references_unique=unique,
            references_fitted=isolated_energies is None,
            energy_residual_rms_per_atom=self._residual_rms(factor, references),
        )

    def _merge(self, key: bytes, count: int, mean: float, spread: float) -> None:
        """Joins two groups of energies of one composition (Chan et al., Am. Stat. 37, 242 (1983))."""
        had, old, kept = self._energies.get(key, (0, 0.0, 0.0))
        total, difference = had + count, mean - old
        self._energies[key] = (
            total,
            old + difference * count / total,
            kept + spread + difference**2 * had * count / total,
        )

    def _factor(self) -> NDArray[np.float64]:
        """Returns R of a QR factorisation of rows ``√m [n_Z / n, mean(E / n)]``, one for each composition."""
        factor = np.zeros((0, MAX_ATOMIC_NUMBER + 2))
        items = list(self._energies.items())
        for start in range(0, len(items), _BLOCK):
            rows = np.zeros((len(items[start : start + _BLOCK]), MAX_ATOMIC_NUMBER + 2))
            for row, (key, (count, mean, _)) in zip(rows, items[start : start + _BLOCK], strict=True):
                table = np.frombuffer(key, dtype="<i4").reshape(-1, 2)
                row[table[:, 0]] = table[:, 1] / table[:, 1].sum()
                row[-1] = mean
                row *= np.sqrt(count)
            factor = np.asarray(np.linalg.qr(np.concatenate([factor, rows]), mode="r"))
        return factor

    def _residual_rms(self, factor: NDArray[np.float64], references: Mapping[int, float]) -> float:
        count = sum(entry[0] for entry in self._energies.values())
        if count == 0:
            return float("nan")
        vector = np.zeros(MAX_ATOMIC_NUMBER + 1)
        vector[list(references)] = list(references.values())
        between = float(((factor[:, :-1] @ vector - factor[:, -1]) ** 2).sum())
        within = sum(entry[2] for entry in self._energies.values())
        return float(np.sqrt((between + within) / count))


def _given_references(energies: Mapping[int, float], elements: tuple[int, ...]) -> dict[int, float]:
    from ase.data import chemical_symbols

    missing = [chemical_symbols[z] for z in elements if z not in energies]
    if missing:
        raise DataError(
            f"isolated_energies: no energy for {', '.join(missing)}; add it or drop isolated_energies to fit"
        )
    return {z: float(energies[z]) for z in elements}
