"""Structures with predictions instead of their labels."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from ase import Atoms

from escaip.data import AtomicData
from escaip.potential import Potential
from escaip.potential.potential import origin_of
from escaip.potential.predict import StructurePrediction, predict_pairs
from escaip.types import TARGETS


def predict_frames(
    potentials: Sequence[Potential], structures: Iterable[AtomicData], **options: Any
) -> Iterator[Atoms]:
    """Yields each structure with every predicted target in the place of its labels, in order and in bounded memory.

    Of a committee these are means over the members, beside ``info["energy_spread"]``, eV, and
    ``arrays["forces_spread"]``, ``(n,)`` eV/Å, as ``CommitteeCalculator`` defines them. ``info`` names the origin
    (``escaip.potential.potential.origin_of``).

    Args:
        potentials: one, or the members of a committee.
        structures: their labels are not read.
        options: of ``escaip.potential.predict.predict_pairs``, which also names the errors.
    """
    compute_stress = all(potential.config.is_conservative for potential in potentials)
    progress = options.pop("progress", False)
    streams = [
        predict_pairs(potential, copy, compute_stress=compute_stress, progress=progress and not member, **options)
        for member, (potential, copy) in enumerate(
            zip(potentials, itertools.tee(structures, len(potentials)), strict=True)
        )
    ]
    origin = origin_of(potentials)
    for pairs in zip(*streams, strict=True):
        atoms = _frame(pairs[0][0], [found for _, found in pairs])
        atoms.info.update(origin)
        yield atoms


def _frame(structure: AtomicData, found: Sequence[StructurePrediction]) -> Atoms:
    fields = dict(structure._store)
    for name, target in TARGETS.items():
        shape = (structure.num_nodes if target.per_atom else 1, *target.shape)
        values = [one.of_target(name) for one in found]
        known = [torch.as_tensor(value, dtype=torch.float64).reshape(shape) for value in values if value is not None]
        fields[name] = torch.stack(known).mean(0) if len(known) == len(found) else torch.full(shape, torch.nan)
    atoms = AtomicData.from_fields(fields).to_ase()
    if len(found) > 1:
        forces = torch.stack([torch.as_tensor(one.forces, dtype=torch.float64) for one in found])
        energies = torch.tensor([one.energy for one in found], dtype=torch.float64)
        atoms.info["energy_spread"] = float(energies.std(correction=0))
        atoms.arrays["forces_spread"] = forces.var(0, correction=0).sum(1).sqrt().numpy()
    return atoms
