"""Predictions for any number of structures: packs of them at once, smaller packs where memory runs out."""

from __future__ import annotations

import gc
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from escaip.errors import ConfigError, DataError, UnsupportedElementError, UsageError
from escaip.potential.batching.cost import estimate_tokens, token_budget
from escaip.potential.batching.structures import as_data, check_iterable, join_structures, naming
from escaip.types import GraphSettings, Prediction

if TYPE_CHECKING:
    from escaip.data import AtomicData
    from escaip.potential import Potential

_LOOKAHEAD_PACKS, _LOOKAHEAD_STRUCTURES = 16, 4096
# The last is what oneDNN says where it gets no memory for its code.
_NO_MEMORY = re.compile(
    r"out of memory|not enough memory|can't allocate memory|bad_alloc|ALLOC_FAILED|could not create a primitive$"
)


@dataclass(frozen=True)
class StructurePrediction:
    """What a potential says of one structure of ``n`` atoms; tensors on the CPU that share no memory with others.

    Attributes:
        energy: eV.
        forces: ``(n, 3)`` eV/Å in the potential's dtype, or None when they were not asked for.
        stress: ``(3, 3)`` eV/Å³, positive in tension, in the potential's dtype, or None when not asked for; NaN for a
            structure without periodic axes or without volume.
        atomic_energies: ``(n,)`` float64 eV, references included; their sum is ``energy``.
    """

    energy: float
    forces: Tensor | None
    stress: Tensor | None
    atomic_energies: Tensor


@dataclass(frozen=True)
class _Item:
    index: int
    data: AtomicData
    tokens: int
    cost: int


@dataclass
class _Budget:
    """What a pack may cost; ``failed`` says which pack was too large since the last one that was not."""

    limit: int
    unit: str
    failed: str = ""


def iter_predict(
    potential: Potential,
    structures: Iterable[Any],
    *,
    compute_forces: bool = True,
    compute_stress: bool = False,
    max_atoms: int | None = None,
    progress: bool = False,
) -> Iterator[StructurePrediction]:
    """The results of :meth:`escaip.Potential.predict`, one at a time, for streams of any length.

    Structures are read as results are taken: 16 packs, or 4096 structures, are held at a time.
    Arguments and errors are those of :func:`predict_pairs`.
    """
    pairs = predict_pairs(
        potential, structures, compute_forces=compute_forces, compute_stress=compute_stress, max_atoms=max_atoms,
        progress=progress,
    )  # fmt: skip
    return (prediction for _, prediction in pairs)


def predict_pairs(
    potential: Potential,
    structures: Iterable[Any],
    *,
    compute_forces: bool = True,
    compute_stress: bool = False,
    max_atoms: int | None = None,
    progress: bool = False,
) -> Iterator[tuple[AtomicData, StructurePrediction]]:
    """Structures, in the order given, with what is predicted for each.

    Among the structures at hand those with like neighborhoods are evaluated together, as many as the budget of a pack
    allows (:func:`token_budget`). A pack that does not fit into memory is halved, with a warning, and so are those
    after it. Results do not depend on the packing beyond rounding.

    Args:
        potential: in evaluation mode.
        structures: ASE, :class:`~escaip.data.AtomicData` or pymatgen, in any mixture; labels are not read. Not changed.
        compute_forces: whether forces are wanted.
        compute_stress: whether stress is wanted; conservative models only.
        max_atoms: atoms of a pack, instead of the budget; a larger structure is a pack of its own.
        progress: show a bar.

    Raises:
        UsageError: a single structure, a path, or something that is no structure; a potential in training mode.
        ConfigError: ``max_atoms`` below 1, stress of a direct-force model, or no data set chosen where one is needed.
        UnsupportedElementError: an element that the potential was not trained on; names the structure.
        DataError: a structure that no potential can mean, or that alone does not fit into memory; names it.
    """
    check_iterable(structures)
    if potential.training:
        raise UsageError("the potential is in training mode, with dropout in force: call potential.eval() first")
    if max_atoms is not None and max_atoms < 1:
        raise ConfigError(f"max_atoms is {max_atoms}: it must be at least 1")
    if max_atoms is not None:
        budget = _Budget(max_atoms, "atoms")
    else:
        budget = _Budget(token_budget(potential, compute_forces or compute_stress), "tokens")
    wanted = {"compute_forces": compute_forces, "compute_stress": compute_stress}
    return _stream(potential, structures, budget, wanted, progress)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory, of a GPU or of the machine, did not suffice."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error)) is not None


def _stream(
    potential: Potential, structures: Iterable[Any], budget: _Budget, wanted: dict[str, bool], progress: bool
) -> Iterator[tuple[AtomicData, StructurePrediction]]:
    from tqdm import tqdm

    total = len(structures) if isinstance(structures, Sized) else None
    with tqdm(total=total, unit="structure", dynamic_ncols=True, disable=not progress) as bar:
        for window in _windows(_items(potential.config.graph, structures, budget), budget):
            found: dict[int, StructurePrediction] = {}
            # Some attention backends pad to the longest neighborhood of a pack.
            queue = sorted(window, key=lambda item: (-item.tokens / item.data.num_nodes, -item.cost))
            start = 0
            while start < len(queue):
                pack = _fill(queue, start, budget.limit)
                predictions = _evaluate(potential, pack, wanted)
                if isinstance(predictions, str):
                    _shrink(budget, pack, potential, predictions)
                    continue
                _warn_of_less(budget)
                found.update(zip((item.index for item in pack), predictions, strict=True))
                start += len(pack)
                bar.update(len(pack))
            for item in window:
                yield item.data, found.pop(item.index)


