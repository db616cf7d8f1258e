"""Atomic energies, energies of charges and scale of training sets: one set of each, or one for each data set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from escaip.data import AtomicData, Statistics
from escaip.data.dataset import evenly
from escaip.errors import ConfigError, DataError, UnsupportedElementError
from escaip.models import MAX_ATOMIC_NUMBER
from escaip.types import MAX_CHARGE, StructureBatch

_LEAST_SCALE = 1e-5  # of the best determined direction: below it compositions and charges say nothing


def references_of(
    sets: Mapping[str, Statistics], shares: Mapping[str, float] | None, scale: str
) -> tuple[Tensor, Tensor]:
    """Returns element references and scales of ``S`` data sets.

    Args:
        sets: statistics by name.
        shares: of each set in training, for the shared scale; default by structures.
        scale: ``"shared"``, the force RMS of the mixture, or ``"per_set"``.

    Returns:
        References ``(S, 119)`` eV, NaN for elements that a set does not have, and scales ``(S,)`` eV, both float64.

    Raises:
        ConfigError: the force RMS of a set is not a positive number, or an unknown ``scale``.
        DataError: a set without energies.
    """
    if not all(statistics.element_references for statistics in sets.values()):
        raise DataError("no structure has an energy, so element references cannot be fitted; check keys")
    if scale not in ("shared", "per_set"):
        raise ConfigError(f"scale: {scale!r} is not shared or per_set")
    references = torch.full((len(sets), MAX_ATOMIC_NUMBER + 1), torch.nan, dtype=torch.float64)
    for row, statistics in zip(references, sets.values(), strict=True):
        for number, energy in statistics.element_references.items():
            row[int(number)] = energy
    scales = torch.tensor([_force_scale(statistics) for statistics in sets.values()], dtype=torch.float64)
    with_forces = torch.tensor([bool(item.label_counts.get("forces", 0)) for item in sets.values()])
    if scale == "shared" and len(sets) > 1 and bool(with_forces.any()):
        sizes = {name: float(statistics.num_structures) for name, statistics in sets.items()}
        weights = torch.tensor([(shares or sizes)[name] for name in sets], dtype=torch.float64)[with_forces]
        mean = (weights * scales[with_forces] ** 2).sum() / weights.sum()
        scales = scales.new_full(scales.shape, float(mean.sqrt()))
    return references, scales


def _force_scale(statistics: Statistics) -> float:
    """Returns the force RMS of a data set, 1 for a set without forces."""
    if not statistics.label_counts.get("forces", 0):
        return 1.0
    if not statistics.force_rms > 0:
        raise ConfigError(f"the training set's force RMS is {statistics.force_rms}: all its forces are zero")
    return float(statistics.force_rms)


class Composition(NamedTuple):
    """A labelled structure as the fits below see it.

    Attributes:
        numbers: ``(119,)`` float64, atoms of each element.
        charge: total charge.
        energy: eV.
    """

    numbers: Tensor
    charge: int
    energy: float

    @classmethod
    def of(cls, data: AtomicData, charge: bool = True) -> Composition:
        """Reads a structure, without ``charge`` as a neutral one.

        Raises:
            DataError: a charge beyond ±20; names the structure.
        """
        if charge:
            check_charges(data.charge, [data.structure_id])
        numbers = torch.bincount(data.atomic_numbers, minlength=MAX_ATOMIC_NUMBER + 1).double()
        return cls(numbers, int(data.charge) if charge else 0, float(data.energy))


def fit_compositions(
    rows: Sequence[Composition], references: Tensor, energies: Tensor, elements: Sequence[int], charges: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Least squares for the errors per atom that element references and energies of charges leave.

    Args:
        rows: labelled structures.
        references: ``(119,)`` eV; NaN for elements that no row has.
        energies: ``(41,)`` eV by total charge from −20 on.
        elements: whose references change.
        charges: whose energies change.

    Returns:
        The changes of both, zero elsewhere; where the rows do not determine them, those of least norm.
    """
    changes = torch.zeros_like(references), torch.zeros_like(energies)
    if not rows:
        return changes
    numbers, charge = torch.stack([row.numbers for row in rows]), torch.tensor([row.charge for row in rows])
    labels = torch.tensor([row.energy for row in rows], dtype=torch.float64)
    left = labels - numbers @ references.nan_to_num(0.0) - energies[charge + MAX_CHARGE]
    x = torch.cat([numbers[:, list(elements)], (charge[:, None] == torch.tensor(charges)).double()], 1)
    x, y = (values / numbers.sum(1, keepdim=True) for values in (x, left[:, None]))
    solution = torch.linalg.lstsq(x, y, driver="gelsd", rcond=_LEAST_SCALE).solution[:, 0]
    changes[0][list(elements)] = solution[: len(elements)]
    changes[1][[charge + MAX_CHARGE for charge in charges]] = solution[len(elements) :]
    return changes


