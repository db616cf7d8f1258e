"""The numbers of an evaluation, and how they are printed."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
from ase.data import chemical_symbols
from numpy.typing import NDArray

from escaip.evaluate.records import Records
from escaip.units import GPA

ENERGY_THRESHOLD = 0.02
"""eV; of the total energy, for EFwT."""
FORCE_THRESHOLD = 0.03
"""eV/Å; of the largest force component error, for EFwT."""
_NUM_WORST = 10


@dataclass(frozen=True)
class Errors:
    """Of ``count`` entries: mean absolute, root mean square and largest absolute error."""

    count: int
    mae: float
    rmse: float
    largest: float

    @classmethod
    def of(cls, differences: NDArray[np.float64]) -> Errors | None:
        """From differences of any shape, NaN where there is no label; None without any."""
        values = differences[np.isfinite(differences)]
        if values.size == 0:
            return None
        absolute = np.abs(values)
        return cls(int(values.size), float(absolute.mean()), float(np.sqrt((values**2).mean())), float(absolute.max()))


@dataclass(frozen=True)
class Quantity:
    """Errors of one quantity beside those of trivial predictors, by name."""

    errors: Errors
    baselines: dict[str, Errors]


@dataclass(frozen=True)
class EvaluationReport:
    """Result of :func:`escaip.evaluate.evaluate`; energies in eV, forces in eV/Å, stress in eV/Å³.

    Attributes:
        num_structures, num_atoms: evaluated.
        free_atoms_only: whether forces of constrained atoms were left out.
        energy: total energy, or None without labels.
        energy_per_atom: with baselines ``references`` (the potential's element references alone) and ``mean`` (the
            mean energy per atom of this very data).
        forces: over components, with baseline ``zero``.
        force_cosine: mean cosine between predicted and labelled force; 0 counts where one of them is zero.
        stress: over components, with baseline ``zero``.
        energy_forces_within_threshold: fraction of structures with the energy within 0.02 eV and every force
            component within 0.03 eV/Å (EFwT of the Open Catalyst challenge).
        forces_by_element: by symbol.
        rotation_error: RMS of ``F(R x) − R F(x)`` in eV/Å over random rotations, for models whose forces are not
            equivariant by construction; else None.
        worst: structure ids with their largest force component error (eV/Å) and energy error (eV/atom), worst first.
        seconds: of wall time for the predictions.
    """

    num_structures: int
    num_atoms: int
    free_atoms_only: bool
    energy: Errors | None
    energy_per_atom: Quantity | None
    forces: Quantity | None
    force_cosine: float | None
    stress: Quantity | None
    energy_forces_within_threshold: float | None
    forces_by_element: dict[str, Errors]
    rotation_error: float | None
    worst: tuple[tuple[str, float, float], ...]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Returns plain JSON values; what is unknown is None."""
        values: dict[str, Any] = _plain(dataclasses.asdict(self))
        return values

    def table(self) -> str:
        """Returns a table for a terminal."""
        atoms = ", free atoms only" if self.free_atoms_only else ""
        lines = [f"{self.num_structures} structures, {self.num_atoms} atoms{atoms} ({self.seconds:.1f} s)", ""]
        lines.append(f"{'':<22}{'MAE':>12}{'RMSE':>12}{'largest':>12}")
        rows = (
            ("energy", "meV/atom", self.energy_per_atom, 1e3),
            ("forces", "meV/Å", self.forces, 1e3),
            ("stress", "GPa", self.stress, 1 / GPA),
        )
        for name, unit, quantity, factor in rows:
            if quantity is None:
                lines.append(f"{name:<22}{'no labels':>12}")
                continue
            lines.append(_row(f"{name} ({unit})", quantity.errors, factor))
            lines.extend(_row(f"  predicting {key}", errors, factor) for key, errors in quantity.baselines.items())
        lines.extend(_row(f"forces of {symbol} (meV/Å)", e, 1e3) for symbol, e in self.forces_by_element.items())
        lines.append("")
        if self.force_cosine is not None:
            lines.append(f"force cosine {self.force_cosine:.4f}")
        if self.energy_forces_within_threshold is not None:
            lines.append(f"energy and forces within threshold (EFwT) {100 * self.energy_forces_within_threshold:.2f} %")
        if self.rotation_error is not None:
            lines.append(f"rotation error of the direct forces {1e3 * self.rotation_error:.2f} meV/Å RMS")
        return "\n".join(lines).rstrip()


