"""The energy and its derivative as one function of tensors: what is run, compiled or divided into parts."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import mmap
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from escaip.graph import split_tokens, token_geometry
from escaip.models.config import EScAIPConfig
from escaip.models.escaip import EScAIP, call
from escaip.ops import sum_rows
from escaip.potential.precision import in_precision, rounding
from escaip.types import AtomInputs, Graph, GraphSettings, ModelOutput

# What autograd keeps for one feature of one token in one block of a prediction: 60 to 64 (benchmarks/kept.py).
_BYTES_PER_FEATURE = 64
_MOST_KEPT = (4 * 2**30, 16 * 2**30)  # CPU, CUDA
_PART, _LARGE_PART = 6_000, 200_000
_MOST_HELD = 2**30  # bytes that the C library may hold between parts
_ABOUT = 2**28  # as near to the peak of the process as this counts as there

LAYOUT = ("offsets", "center", "neighbor", "reverse", "self_token", "rank_base", "rank_token", "rank_other")
ATOMS = tuple(field.name for field in dataclasses.fields(AtomInputs))


@dataclass(frozen=True)
class EvaluationInputs:
    """What a graph of the model depends on besides its weights: first dimensions are sizes of the batch.

    Attributes:
        vectors: ``(R, 3)`` Å, float64, displacements of the ``R = T + X`` rows of the graph.
        weight: ``(N,)`` factor of each atomic energy in the sum that is differentiated, in the model's dtype.
        atoms: ``(N,)`` each.
        layout: ``offsets, center, neighbor, reverse, self_token, rank_base, rank_token, rank_other`` of the graph.
    """

    vectors: Tensor
    weight: Tensor
    atoms: AtomInputs
    layout: tuple[Tensor, ...]

    @classmethod
    def of_graph(cls, vectors: Tensor, weight: Tensor, atoms: AtomInputs, graph: Graph) -> EvaluationInputs:
        """Of a batch, see :class:`~escaip.types.Graph`."""
        return cls(vectors, weight, atoms, tuple(getattr(graph, name) for name in LAYOUT))

    @property
    def graph(self) -> Graph:
        """The graph; without the cell translations, which the displacements hold."""
        layout = dict(zip(LAYOUT, self.layout, strict=True))
        num_tokens = layout["reverse"].shape[0]
        return Graph(**layout, shift=layout["center"], num_tokens=num_tokens, max_neighborhood=0)

    def flat(self) -> list[Tensor]:
        """All tensors in one order."""
        return [self.vectors, self.weight, *(getattr(self.atoms, name) for name in ATOMS), *self.layout]

    @classmethod
    def from_flat(cls, tensors: Sequence[Tensor]) -> EvaluationInputs:
        """The inverse of :meth:`flat`."""
        end = 2 + len(ATOMS)
        return cls(tensors[0], tensors[1], AtomInputs(*tensors[2:end]), tuple(tensors[end:]))


def evaluate(
    model: EScAIP,
    settings: GraphSettings,
    inputs: EvaluationInputs,
    tables: Sequence[Tensor] | None,
    differentiate: bool,
    create_graph: bool,
    *,
    max_tokens: int | None = None,
    recompute: float = 0.0,
) -> tuple[ModelOutput, Tensor | None]:
    """Runs a model, and differentiates the weighted sum of its energies with respect to the displacements.

    Args:
        model: in the dtype of the inputs.
        settings: what the graph was built with.
        inputs: of a batch.
        tables: of the model's distance embeddings, or None.
        differentiate: whether the gradient is wanted.
        create_graph: whether the gradient will be differentiated.
        max_tokens: process whole neighborhoods of at most so many tokens at a time; None for all at once.
        recompute: share of the parts of layers of which only what enters is kept, to be run again for the derivative
            (arXiv 1604.06174).

    Returns:
        The output, and the gradient ``(R, 3)`` in the dtype of the displacements if it was asked for.
    """
    graph, vectors, dtype = inputs.graph, inputs.vectors, inputs.weight.dtype
    if differentiate and not vectors.requires_grad:
        vectors = vectors.detach().requires_grad_()
    with in_precision("highest", vectors.device) as rounded:
        parts = split_tokens(graph, token_geometry(vectors, graph, settings, dtype), max_tokens)
        # Torch's autocast leaves float64 alone, too.
        run = rounding(_keeping(recompute), None if dtype == torch.float64 else rounded, vectors.device)
        output = model(inputs.atoms, parts, tables, run)
        if not differentiate:
            return output, None
        (gradient,) = torch.autograd.grad(output.energy, vectors, inputs.weight, create_graph=create_graph)
    return output, gradient


@contextlib.contextmanager
def frozen(model: EScAIP) -> Iterator[None]:
    """Weights need no derivatives within: what only they would ask for is not kept, which is half of all."""
    learned = [weight for weight in model.parameters() if weight.requires_grad and weight.is_leaf]
    for weight in learned:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in learned:
            weight.requires_grad_()


def plan_parts(config: EScAIPConfig, num_tokens: int, device: torch.device) -> tuple[int | None, float]:
    """How a prediction is divided: ``max_tokens`` and ``recompute`` of :func:`evaluate`.

    On a CPU parts that stay in its caches are the faster ones (2 048 atoms of copper, 1m preset: 1.1 against 1.5 ms per
    atom). A few GiB are kept for the derivative, and what goes beyond is computed again, so that the time grows with
    the share that does not fit (docs/performance.md).
    """
    kept = num_tokens * config.num_layers * config.hidden_size * _BYTES_PER_FEATURE
    recompute = max(0.0, 1.0 - _MOST_KEPT[device.type == "cuda"] / max(kept, 1))
    return (_PART if device.type == "cpu" else _LARGE_PART if recompute else None), recompute


def _keeping(recompute: float) -> Callable[..., Any]:
    """How parts are run: as they are, or a share of them, evenly spread, by :func:`_recomputed`."""
    if not 0.0 < recompute < 1.0:
        return _recomputed if recompute else call
    due = 0.0

    def run(function: Callable[..., Any], *arguments: Any) -> Any:
        nonlocal due
        due += recompute
        if due < 1.0:
            return function(*arguments)
        due -= 1.0
        return _recomputed(function, *arguments)

    return run


def _recomputed(function: Callable[..., Any], *arguments: Any) -> Any:
    return checkpoint(_trimmed, function, *arguments, use_reentrant=False)


def _trimmed(function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls, after giving free memory back to the system where the process would outgrow itself with much of it free.

    What a part leaves behind lies scattered between what is kept, and the C library would hold twice as much (copper,
    5m preset: 1.6 against 0.8 GB for 7 000 atoms). Fresh pages cost as much time as the computing, so it may hold a
    GiB, and all that the process has held before (docs/performance.md). Before the call, since a second call ends as
    soon as it has what is needed.
    """
    library = _c_library()
    if library is not None:
        import resource  # of Unix only

        with open("/proc/self/statm", encoding="ascii") as statm:
            resident = int(statm.read().split()[1]) * mmap.PAGESIZE
        if resident > resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - _ABOUT:
            held = library.mallinfo2()
            if resident - held.uordblks - held.hblkhd > _MOST_HELD:
                library.malloc_trim(0)
    return function(*arguments)


