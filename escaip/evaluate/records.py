"""Labels and predictions side by side, as arrays."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from escaip.types import Prediction

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class Records:
    """``S`` structures with ``M`` atoms in all; a missing label is NaN.

    Attributes:
        structure_id: ``S`` names.
        num_atoms: ``(S,)``.
        energy, predicted_energy, reference_energy: ``(S,)`` eV; the last is the potential's sum of element references.
        numbers: ``(M,)`` atomic numbers.
        fixed: ``(M,)`` bool, constrained atoms.
        structure: ``(M,)`` index of the structure of each atom.
        forces, predicted_forces: ``(M, 3)`` eV/Å.
        stress, predicted_stress: ``(S, 3, 3)`` eV/Å³; predictions NaN where there is no label or no stress.
    """

    structure_id: tuple[str, ...]
    num_atoms: NDArray[np.int64]
    energy: FloatArray
    predicted_energy: FloatArray
    reference_energy: FloatArray
    numbers: NDArray[np.int64]
    fixed: NDArray[np.bool_]
    structure: NDArray[np.int64]
    forces: FloatArray
    predicted_forces: FloatArray
    stress: FloatArray
    predicted_stress: FloatArray


@dataclass
class RecordsBuilder:
    """Collects batches."""

    _parts: list[dict[str, Any]] = field(default_factory=list)
    _names: list[str] = field(default_factory=list)

    def add(self, batch: Any, prediction: Prediction, atomic_references: Any) -> None:
        """Appends a batch, what was predicted for it and the ``(N,)`` reference of each atom; all on the CPU."""
        counts = (batch.ptr[1:] - batch.ptr[:-1]).cpu()
        reference = atomic_references.cpu().numpy()
        index = batch.batch.cpu().numpy()
        stress = batch.stress.cpu().numpy()
        predicted_stress = np.full_like(stress, np.nan)
        if prediction.stress is not None:
            predicted_stress = prediction.stress.detach().cpu().double().numpy()
        forces = batch.forces.cpu().numpy()
        predicted_forces = np.full_like(forces, np.nan)
        if prediction.forces is not None:
            predicted_forces = prediction.forces.detach().cpu().double().numpy()
        self._parts.append({
            "num_atoms": counts.numpy(),
            "energy": batch.energy.cpu().numpy(),
            "predicted_energy": prediction.energy.detach().cpu().double().numpy(),
            "reference_energy": np.bincount(index, weights=reference, minlength=len(counts)),
            "numbers": batch.atomic_numbers.cpu().numpy(),
            "fixed": batch.fixed.cpu().numpy(),
            "structure": index + len(self._names),
            "forces": forces,
            "predicted_forces": predicted_forces,
            "stress": stress,
            "predicted_stress": predicted_stress,
        })  # fmt: skip
        self._names.extend(batch.structure_id)

    def build(self) -> Records:
        """Joins what was collected, at least one batch."""
        joined = {key: np.concatenate([part[key] for part in self._parts]) for key in self._parts[0]}
        return Records(structure_id=tuple(self._names), **joined)
