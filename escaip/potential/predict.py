"""Predictions for any number of structures: packed by size, in smaller packs where memory runs out.

Structures are read as results are taken, so that a stream may be of any length. A window of structures is sorted by the
size of their neighborhoods, filled into packs that fit a budget, and handed out in the order in which it was read.
"""

from __future__ import annotations

import gc
import math
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from escaip.data import AtomicData, collate
from escaip.data.structure import EDGE_FIELDS
from escaip.data.validation import complete_cell
from escaip.errors import ConfigError, DataError, UnsupportedElementError, UsageError
from escaip.files import first_line
from escaip.models import Model, ModelConfig
from escaip.potential.derivatives import plan_chunks
from escaip.types import TARGETS, GraphSettings, Prediction

CPU_TOKENS = 4096
"""Tokens of a pack on a CPU: larger packs are not faster (docs/howto/evaluate.md)."""

_MEMORY_SHARE = 0.5  # of the free memory; the estimate ignores fragmentation and the attention backend
_SAMPLED_ATOMS = 32
_LOOKAHEAD_PACKS, _LOOKAHEAD_STRUCTURES = 16, 4096
# oneDNN reports a failed allocation as "could not create a primitive".
_NO_MEMORY = re.compile(
    r"out of memory|not enough memory|can't allocate memory|bad_alloc|ALLOC_FAILED|could not create a primitive$"
)