def fit_charges(
    references: Tensor, structures: Sequence[AtomicData], fitted: Sequence[bool], max_structures: int = 10_000
) -> tuple[Tensor, Tensor]:
    """Fits energies of total charges together with the element references of ``S`` sets.

    Energies of ions differ from those of neutral molecules by several eV that no composition explains, and a fit in the
    composition alone spreads them over the elements. Least squares per atom in the composition and in each charge but
    0; where they do not determine the solution, the change of least norm.

    Args:
        references: ``(119,)`` or ``(S, 119)`` eV, fitted in the composition alone or energies of isolated atoms.
        structures: the training set; their ``dataset`` says which of several sets they belong to.
        fitted: for each set whether its references were fitted; those of isolated atoms stay, and the part of the
            energies that the composition explains is left to the model.
        max_structures: of a larger set so many are read, evenly spread.

    Returns:
        References, and energies ``(41,)`` or ``(S, 41)`` eV by charge from −20 on, 0 for charges not read; float64.

    Raises:
        DataError: a charge beyond ±20; names the structure.
    """
    references = references.clone()
    energies = references.new_zeros(*references.shape[:-1], 2 * MAX_CHARGE + 1)
    rows: dict[int, list[Composition]] = {}
    for data in evenly(structures, max_structures):
        row = Composition.of(data)
        if data.has_label("energy"):
            rows.setdefault(int(data.dataset) if len(fitted) > 1 else 0, []).append(row)
    for code, found in rows.items():
        own, table = (values.view(-1, values.shape[-1])[code] for values in (references, energies))
        elements = torch.stack([row.numbers for row in found]).any(0).nonzero()[:, 0].tolist()
        charges = sorted({row.charge for row in found} - {0})
        if charges:
            change, added = fit_compositions(found, own, table, elements, charges)
            table += added
            if fitted[code]:
                own += change
    return references, energies


def check_charges(charges: Tensor, names: Sequence[str], is_known: bool = True) -> None:
    """Raises DataError for the first of the ``(B,)`` total charges of named structures that a model cannot take.

    These are charges beyond ±20, and any but 0 for a model that does not know the charge (``is_known``).
    """
    over = charges.abs() > (MAX_CHARGE if is_known else 0)
    if bool(over.any()):
        first = int(over.nonzero()[0])
        if not is_known:
            raise DataError(
                f"total charge of {names[first]} is {int(charges[first])}, which this model does not know: use one "
                "trained with model.architecture.charge true, or leave the structure out"
            )
        raise DataError(
            f"total charge outside [-{MAX_CHARGE}, {MAX_CHARGE}]: {names[first]} has {int(charges[first])}, "
            "so correct it or leave the structure out"
        )


def dataset_codes(batch: StructureBatch, chosen: int, names: Sequence[str]) -> Tensor:
    """Returns the data set of each structure, ``(B,)`` int64.

    Args:
        batch: may state sets; −1 where it does not.
        chosen: the set of the others, or −1.
        names: of the sets.

    Raises:
        ConfigError: a structure has no set.
    """
    stated = getattr(batch, "dataset", None)
    stated = batch.ptr.new_full((batch.ptr.numel() - 1,), -1) if stated is None else stated
    codes = torch.where(stated < 0, chosen, stated)
    if bool(((codes < 0) | (codes >= len(names))).any()):
        raise ConfigError(
            f"the potential has references for each of {', '.join(names)}: say whose energies are meant "
            "(dataset=NAME of load_potential and EScAIPCalculator, --dataset NAME on the command line)"
        )
    return codes


def missing_reference(
    references: Tensor, batch: StructureBatch, codes: Tensor, names: Sequence[str]
) -> UnsupportedElementError:
    """The error for the first of the ``(N,)`` references that is NaN."""
    from ase.data import chemical_symbols

    first = int(torch.isnan(references).nonzero()[0])
    symbol, name = chemical_symbols[int(batch.atomic_numbers[first])], names[int(codes[batch.batch[first]])]
    return UnsupportedElementError(
        f"the set {name} had no {symbol}, so there is no reference energy for it: use another set's references"
    )


def check_elements(atomic_numbers: Tensor, supported: Tensor, elements: Sequence[int]) -> None:
    """Raises UnsupportedElementError for atoms that a potential was not trained on.

    Args:
        atomic_numbers: ``(N,)``.
        supported: ``(119,)`` bool by atomic number.
        elements: the same as numbers, for the message.
    """
    known = supported[atomic_numbers]
    if not bool(known.all()):
        from ase.data import chemical_symbols

        unseen = sorted(set(atomic_numbers[~known].tolist()))
        names = ", ".join(chemical_symbols[z] for z in unseen)
        seen = " ".join(chemical_symbols[z] for z in elements)
        raise UnsupportedElementError(
            f"the potential was not trained on {names}: use structures of {seen}, or train on data with {names}"
        )