class _MallocInfo(ctypes.Structure):
    """``struct mallinfo2``: bytes in use are ``uordblks``, and ``hblkhd`` in mappings of their own."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
        )
    ]  # fmt: skip


@functools.cache
def _c_library() -> ctypes.CDLL | None:
    """That of GNU, where the process has it, of version 2.33 or newer."""
    if sys.platform != "linux":
        return None
    library = ctypes.CDLL(None)
    if not (hasattr(library, "mallinfo2") and hasattr(library, "malloc_trim")):
        return None
    library.mallinfo2.restype = _MallocInfo
    return library


def forces_of(gradient: Tensor, graph: Graph) -> Tensor:
    """``−∂E/∂r``, ``(N, 3)``, from the gradient with respect to each displacement ``r_j − r_i``."""
    on_center = sum_rows(gradient, graph.center, graph.num_atoms)
    return on_center - sum_rows(gradient, graph.neighbor, graph.num_atoms)


def virials_of(vectors: Tensor, gradient: Tensor, graph: Graph) -> Tensor:
    """``(N, 3, 3)`` eV, a share ``W_i`` of ``Σ d ⊗ ∂E/∂d`` for each atom, symmetric: half of every row to either end.

    How a many-body energy's virial is divided is a convention (Fan et al., Phys. Rev. B 92, 094301, 2015): only the sum
    is physical. A pair is two rows, ``i → j`` and ``j → i``; halves depend on the pair's force
    ``∂E/∂d_ij − ∂E/∂d_ji`` alone, where giving a row to its center would depend on which of the two the model happens
    to read. It is what LAMMPS does for pair potentials. For heat fluxes it is not enough: those need the derivatives of
    each atom's energy (Langer et al., J. Chem. Phys. 159, 174105, 2023).

    Args:
        vectors: ``(T + X, 3)`` Å, displacements of the rows.
        gradient: ``(T + X, 3)`` eV/Å, of the energy with respect to them.
        graph: whose rows they are.
    """
    rows = 0.5 * vectors.unsqueeze(2) * gradient.unsqueeze(1)
    shares = sum_rows(rows, graph.center, graph.num_atoms) + sum_rows(rows, graph.neighbor, graph.num_atoms)
    return 0.5 * (shares + shares.transpose(1, 2))


def stress_of(virial: Tensor, cell: Tensor, pbc: Tensor) -> Tensor:
    """``(1/V) ∂E/∂ε`` in eV/Å³, ``(B, 3, 3)``, from ``Σ d ⊗ ∂E/∂d``; NaN for systems without a periodic cell."""
    volume = torch.linalg.det(cell).abs()
    has_volume = (volume > 0) & pbc.any(-1)
    symmetric = 0.5 * (virial + virial.transpose(1, 2))  # the strain is symmetric
    divided = symmetric / torch.where(has_volume, volume, 1.0)[:, None, None]
    return torch.where(has_volume[:, None, None], divided, torch.nan)