def compute_report(
    records: Records, *, free_atoms_only: bool = False, rotation_error: float | None = None, seconds: float = 0.0
) -> EvaluationReport:
    """Turns records into a report; see :class:`EvaluationReport` for every definition."""
    counted = ~records.fixed if free_atoms_only else np.ones(len(records.fixed), dtype=bool)
    force_difference = np.where(counted[:, None], records.predicted_forces - records.forces, np.nan)
    force_label = np.where(counted[:, None], records.forces, np.nan)
    energy_difference = records.predicted_energy - records.energy
    stress_difference = records.predicted_stress - records.stress
    forces = _quantity(force_difference, {"zero": np.where(np.isnan(force_difference), np.nan, force_label)})
    return EvaluationReport(
        num_structures=len(records.num_atoms),
        num_atoms=len(records.numbers),
        free_atoms_only=free_atoms_only,
        energy=Errors.of(energy_difference),
        energy_per_atom=_energy_per_atom(records, energy_difference),
        forces=forces,
        force_cosine=_cosine(records, counted) if forces is not None else None,
        stress=_quantity(stress_difference, {"zero": np.where(np.isnan(stress_difference), np.nan, records.stress)}),
        energy_forces_within_threshold=_within_threshold(records, energy_difference, force_difference),
        forces_by_element=_by_element(records, force_difference),
        rotation_error=rotation_error,
        worst=_worst(records, energy_difference, force_difference),
        seconds=seconds,
    )


def largest_by_structure(records: Records, difference: NDArray[np.float64]) -> NDArray[np.float64]:
    """``(S,)`` largest absolute component over the atoms of each structure; NaN where none counts."""
    largest = np.full(len(records.num_atoms), -np.inf)
    per_atom = np.abs(difference).max(axis=1)
    valid = np.isfinite(per_atom)
    np.maximum.at(largest, records.structure[valid], per_atom[valid])
    return np.where(np.isinf(largest), np.nan, largest)


def _quantity(difference: NDArray[np.float64], baselines: dict[str, NDArray[np.float64]]) -> Quantity | None:
    errors = Errors.of(difference)
    if errors is None:
        return None
    trivial = {name: Errors.of(values) for name, values in baselines.items()}
    return Quantity(errors, {name: value for name, value in trivial.items() if value is not None})


def _energy_per_atom(records: Records, difference: NDArray[np.float64]) -> Quantity | None:
    labels = records.energy / records.num_atoms
    if not np.isfinite(labels).any():
        return None
    baselines = {"mean": np.nanmean(labels) - labels}
    if records.reference_energy.any():
        baselines = {"references": records.reference_energy / records.num_atoms - labels, **baselines}
    return _quantity(difference / records.num_atoms, baselines)


def _cosine(records: Records, counted: NDArray[np.bool_]) -> float:
    chosen = counted & np.isfinite(records.forces).all(axis=1)
    label, found = records.forces[chosen], records.predicted_forces[chosen]
    lengths = np.linalg.norm(label, axis=1) * np.linalg.norm(found, axis=1)
    return float((np.einsum("ij,ij->i", label, found) / np.maximum(lengths, 1e-24)).mean())


def _within_threshold(records: Records, energy: NDArray[np.float64], forces: NDArray[np.float64]) -> float | None:
    largest = largest_by_structure(records, forces)
    labelled = np.isfinite(energy) & np.isfinite(largest)
    if not labelled.any():
        return None
    within = (np.abs(energy[labelled]) < ENERGY_THRESHOLD) & (largest[labelled] < FORCE_THRESHOLD)
    return float(within.mean())


def _by_element(records: Records, difference: NDArray[np.float64]) -> dict[str, Errors]:
    found = {}
    for number in np.unique(records.numbers):
        errors = Errors.of(difference[records.numbers == number])
        if errors is not None:
            found[chemical_symbols[number]] = errors
    return found


def _worst(
    records: Records, energy: NDArray[np.float64], forces: NDArray[np.float64]
) -> tuple[tuple[str, float, float], ...]:
    largest, per_atom = largest_by_structure(records, forces), np.abs(energy) / records.num_atoms
    order = np.argsort(-np.nan_to_num(largest if np.isfinite(largest).any() else per_atom), kind="stable")
    return tuple((records.structure_id[i], float(largest[i]), float(per_atom[i])) for i in order[:_NUM_WORST])


def _row(name: str, errors: Errors, factor: float) -> str:
    numbers = "".join(f"{factor * value:>12.4g}" for value in (errors.mae, errors.rmse, errors.largest))
    return f"{name:<22}{numbers}"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value
