"""Floating-point operations of an evaluation and of a training step of an EScAIP: by formula, and measured.

Matrix products and the products within attention are counted, a multiply-add as two operations, as
``torch.utils.flop_counter.FlopCounterMode`` does. Everything else is **not counted**: activations, norms, softmax,
Legendre polynomials, gathers and sums over rows, Gaussians and splines, bond-orientational order, power spectra of
densities and the linear energy, graph and geometry, atomic energies, loss and optimizer. All of it is linear in tokens
or pairs, and takes a larger share of the time.

A linear layer costs ``2 · rows · in · out``. Rows are the ``N`` atoms, the ``T`` tokens (kept directed edges and ``N``
self tokens) or the knots of a table of distances. Attention costs ``2 P H`` for logits, ``2 P H`` for values and
``6 P`` for cosines where there are angles, with ``P = Σ_i T_i²`` pairs of tokens of the same atom and ``H`` features.
The last block of a conservative model has no edge network, and unless its aggregation is ``graph_attention`` queries
and outputs for ``N`` self tokens alone: then ``P`` is ``T`` and the logits are ``2 T h c_0``, with ``h`` heads of
``c_0`` scalar channels.

Derivatives. ``Y = X W`` costs one product. The gradient of the loss adds one for ``W`` and one for ``X`` where weights
lie behind it: three for training on energies or direct forces. Conservative forces add the one for ``X`` (two in
prediction). Training on them differentiates ``∂X = ∂Y Wᵀ`` by ``∂Y`` and ``W``, and ``Y`` by ``X`` and ``W``: six. A
product of attention is one, three with a gradient and, differentiated twice by both factors, 1 + 2 + (2 · 2 + 2) = 9.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from escaip.data import AtomicData, collate
from escaip.errors import UsageError
from escaip.graph import build_graph
from escaip.models import EScAIP, EScAIPConfig, ModelConfig
from escaip.nn.embedding import kept_tables
from escaip.ops import spline
from escaip.ops.autograd import OPERATORS
from escaip.potential import Potential
from escaip.types import GraphSettings, StructureBatch

MODES = ("energy", "forces", "energy_training", "training")
"""Energies alone; energies and forces; a training step on energies; one on energies and forces, direct or conservative
as the configuration says. Stress adds nothing. Distance tables are kept between predictions and made again in each step
of training."""

_SPLINE_ENDS = 2 * spline.GHOSTS + 1  # rows of a table beyond the number of its intervals
# Names of linear layers whose input has a row for each atom; that of others has one for each token.
_ON_ATOMS = re.compile(r"source|target|sender|receiver|density\.project|node_|energy_head|magnitude")


class GraphShape(NamedTuple):
    """Sizes of a batch on which its cost depends; means need not be whole.

    Attributes:
        num_atoms: ``N``.
        num_tokens: ``T``, kept directed edges and ``N`` self tokens.
        num_pairs: ``P = Σ_i T_i²`` over the ``T_i`` tokens of each atom.
    """

    num_atoms: float
    num_tokens: float
    num_pairs: float

    @classmethod
    def of_batch(cls, batch: StructureBatch, settings: GraphSettings) -> GraphShape:
        """Takes the sizes of the graph that a model with these settings builds for a batch."""
        graph = build_graph(batch, settings)
        return cls(graph.num_atoms, graph.num_tokens, int(graph.offsets.diff().square().sum()))

    def times(self, factor: float) -> GraphShape:
        """Returns the sizes of so many such batches."""
        return GraphShape(*(factor * size for size in self))


def mean_shape(structures: Iterable[AtomicData], settings: GraphSettings) -> GraphShape:
    """Returns mean sizes of a sample of structures, building one graph at a time."""
    shapes = [GraphShape.of_batch(collate([one]), settings) for one in structures]
    return GraphShape(*map(sum, zip(*shapes, strict=True))).times(1.0 / len(shapes))


def count_flops(config: ModelConfig, batch: StructureBatch | GraphShape, mode: str = "training") -> float:
    """Counts the floating-point operations of an evaluation or training step of a batch by formula.

    The mode is one of ``MODES``.

    Raises:
        UsageError: there is no such mode, a direct-force model is to be trained on energies alone, or the configuration
            is not that of an EScAIP.
    """
    return sum(flops_by_layer(config, batch, mode).values())


def flops_by_layer(config: ModelConfig, batch: StructureBatch | GraphShape, mode: str = "training") -> dict[str, float]:
    """Counts as ``count_flops``, for each layer by its name apart, and ``attention``; all blocks together."""
    config = _checked(config, mode)
    shape = batch if isinstance(batch, GraphShape) else GraphShape.of_batch(batch, config.graph)
    knots = config.distance_knots + _SPLINE_ENDS
    rows = {"token": shape.num_tokens, "atom": shape.num_atoms, "knot": knots}
    counts: dict[str, float] = {}
    for name, kind, size in _layers(config, mode):
        layer = re.sub(r"\.\d+", "", name)
        cost = 2 * rows[kind] * size * _passes(name, kind, mode, config.is_conservative)
        counts[layer] = counts.get(layer, 0) + cost
    counts["attention"] = _attention(config, shape, mode)
    return counts


def _attention(config: EScAIPConfig, shape: GraphShape, mode: str) -> float:
    """Counts the products of queries, keys, values and directions in all blocks."""
    derivatives = 1 if mode == "energy" or (mode == "forces" and not config.is_conservative) else 3
    with_direction = derivatives
    if mode == "training" and config.is_conservative:
        derivatives = with_direction = 9
    elif mode in ("training", "energy_training"):
        with_direction = 1
    channels, heads, hidden = config.angular_channels, config.num_heads, config.hidden_size
    cosines = 6 * with_direction * shape.num_pairs if channels is not None and len(channels) > 1 else 0
    whole = derivatives * 4 * shape.num_pairs * hidden + cosines
    if not _last_reads_self(config):
        return config.num_layers * whole
    width = hidden if channels is None else heads * channels[0]
    return (config.num_layers - 1) * whole + derivatives * 2 * shape.num_tokens * (width + hidden)


def _last_reads_self(config: EScAIPConfig) -> bool:
    return config.is_conservative and config.aggregation == "self"


def _layers(config: EScAIPConfig, mode: str) -> Iterator[tuple[str, str, int]]:
    """Yields the linear layers that are computed: name, kind of the rows of its input, and number of weights."""
    training = mode.endswith("training")
    tabulated = config.distance_table == "always" or (config.distance_table == "inference" and not training)
    last = f"blocks.{config.num_layers - 1}.attention."
    of_self = (last + "query", last + "project") if _last_reads_self(config) else ()
    for name, size in _linear_layers(config).items():
        if not (tabulated and ".distance_" in name):
            yield name, "atom" if name in of_self or _ON_ATOMS.search(name) else "token", size
        elif training:  # otherwise the table is kept
            yield name, "knot", size


@functools.lru_cache(64)
def _linear_layers(config: EScAIPConfig) -> dict[str, int]:
    """Returns the number of weights of each linear layer by its name in the model; further heads are left out."""
    with torch.device("meta"):
        model = EScAIP(config)
    modules = ((name, module) for name, module in model.named_modules() if not name.startswith("heads."))
    return {name: module.weight.numel() for name, module in modules if isinstance(module, nn.Linear)}


def _passes(name: str, rows: str, mode: str, conservative: bool) -> int:
    """Returns how often the product of a layer is computed, or one of its size (see the module)."""
    if mode == "energy" or (mode == "forces" and not conservative):
        return 1
    moves = rows != "knot"  # the input depends on positions
    if mode == "forces":
        return 1 + moves
    learned = not name.endswith((".order", ".distance_embedding"))  # the input depends on weights
    if mode == "energy_training" or not conservative:
        return 2 + learned
    last = name.endswith(".output")
    first = 1 + 1 + (not last) if moves else 0  # ∂X, its derivatives by W and, unless constant, by ∂Y
    return 1 + first + 1 + (moves or learned)


@dataclass(frozen=True)
class ParameterCount:
    """Number of parameters of a model.

    Attributes:
        total: all parameters; atomic energies and scale are none.
        embedding: tables from which rows are taken without a product: elements of either end in each block, total
            charge, spin multiplicity.
        token: weights in products with a row for each token, which cost most; the others have a row for each atom or
            knot, or are biases and norms.
    """

    total: int
    embedding: int
    token: int

    @property
    def non_embedding(self) -> int:
        """All but embeddings: ``N`` of scaling laws (Kaplan et al., arXiv:2001.08361)."""
        return self.total - self.embedding


def parameter_count(config: EScAIPConfig) -> ParameterCount:
    """Counts the parameters of a model without memory for them."""
    with torch.device("meta"):
        model = EScAIP(config)
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    return ParameterCount(
        total=sum(weight.numel() for weight in model.parameters()),
        embedding=sum(table.weight.numel() for table in tables),
        token=sum(size for _, rows, size in _layers(config, "training") if rows == "token"),
    )


def training_flops(
    config: ModelConfig, structure: GraphShape, *, batch_size: float, steps: int, mode: str = "training"
) -> float:
    """Counts the operations of a run: ``C = n · cost(structure) + steps · cost(tables)`` for ``n`` structures seen.

    A structure has mean sizes, from ``mean_shape``; ``batch_size`` is that of a step in all processes, the mean where
    batches are packed by atoms; errors are those of ``count_flops``.
    """
    tables = count_flops(config, GraphShape(0, 0, 0), mode)
    return count_flops(config, structure.times(steps * batch_size), mode) + (steps - 1) * tables


def profile_flops(config: ModelConfig, batch: StructureBatch, mode: str = "training") -> int:
    """Measures the operations that ``count_flops`` predicts by one evaluation or step under PyTorch's counter.

    A fresh potential of the configuration without dropout is run on the batch's device; the batch and the state of the
    random numbers do not change. Attention is counted by ``operator_formulas``. Arguments and errors are those of
    ``count_flops``.
    """
    config = _checked(config, mode)
    training = mode.endswith("training")
    off: dict[str, Any] = {field.name: 0.0 for field in dataclasses.fields(config) if field.name.endswith("dropout")}
    config = dataclasses.replace(config, **off, stochastic_depth=0.0, attention_backend="auto")
    with torch.random.fork_rng(devices=[]):
        potential = Potential(config).to(batch.positions.device).train(training)
    potential.recompute = False  # computing something again is no useful work
    if potential.datasets:
        potential.choose_dataset(potential.datasets[0])  # each costs the same
    graph = potential.graph_of(batch)
    if not training:
        kept_tables(potential.model)  # kept between predictions, so made before the counting
    with (
        FlopCounterMode(display=False, custom_mapping=operator_formulas()) as counter,
        torch.set_grad_enabled(training),
    ):
        prediction = potential(batch, graph=graph, compute_forces=mode in ("forces", "training"))
        if training:
            forces = prediction.forces
            loss = prediction.energy.square().sum() + (0.0 if forces is None else forces.square().sum())
            loss.backward()
    return counter.get_total_flops()


def _checked(config: ModelConfig, mode: str) -> EScAIPConfig:
    """Returns the configuration, for which the mode can be counted."""
    if not isinstance(config, EScAIPConfig):
        raise UsageError(f"operations of {type(config).__name__} are not known: only those of EScAIP are counted")
    if mode not in MODES:
        raise UsageError(f"mode {mode!r} does not exist: choose {', '.join(MODES)}")
    if mode == "energy_training" and not config.is_conservative:
        raise UsageError("a direct-force model is trained on forces, too: count mode training, or forces: conservative")
    return config


def operator_formulas() -> dict[Any, Callable[..., int]]:
    """Returns the costs of the package's operators, a ``custom_mapping`` for ``FlopCounterMode``.

    Useful operations are counted: those of the value and of its first and second derivative if all intermediates are
    kept. Kernels recompute logits and share the work of the second derivative; that is not counted.
    """
    formulas: dict[Any, Any] = {}
    for operators in OPERATORS.values():
        formulas[operators.value.overloadpacket] = _forward
        formulas[operators.backward.overloadpacket] = _backward
        formulas[operators.double_backward.overloadpacket] = _double_backward
    for formula in formulas.values():
        formula._get_raw = True  # the sizes of neighborhoods are values of tensors, not shapes
    return formulas


def _forward(q: Tensor, k: Tensor, v: Tensor, log_envelope: Any, direction: Any, *rest: Any, out_val: Any) -> int:
    products, cosines = _operands(q, *rest[:3])
    return products + (0 if direction is None else cosines)


def _backward(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any, out_val: Any) -> int:
    products, cosines = _operands(q, rest[2], rest[3], rest[6])
    return 2 * products + (2 * cosines if rest[-1] else 0)


def _double_backward(
    tq: Tensor, tk: Tensor, tv: Tensor, tb: Any, tn: Any, grad_out: Tensor, q: Tensor, *rest: Any, out_val: Any
) -> int:
    products, cosines = _operands(q, rest[4], rest[5], rest[8])
    return 4 * products + (0 if tn is None else 4 * cosines)


def _operands(q: Tensor, query_offsets: Tensor, key_offsets: Tensor, widths: list[int]) -> tuple[int, int]:
    """Counts the operations of logits and values, and of the cosines between directions."""
    pairs = int((query_offsets.diff() * key_offsets.diff()).sum())
    heads, head_size = q.shape[1:]
    return 2 * pairs * heads * (sum(widths) + head_size), 6 * pairs
