"""Element references that follow the model: shifted after each epoch by a fit to the remaining energy errors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from escaip.data import AtomicData
from escaip.models import MAX_ATOMIC_NUMBER
from escaip.potential import Potential
from escaip.train.losses import LossTerm, labelled, size_factors
from escaip.types import TARGETS, Prediction, StructureBatch

_LEAST_ERROR = 1e-3  # eV/atom below which absolute errors weigh no more
_LEAST_VARIANCE = 1e-9  # of the best determined direction: below it compositions say nothing
_RIDGE, _ROUNDS = 1.0, 10  # of ``fit_shifts``; the ridge in structures of one element alone


def fit_shifts(fractions: Tensor, errors: Tensor, term: LossTerm) -> Tensor:
    """Returns ``(K,)`` eV per element that take errors of the energies from some structures.

    An energy per atom for all elements and, with a ridge, what those of an element need besides; reweighted least
    squares for the loss.

    Args:
        fractions: ``(n, K)`` float64, of the elements in each structure.
        errors: ``(n,)`` eV/atom, label less prediction.
        term: the loss on the energy.
    """
    x = torch.cat([torch.ones_like(fractions[:, :1]), fractions], 1)
    solution = x.new_zeros(x.shape[1])
    for _ in range(_ROUNDS):
        weighted = x.T * _weights(errors - x @ solution, term)
        ridge = torch.full_like(solution, _RIDGE * float(weighted[0].mean()))
        ridge[0] = 0.0
        solution = torch.linalg.solve(weighted @ x + ridge.diag(), weighted @ errors)
    return solution[0] + solution[1:]


def remaining_shifts(potential: Potential, structures: Iterable[AtomicData], term: LossTerm) -> Tensor:
    """Returns ``(119,)`` eV that the energies of structures of one set still need, by ``fit_shifts``.

    Forces are predicted as well: without them a compiled potential would compile once more.
    """
    known, elements = [one for one in structures if one.has_label("energy")], list(potential.metadata.elements)
    shifts = torch.zeros(MAX_ATOMIC_NUMBER + 1, dtype=torch.float64)
    with torch.inference_mode(False):
        found = potential.predict(known)
    if known:
        numbers = torch.stack([one.atomic_numbers.bincount(minlength=len(shifts)) for one in known]).double()
        sizes = numbers.sum(1)
        errors = torch.cat([one.energy.double() - each.energy for one, each in zip(known, found, strict=True)])
        shifts[elements] = fit_shifts((numbers / sizes[:, None])[:, elements], errors / sizes, term)
    return shifts.to(potential.device)


def _weights(error: Tensor, term: LossTerm) -> Tensor:
    if term.kind == "mse":
        return torch.ones_like(error)
    return error.abs().clamp_min(term.delta if term.kind == "huber" else _LEAST_ERROR).reciprocal()


class ReferenceFit:
    """Weighted least squares in the composition for the errors of the energies, gathered over an epoch.

    The references at the start of a training are fitted as if atoms did not interact. The mean effect of interactions
    on an element's energy is left to the model, and the loss hardly sees it where compositions differ little: one In
    too many among 64 atoms of InP moves the energy per atom by a sixty-fourth of it. That part is linear in the
    composition, so it is solved for here. Each epoch is one step of iteratively reweighted least squares for the loss
    on the energy: weights are 1 for ``mse``, ``1 / max(|error|, delta)`` for ``huber`` and ``1 / |error|`` for ``mae``
    and ``l2``.

    Args:
        elements: atomic numbers, ``K`` of them.
        fitted: for each of ``S`` sets whether its references were fitted; those of isolated atoms stay.
        term: the loss on the energy.

    Attributes:
        sums: ``(S, K, K + 1)`` float64, of ``w x xᵀ`` and ``w x e`` with ``x`` the fractions of the elements in a
            structure and ``e`` its error, label less prediction, in eV/atom, both times what ``term.per`` asks for.
    """

    def __init__(self, elements: Sequence[int], fitted: Sequence[bool], term: LossTerm) -> None:
        self.elements, self.fitted, self._term = tuple(elements), tuple(fitted), term
        count = len(self.elements)
        self.sums = torch.zeros(len(self.fitted), count, count + 1, dtype=torch.float64)
        self._place = torch.zeros(MAX_ATOMIC_NUMBER + 1, dtype=torch.long)
        self._place[list(self.elements)] = torch.arange(count)

    def of_batch(self, prediction: Prediction, batch: StructureBatch) -> Tensor:
        """Returns the addition of a batch to ``sums``, flat, so that it can be summed over processes."""
        sizes, count = batch.ptr[1:] - batch.ptr[:-1], len(self.elements)
        self._place = self._place.to(batch.ptr.device)
        place = batch.batch * count + self._place[batch.atomic_numbers]
        numbers = torch.zeros(len(sizes) * count, dtype=torch.float64, device=sizes.device)
        numbers = numbers.index_add(0, place, torch.ones_like(place, dtype=torch.float64)).view(-1, count)
        error = (batch.energy - prediction.energy.detach()).double() / sizes
        chosen = labelled(batch, TARGETS["energy"])
        sets = batch.dataset if len(self.fitted) > 1 else torch.zeros_like(sizes)
        found = []
        for index in range(len(self.fitted)):
            own = chosen & (sets == index)
            factor = size_factors(batch, self._term)[own]
            x, e = (factor / sizes[own])[:, None] * numbers[own], factor * error[own]
            found.append((x * _weights(e, self._term)[:, None]).T @ torch.cat([x, e[:, None]], 1))
        return torch.stack(found).flatten()

    def add(self, sums: Tensor, batches: float = 1.0) -> None:
        """Adds the result of ``of_batch``."""
        self.sums = self.sums.to(sums.device) + sums.view_as(self.sums)

    def is_due(self, step: int, steps: int, last_batch: bool) -> bool:
        """Whether references are shifted before this step: after each epoch."""
        return last_batch

    def apply(self, potential: Potential) -> None:
        """Shifts the references of a potential."""
        potential.element_shifts = potential.element_shifts + self.solve().view_as(potential.element_shifts)

    def solve(self) -> Tensor:
        """Returns the ``(S, 119)`` eV to be added to the references, and forgets the sums.

        Where compositions do not determine them, the solution of least norm is taken.
        """
        shifts = torch.zeros(len(self.fitted), MAX_ATOMIC_NUMBER + 1, dtype=torch.float64, device=self.sums.device)
        for index, fitted in enumerate(self.fitted):
            if fitted:
                inverse = torch.linalg.pinv(self.sums[index, :, :-1], rtol=_LEAST_VARIANCE, hermitian=True)
                shifts[index, list(self.elements)] = inverse @ self.sums[index, :, -1]
        self.sums = torch.zeros_like(self.sums)
        return shifts