class PotentialLike(Protocol):
    """The interface of a ``Potential`` that predictions and second derivatives need."""

    config: ModelConfig
    model: Model
    precision: str
    training: bool

    @property
    def device(self) -> torch.device:
        """Device of the model."""

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the weights."""

    def __call__(self, batch: Any, **options: bool) -> Prediction:
        """Evaluates a ``StructureBatch``."""

    def to(self, dtype: torch.dtype, /) -> Any:
        """Casts the weights in place."""

    def train(self, mode: bool) -> Any:
        """Switches between training and evaluation."""


@dataclass(frozen=True)
class StructurePrediction:
    """The prediction for one structure of ``n`` atoms: tensors on the CPU that share no memory with others.

    Attributes:
        energy: eV.
        forces: ``(n, 3)`` eV/Å in the potential's dtype, or None when they were not asked for.
        stress: ``(3, 3)`` eV/Å³, positive in tension, in the potential's dtype, or None when not asked for; NaN for a
            structure without periodic axes or without volume.
        atomic_energies: ``(n,)`` float64 eV, references included; their sum is ``energy``.
        properties: values of the model's further heads by the name of their target, ``(n, *shape)`` or ``shape``.
    """

    energy: float
    forces: Tensor | None
    stress: Tensor | None
    atomic_energies: Tensor
    properties: dict[str, Tensor] = field(default_factory=dict)

    def of_target(self, name: str) -> Tensor | float | None:
        """Returns the values of a target, or None where they are missing."""
        found: Tensor | float | None = self.properties.get(name, getattr(self, name, None))
        return found


@dataclass(frozen=True)
class _Item:
    index: int
    data: AtomicData
    tokens: int
    cost: int


@dataclass
class _Budget:
    """The largest cost of a pack, in ``unit``; ``failed`` describes the pack that ran out of memory last."""

    limit: int
    unit: str
    failed: str = ""


def iter_predict(potential: PotentialLike, structures: Iterable[Any], **options: Any) -> Iterator[StructurePrediction]:
    """Yields the results of ``escaip.Potential.predict`` one at a time, for streams of any length.

    At most 16 packs, or 4096 structures, are held at a time. Options and errors are those of ``predict_pairs``.
    """
    return (prediction for _, prediction in predict_pairs(potential, structures, **options))


def predict_pairs(
    potential: PotentialLike,
    structures: Iterable[Any],
    *,
    compute_forces: bool = True,
    compute_stress: bool = False,
    max_atoms: int | None = None,
    progress: bool = False,
    first: int = 0,
) -> Iterator[tuple[AtomicData, StructurePrediction]]:
    """Yields each structure with its prediction, in the order given.

    Structures with neighborhoods of similar size are evaluated together, as many as ``token_budget`` allows. A pack
    that does not fit into memory is halved, with a warning, and so are the packs after it. Results do not depend on the
    packing beyond rounding.

    Args:
        potential: in evaluation mode.
        structures: ASE atoms, ``AtomicData`` or pymatgen structures, in any mixture. Labels are not
            read.
        compute_forces: whether to compute forces.
        compute_stress: whether to compute stress; conservative models only.
        max_atoms: atoms in a pack, instead of the budget; a larger structure is a pack of its own.
        progress: whether to show a progress bar.
        first: index of the first structure, for messages and the bar.

    Raises:
        UsageError: a single structure, a path, or an object that is no structure; a potential in training mode.
        ConfigError: ``max_atoms`` below 1, stress of a direct-force model, or no data set chosen where one is needed.
        UnsupportedElementError: an element that the potential was not trained on; names the structure.
        DataError: an invalid structure, or one that does not fit into memory on its own; names it.
    """
    _check_series(structures)
    if potential.training:
        raise UsageError("the potential is in training mode, with dropout in force: call potential.eval() first")
    if max_atoms is not None and max_atoms < 1:
        raise ConfigError(f"max_atoms is {max_atoms}: it must be at least 1")
    if max_atoms is not None:
        budget = _Budget(max_atoms, "atoms")
    else:
        budget = _Budget(token_budget(potential, compute_forces or compute_stress), "tokens")
    wanted = {"compute_forces": compute_forces, "compute_stress": compute_stress}
    return _stream(potential, structures, budget, wanted, progress, first)


def token_budget(potential: PotentialLike, derivatives: bool = True) -> int:
    """Returns the number of tokens in a pack, from the device and half of its free memory.

    On a CPU it is at most ``CPU_TOKENS``. On CUDA it stays below the size from which the potential would recompute
    activations (``escaip.potential.derivatives.plan_chunks``).

    Args:
        potential: on the device and in the dtype of the evaluation.
        derivatives: whether forces or stress are computed.
    """
    config, device = potential.config, potential.device
    limit = 2**31 if device.type == "cuda" else CPU_TOKENS
    free = _free_bytes(device)
    if free is not None:
        each = config.used_per_token(derivatives and config.is_conservative) * potential.dtype.itemsize
        limit = min(limit, int(_MEMORY_SHARE * free / each))
    while device.type == "cuda" and limit > 1 and plan_chunks(config, limit, device)[1]:
        limit -= max(1, limit // 16)
    return max(1, limit)


def estimate_tokens(data: AtomicData, settings: GraphSettings) -> int:
    """Estimates the number of tokens of a structure: its atoms and their neighbors, at most ``k`` of each.

    Neighbors are counted for a sample of the atoms, in a box with the volume of the cutoff sphere and the shape of the
    cell; in cells smaller than that box they follow from the density.
    """
    positions, cell = (x.detach().cpu().double().numpy() for x in (data.positions, data.cell[0]))
    pbc = data.pbc[0].cpu().numpy()
    n = len(positions)
    if n == 0 or not (np.isfinite(positions).all() and np.isfinite(cell).all()):
        return n  # the evaluation reports the error
    full = complete_cell(cell, pbc)
    volume = abs(np.linalg.det(full))
    if not volume > 0:
        return n
    inverse = np.linalg.inv(full)
    heights = 1.0 / np.linalg.norm(inverse, axis=0)  # Å between lattice planes
    side = settings.cutoff * (4.0 * math.pi / 3.0) ** (1.0 / 3.0)
    fractional = positions @ inverse
    delta = fractional[None] - fractional[:: -(-n // _SAMPLED_ATOMS), None]
    delta = np.where(pbc, delta - np.round(delta), delta)
    count = (np.abs(delta) * heights <= 0.5 * side).all(axis=2).sum(axis=1)
    images = np.where(pbc, np.maximum(side / heights, 1.0), 1.0).prod()
    neighbors = count * images * heights.prod() / volume - 1.0
    most = float("inf") if pbc.any() else n - 1.0
    if settings.num_neighbors is not None:
        most = min(most, settings.num_neighbors)
    return n + math.ceil(n * float(np.clip(neighbors, 0.0, most).mean()))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception reports that the memory of a GPU or of the machine is exhausted."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error)) is not None


def as_data(structure: Any, index: int) -> AtomicData:
    """Converts a structure of any supported kind, without its labels.

    Args:
        structure: ASE atoms, ``AtomicData`` or a pymatgen structure or molecule.
        index: of the structure, for messages.

    Raises:
        DataError: an invalid structure.
        UsageError: an object that is no structure.
    """
    from ase import Atoms

    if isinstance(structure, AtomicData):
        if not structure.num_nodes:
            raise DataError(f"structure {index}: has no atoms: leave it out")
        return structure
    try:
        if isinstance(structure, Atoms):
            # Calculator and constraints would be read as labels.
            bare = Atoms(structure.numbers, structure.positions, cell=structure.cell, pbc=structure.pbc)
            bare.info = structure.info
            return AtomicData.from_ase(bare)
        if _is_pymatgen(structure):
            from escaip.data.readers.pymatgen import from_pymatgen

            return from_pymatgen(structure, labels=dict.fromkeys(("energy", "forces", "stress")))
    except DataError as error:
        raise _named(error, index) from error
    raise UsageError(
        f"structure {index} is a {type(structure).__name__}: predict takes ase.Atoms, AtomicData or pymatgen structures"
    )


def join_structures(structures: Sequence[AtomicData]) -> Any:
    """Collates structures; neighbor lists that only some of them carry are left out."""
    attached = ["edge_index" in data._store for data in structures]
    if any(attached) and not all(attached):
        structures = [
            AtomicData.from_fields({key: value for key, value in data._store.items() if key not in EDGE_FIELDS})
            for data in structures
        ]
    return collate(structures)


def _stream(
    potential: PotentialLike,
    structures: Iterable[Any],
    budget: _Budget,
    wanted: dict[str, bool],
    progress: bool,
    first: int,
) -> Iterator[tuple[AtomicData, StructurePrediction]]:
    from tqdm import tqdm

    total = first + len(structures) if isinstance(structures, Sized) else None
    with tqdm(total=total, initial=first, unit="structure", dynamic_ncols=True, disable=not progress) as bar:
        for window in _windows(_items(potential.config.graph, structures, budget, first), budget):
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
                if budget.failed:
                    remedy = f"from here on at most {budget.limit} {budget.unit} at once"
                    warnings.warn(f"out of memory with {budget.failed}: {remedy}", stacklevel=1)
                    budget.failed = ""
                found.update(zip((item.index for item in pack), predictions, strict=True))
                start += len(pack)
                bar.update(len(pack))
            for item in window:
                yield item.data, found.pop(item.index)


def _items(settings: GraphSettings, structures: Iterable[Any], budget: _Budget, first: int) -> Iterator[_Item]:
    for index, structure in enumerate(structures, first):
        data = as_data(structure, index)
        tokens = estimate_tokens(data, settings)
        yield _Item(index, data, tokens, tokens if budget.unit == "tokens" else int(data.num_nodes))


def _windows(items: Iterator[_Item], budget: _Budget) -> Iterator[list[_Item]]:
    """Groups structures that are sorted together: enough to fill some packs, few enough to be held."""
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
    """Takes the next structures within the limit, at least one."""
    pack = [queue[start]]
    total = queue[start].cost
    for item in islice(queue, start + 1, None):
        total += item.cost
        if total > limit:
            break
        pack.append(item)
    return pack


def _evaluate(potential: PotentialLike, pack: list[_Item], wanted: dict[str, bool]) -> list[StructurePrediction] | str:
    """Returns predictions for a pack, or the message of the allocator where memory ran out.

    Raises:
        DataError, UnsupportedElementError: a structure cannot be used; the message names it.
    """
    try:
        return _attempt(potential, pack, wanted)
    except (DataError, UnsupportedElementError) as error:
        if len(pack) == 1:
            raise _named(error, pack[0].index, str(pack[0].data.structure_id)) from error
        for item in sorted(pack, key=lambda item: item.index):
            _evaluate(potential, [item], wanted)
        raise


@torch.inference_mode(False)  # autograd records nothing in inference mode, and forces need it
def _attempt(potential: PotentialLike, pack: list[_Item], wanted: dict[str, bool]) -> list[StructurePrediction] | str:
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
        # Keep the text only: the exception's traceback refers to the tensors of every frame below.
        reason = first_line(error).split(". ")[0]
    # After a failed backward pass, autograd keeps unfinished tasks, and with them the graph, in a queue of this thread
    # (PyTorch issue 82218). Running backward from an older node discards them.
    oldest.backward()
    return reason


def _divide(prediction: Prediction, counts: list[int]) -> list[StructurePrediction]:
    missing = [None] * len(counts)
    forces = missing if prediction.forces is None else _pieces(prediction.forces, counts)
    stresses = missing if prediction.stress is None else [x.squeeze(0) for x in _pieces(prediction.stress, 1)]
    properties: list[dict[str, Tensor]] = [{} for _ in counts]
    for name, values in prediction.properties.items():
        pieces = _pieces(values, counts) if TARGETS[name].per_atom else [x.squeeze(0) for x in _pieces(values, 1)]
        for found, piece in zip(properties, pieces, strict=True):
            found[name] = piece
    energies, atomic = prediction.energy.tolist(), _pieces(prediction.atomic_energies, counts)
    return [StructurePrediction(*row) for row in zip(energies, forces, stresses, atomic, properties, strict=True)]


def _pieces(values: Tensor, sizes: list[int] | int) -> list[Any]:
    return [piece.clone() for piece in values.detach().cpu().split(sizes)]


def _shrink(budget: _Budget, pack: list[_Item], potential: PotentialLike, reason: str) -> None:
    """Halves the budget after a pack that did not fit, and releases the memory that the pack left.

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