def _items(settings: GraphSettings, structures: Iterable[Any], budget: _Budget) -> Iterator[_Item]:
    for index, structure in enumerate(structures):
        data = as_data(structure, index)
        tokens = estimate_tokens(data, settings)
        yield _Item(index, data, tokens, tokens if budget.unit == "tokens" else int(data.num_nodes))


def _windows(items: Iterator[_Item], budget: _Budget) -> Iterator[list[_Item]]:
    """Structures that are sorted together: enough to fill some packs, few enough to be held."""
    window: list[_Item] = []
    total = 0
    for item in items:
        window.append(item)
        total += item.cost
        if total >= _LOOKAHEAD_PACKS * budget.limit or len(window) >= _LOOKAHEAD_STRUCTURES:
            yield window
            window, total = [], 0
    if window:
        yield window


def _fill(queue: Sequence[_Item], start: int, limit: int) -> list[_Item]:
    """The next structures within the limit, at least one."""
    pack = [queue[start]]
    total = queue[start].cost
    for item in islice(queue, start + 1, None):
        total += item.cost
        if total > limit:
            break
        pack.append(item)
    return pack


def _evaluate(potential: Potential, pack: list[_Item], wanted: dict[str, bool]) -> list[StructurePrediction] | str:
    """Predictions for a pack, or what was said where memory did not suffice.

    Raises:
        DataError, UnsupportedElementError: a structure cannot be used; the message names it.
    """
    try:
        return _attempt(potential, pack, wanted)
    except (DataError, UnsupportedElementError) as error:
        if len(pack) == 1:
            raise naming(error, pack[0].index, str(pack[0].data.structure_id)) from error
        for item in sorted(pack, key=lambda item: item.index):
            _evaluate(potential, [item], wanted)
        raise


@torch.inference_mode(False)  # in which autograd records nothing, and so knows no forces
def _attempt(potential: Potential, pack: list[_Item], wanted: dict[str, bool]) -> list[StructurePrediction] | str:
    with torch.enable_grad():
        oldest = torch.zeros(1, requires_grad=True).clone()
    try:
        batch = join_structures([item.data for item in pack]).to(potential.device)
        with torch.no_grad():
            prediction = potential(batch, create_graph=False, **wanted)
        return _divide(prediction, [int(item.data.num_nodes) for item in pack])
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        # A text only: the exception goes with its traceback, and with that the tensors of every frame below.
        reason = str(error).split("\n")[0].split(". ")[0] or type(error).__name__
    # After a failure autograd keeps what it had still to do, and with it the graph, in a queue of this thread (PyTorch
    # issue 82218). It throws that away on its way to anything that was recorded earlier.
    oldest.backward()
    return reason


def _divide(prediction: Prediction, counts: list[int]) -> list[StructurePrediction]:
    energies = prediction.energy.tolist()
    nothing = [None] * len(counts)
    forces = nothing if prediction.forces is None else _pieces(prediction.forces, counts)
    stresses = nothing if prediction.stress is None else [x.squeeze(0) for x in _pieces(prediction.stress, 1)]
    rows = zip(energies, forces, stresses, _pieces(prediction.atomic_energies, counts), strict=True)
    return [StructurePrediction(*row) for row in rows]


def _pieces(values: Tensor, sizes: list[int] | int) -> list[Any]:
    return [piece.clone() for piece in values.detach().cpu().split(sizes)]


def _shrink(budget: _Budget, pack: list[_Item], potential: Potential, reason: str) -> None:
    """Halves the budget after a pack that did not fit, and gives back what it left.

    Raises:
        DataError: the pack is a single structure.
    """
    device = potential.device
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    if len(pack) == 1:
        from ase.symbols import Symbols

        data = pack[0].data
        formula = Symbols(data.atomic_numbers.cpu().numpy()).get_chemical_formula()
        remedies = ["device='cpu'"] if device.type == "cuda" else []
        remedies += ["dtype='float32'"] if potential.dtype == torch.float64 else []
        remedies += ["a smaller structure", "a smaller model or a machine with more memory"]
        raise DataError(
            f"structure {pack[0].index} ({formula}, {data.num_nodes} atoms) does not fit into the memory of {device} "
            f"even alone ({reason}): use {', '.join(remedies)}"
        )
    cost = sum(item.cost for item in pack)
    budget.limit = max(1, cost // 2)
    budget.failed = budget.failed or f"{len(pack)} structures ({cost} {budget.unit}) on {device}"


def _warn_of_less(budget: _Budget) -> None:
    if budget.failed:
        message = f"out of memory with {budget.failed}: from here on at most {budget.limit} {budget.unit} at once"
        warnings.warn(message, stacklevel=1)
        budget.failed = ""
