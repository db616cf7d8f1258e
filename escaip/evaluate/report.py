"""Labels beside predictions, the errors between them, and the table of an evaluation."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
from ase.data import chemical_symbols
from numpy.typing import NDArray

from escaip.files import html_table, plain
from escaip.types import TARGETS, Target
from escaip.units import GPA

FloatArray = NDArray[np.float64]

ENERGY_THRESHOLD = 0.02
"""eV; of the total energy, for EFwT."""
FORCE_THRESHOLD = 0.03
"""eV/Å; of the largest force component error, for EFwT."""
_NUM_WORST = 10
_HEADER = ("", "MAE", "RMSE", "largest")


def shown_unit(target: Target) -> tuple[str, float]:
    """Returns the unit of a target in tables and plots, and the factor to it; stresses are shown in GPa."""
    return ("GPa", 1 / GPA) if target.name == "stress" else (target.reported_unit, target.reported_factor)


@dataclass(frozen=True)
class Records:
    """Labels and predictions of ``S`` structures with ``M`` atoms, in units of the targets; NaN where missing.

    Attributes:
        structure_id: S names.
        num_atoms: (S,).
        numbers: (M,) atomic numbers.
        fixed: (M,) constrained atoms.
        structure: (M,) index of the structure of each atom.
        reference_energy: (S,) eV, the potential's sum of element references.
        labels: by target, (S, *shape) or (M, *shape).
        predictions: of the same shapes.
    """

    structure_id: tuple[str, ...]
    num_atoms: NDArray[np.int64]
    numbers: NDArray[np.int64]
    fixed: NDArray[np.bool_]
    structure: NDArray[np.int64]
    reference_energy: FloatArray
    labels: dict[str, FloatArray]
    predictions: dict[str, FloatArray]

    def errors(self, target: Target, *, free_atoms_only: bool = False) -> FloatArray:
        """Returns predictions less labels, NaN where either is missing or a force is not counted."""
        difference = self.predictions[target.name] - self.labels[target.name]
        if free_atoms_only and target.name == "forces":
            difference[self.fixed] = np.nan
        return difference

    def per_atom(self, target: Target, values: FloatArray) -> FloatArray:
        """Divides ``(S, *shape)`` values of an extensive target by the numbers of atoms; others stay."""
        return values / self.num_atoms.reshape(-1, *[1] * len(target.shape)) if target.extensive else values


@dataclass(frozen=True)
class Errors:
    """Mean absolute, root mean square and largest absolute error of ``count`` entries."""

    count: int
    mae: float
    rmse: float
    largest: float

    @classmethod
    def of(cls, differences: FloatArray) -> Errors | None:
        """Summarises differences of any shape, NaN where a label is missing; None without any."""
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
    """Result of ``escaip.evaluate.evaluate``; energies in eV, forces in eV/Å, stress in eV/Å³; None without labels.

    Errors of forces and stress are those of components, with the baseline ``zero``. Baselines of the energy are
    ``references`` (the potential's element references alone) and ``mean`` (the mean energy per atom of this very data).

    Attributes:
        free_atoms_only: whether forces of constrained atoms were left out.
        force_cosine: mean cosine between predicted and labelled force; 0 counts where one of them is zero.
        energy_forces_within_threshold: fraction of structures with the energy within 0.02 eV and every force component
            within 0.03 eV/Å (EFwT of the Open Catalyst challenge).
        forces_by_element: by symbol.
        rotation_error: RMS of F(R x) − R F(x) over random rotations, for models whose forces are not equivariant by
            construction.
        worst: id, largest force component error, energy error per atom; worst first.
        seconds: wall time of the predictions.
        properties: further targets by name, in their unit (per atom where extensive), with baseline zero.
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
    properties: dict[str, Quantity] = dataclasses.field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain JSON values, each property under its name; unknown values are None."""
        values: dict[str, Any] = plain(self)
        return {**values.pop("properties"), **values}

    def table(self) -> str:
        """Returns a table for a terminal."""
        title, rows, notes = self._parts()
        lines = [f"{name:<22}" + "".join(f"{cell:>12}" for cell in cells) for name, *cells in (_HEADER, *rows)]
        return "\n".join([title, "", *lines, "", *notes]).rstrip()

    def _repr_html_(self) -> str:
        title, rows, notes = self._parts()
        return html_table([*rows, *([note] for note in [*notes, title])], _HEADER)

    def _parts(self) -> tuple[str, list[list[str]], list[str]]:
        """Returns what was evaluated, the rows of the table, and the figures below it."""
        atoms = ", free atoms only" if self.free_atoms_only else ""
        title = f"{self.num_structures} structures, {self.num_atoms} atoms{atoms} ({self.seconds:.1f} s)"
        rows, notes = list[list[str]](), list[str]()
        found = {"energy": self.energy_per_atom, "forces": self.forces, "stress": self.stress, **self.properties}
        for name, quantity in found.items():
            unit, factor = shown_unit(TARGETS[name])
            if quantity is None:
                rows.append([name, "no labels"])
                continue
            rows.append(_row(f"{name} ({unit})", quantity.errors, factor))
            rows.extend(_row(f"  predicting {key}", errors, factor) for key, errors in quantity.baselines.items())
        rows.extend(_row(f"forces of {symbol} (meV/Å)", e, 1e3) for symbol, e in self.forces_by_element.items())
        if self.force_cosine is not None:
            notes.append(f"force cosine {self.force_cosine:.4f}")
        if self.energy_forces_within_threshold is not None:
            notes.append(f"energy and forces within threshold (EFwT) {100 * self.energy_forces_within_threshold:.2f} %")
        if self.rotation_error is not None:
            notes.append(f"rotation error of the direct forces {1e3 * self.rotation_error:.2f} meV/Å RMS")
        return title, rows, notes


def compute_report(
    records: Records, *, free_atoms_only: bool = False, rotation_error: float | None = None, seconds: float = 0.0
) -> EvaluationReport:
    """Turns records into a report; see ``EvaluationReport`` for every definition."""
    errors = {target.name: records.errors(target, free_atoms_only=free_atoms_only) for target in TARGETS.values()}
    found = {name: _quantity(records, TARGETS[name], difference) for name, difference in errors.items()}
    energy, forces = errors["energy"], errors["forces"]
    largest = largest_by_structure(records, forces)
    return EvaluationReport(
        num_structures=len(records.num_atoms),
        num_atoms=len(records.numbers),
        free_atoms_only=free_atoms_only,
        energy=Errors.of(energy),
        energy_per_atom=found.pop("energy"),
        forces=found.pop("forces"),
        force_cosine=_cosine(records, forces),
        stress=found.pop("stress"),
        energy_forces_within_threshold=_within_threshold(energy, largest),
        forces_by_element=_by_element(records, forces),
        rotation_error=rotation_error,
        worst=_worst(records, energy, largest),
        seconds=seconds,
        properties={name: quantity for name, quantity in found.items() if quantity is not None},
    )


def baselines_of(records: Records, target: Target) -> dict[str, FloatArray]:
    """Returns trivial predictions by name, of the shape of the labels: references and mean for energies, else zero."""
    labels = records.labels[target.name]
    if target.name != "energy":
        return {"zero": np.zeros_like(labels)}
    per_atom = labels / records.num_atoms
    mean = float(np.nanmean(per_atom)) if np.isfinite(per_atom).any() else 0.0
    trivial = {"references": records.reference_energy, "mean": np.multiply(mean, records.num_atoms, dtype=np.float64)}
    if not records.reference_energy.any():
        del trivial["references"]
    return trivial


def largest_by_structure(records: Records, difference: FloatArray) -> FloatArray:
    """Returns the ``(S,)`` largest absolute component over the atoms of each structure; NaN where none counts."""
    largest = np.full(len(records.num_atoms), -np.inf)
    per_atom = np.abs(difference).max(axis=1)
    valid = np.isfinite(per_atom)
    np.maximum.at(largest, records.structure[valid], per_atom[valid])
    return np.where(np.isinf(largest), np.nan, largest)


def _quantity(records: Records, target: Target, difference: FloatArray) -> Quantity | None:
    errors = Errors.of(records.per_atom(target, difference))
    if errors is None:
        return None
    trivial = {}
    for name, values in baselines_of(records, target).items():
        shift = values - np.where(np.isnan(difference), np.nan, records.labels[target.name])
        found = Errors.of(records.per_atom(target, shift))
        if found is not None:
            trivial[name] = found
    return Quantity(errors, trivial)


def _cosine(records: Records, difference: FloatArray) -> float | None:
    chosen = np.isfinite(difference).all(axis=1)
    if not chosen.any():
        return None
    label, found = records.labels["forces"][chosen], records.predictions["forces"][chosen]
    lengths = np.linalg.norm(label, axis=1) * np.linalg.norm(found, axis=1)
    return float((np.einsum("ij,ij->i", label, found) / np.maximum(lengths, 1e-24)).mean())


def _within_threshold(energy: FloatArray, largest: FloatArray) -> float | None:
    labelled = np.isfinite(energy) & np.isfinite(largest)
    if not labelled.any():
        return None
    within = (np.abs(energy[labelled]) < ENERGY_THRESHOLD) & (largest[labelled] < FORCE_THRESHOLD)
    return float(within.mean())


def _by_element(records: Records, difference: FloatArray) -> dict[str, Errors]:
    found = {chemical_symbols[z]: Errors.of(difference[records.numbers == z]) for z in np.unique(records.numbers)}
    return {symbol: errors for symbol, errors in found.items() if errors is not None}


def _worst(records: Records, energy: FloatArray, largest: FloatArray) -> tuple[tuple[str, float, float], ...]:
    per_atom = np.abs(energy) / records.num_atoms
    order = np.argsort(-np.nan_to_num(largest if np.isfinite(largest).any() else per_atom), kind="stable")
    return tuple((records.structure_id[i], float(largest[i]), float(per_atom[i])) for i in order[:_NUM_WORST])


def _row(name: str, errors: Errors, factor: float) -> list[str]:
    return [name, *(f"{factor * value:.4g}" for value in (errors.mae, errors.rmse, errors.largest))]