def _free_bytes(device: torch.device) -> int | None:
    """Returns the memory available to an evaluation; None where the system does not report it."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    if device.type == "cpu" and os.path.exists("/proc/meminfo"):
        with open("/proc/meminfo", encoding="ascii") as stream:
            found = re.search(r"^MemAvailable:\s+(\d+) kB", stream.read(), re.MULTILINE)
        return int(found[1]) * 1024 if found else None
    return None


def _check_series(structures: Any) -> None:
    """Raises UsageError for an object that is no series of structures, and says what to pass instead."""
    from ase import Atoms
    from torch_geometric.data import Batch

    if isinstance(structures, str | bytes | os.PathLike):
        raise UsageError(
            f"predict takes structures, not the path {os.fspath(structures)!r}: pass escaip.data.open_source(path) or "
            "ase.io.read(path, ':')"
        )
    if isinstance(structures, Batch):
        raise UsageError("predict takes structures, not a batch: call potential(batch), or pass batch.to_data_list()")
    if isinstance(structures, Atoms | AtomicData) or _is_pymatgen(structures):
        raise UsageError(f"predict takes several structures, got one {type(structures).__name__}: pass a list of it")
    if not isinstance(structures, Iterable):
        raise UsageError(f"predict takes structures, got {type(structures).__name__}: pass a list or an iterable")


def _named(error: Exception, index: int, name: str = "") -> Exception:
    """Returns the same error with the structure at the head of its message."""
    return type(error)(f"structure {index}{f' ({name})' if name else ''}: {error}")


def _is_pymatgen(structure: Any) -> bool:
    if not hasattr(structure, "cart_coords"):  # saves the import
        return False
    from pymatgen.core import SiteCollection

    return isinstance(structure, SiteCollection)
