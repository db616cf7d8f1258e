"""One compiled graph for the energy and its derivative (docs/performance.md): the only place where code is compiled.

The model and the gradient of its energy are traced together into one graph of plain operations, which Inductor then
compiles: in inference nothing is left to differentiate, and in training on forces the compiler takes one ordinary
derivative of a graph that already holds the forces. Sizes are symbols. A first run on a structure made for it fixes
them as such, so that no later batch, whatever its size, compiles again; what a compiler would take for a special case
(one atom, no neighbors, no compared ranks) is padded by rows that no result depends on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from escaip.errors import ConfigError
from escaip.graph import build_graph, displacements, split_tokens, token_geometry
from escaip.model import EScAIP
from escaip.ops.rows import traced_rows
from escaip.types import AtomInputs, Graph, GraphSettings, ModelOutput

_LAYOUT = ("offsets", "center", "neighbor", "reverse", "self_token", "rank_base", "rank_token", "rank_other")
_ATOMS = tuple(field.name for field in dataclasses.fields(AtomInputs))


@dataclass(frozen=True)
class EvaluationInputs:
    """What a graph of the model depends on besides its weights: first dimensions are sizes of the batch.

    Attributes:
        vectors: ``(R, 3)`` Å, displacements of the ``R = T + X`` rows of the graph, in the model's dtype.
        weight: ``(N,)`` factor of each atomic energy in the sum that is differentiated.
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
        return cls(vectors, weight, atoms, tuple(getattr(graph, name) for name in _LAYOUT))

    @property
    def graph(self) -> Graph:
        """The graph; without the cell translations, which the displacements hold."""
        layout = dict(zip(_LAYOUT, self.layout, strict=True))
        num_tokens = layout["reverse"].shape[0]
        return Graph(**layout, shift=layout["center"], num_tokens=num_tokens, max_neighborhood=0)

    def flat(self) -> list[Tensor]:
        """All tensors in one order."""
        return [self.vectors, self.weight, *(getattr(self.atoms, name) for name in _ATOMS), *self.layout]

    @classmethod
    def from_flat(cls, tensors: Sequence[Tensor]) -> EvaluationInputs:
        """The inverse of :meth:`flat`."""
        end = 2 + len(_ATOMS)
        return cls(tensors[0], tensors[1], AtomInputs(*tensors[2:end]), tuple(tensors[end:]))

    def padded(self) -> EvaluationInputs:
        """At least two of everything: atoms, tokens, rows beyond the tokens, compared ranks."""
        inputs = self._with_atom() if self.weight.shape[0] < 2 else self
        layout = dict(zip(_LAYOUT, inputs.layout, strict=True))
        vectors = inputs.vectors
        if vectors.shape[0] - layout["reverse"].shape[0] < 2:
            vectors = torch.cat([vectors, vectors.new_zeros(2, 3)])
            layout |= {name: _more(layout[name], 2, 0) for name in ("center", "neighbor")}
        if layout["rank_token"].shape[0] < 2:
            # The self token's own rank is not read.
            layout |= {name: _more(layout[name], 2, 0) for name in ("rank_token", "rank_other")}
        return EvaluationInputs(vectors, inputs.weight, inputs.atoms, tuple(layout.values()))

    def _with_atom(self) -> EvaluationInputs:
        """With a second atom that has no neighbors, its token after those of the first."""
        layout = dict(zip(_LAYOUT, self.layout, strict=True))
        tokens, rows = layout["reverse"].shape[0], self.vectors.shape[0]

        def insert(x: Tensor, value: int) -> Tensor:
            return torch.cat([x[:tokens], x.new_full((1, *x.shape[1:]), value), x[tokens:]])

        moved = torch.where(layout["rank_other"] < tokens, layout["rank_other"], layout["rank_other"] + 1)
        layout |= {
            "offsets": _more(layout["offsets"], 1, tokens + 1),
            "center": insert(layout["center"], 1),
            "neighbor": insert(layout["neighbor"], 1),
            "reverse": insert(layout["reverse"], tokens),
            "self_token": _more(layout["self_token"], 1, tokens),
            "rank_base": insert(layout["rank_base"], 0),
            "rank_other": moved if rows > tokens else layout["rank_other"],
        }
        atoms = AtomInputs(*(torch.cat([x, x]) for x in (getattr(self.atoms, name) for name in _ATOMS)))
        return EvaluationInputs(
            insert(self.vectors, 0), torch.cat([self.weight, self.weight]), atoms, tuple(layout.values())
        )


def evaluate(
    model: EScAIP,
    settings: GraphSettings,
    inputs: EvaluationInputs,
    tables: Sequence[Tensor] | None,
    differentiate: bool,
    create_graph: bool,
) -> tuple[ModelOutput, Tensor | None]:
    """Runs a model, and differentiates the weighted sum of its energies with respect to the displacements.

    Returns:
        The output, and the gradient ``(R, 3)`` in the dtype of the displacements if it was asked for.
    """
    graph, vectors = inputs.graph, inputs.vectors
    if differentiate and not vectors.requires_grad:
        vectors = vectors.detach().requires_grad_()
    output = model(inputs.atoms, split_tokens(graph, token_geometry(vectors, graph, settings)), tables)
    if not differentiate:
        return output, None
    (gradient,) = torch.autograd.grad(output.energy, vectors, inputs.weight, create_graph=create_graph)
    return output, gradient


class CompiledEvaluation:
    """:func:`evaluate` of one model, compiled for all sizes, for weights that are fixed or that learn.

    Args:
        model: as it is now: its weights may change in place, but not their device, dtype or identity.
        settings: of the graph.
        example: a batch whose sizes are all different and above one.
        differentiate: whether the gradient is wanted.
        learning: whether results will be differentiated with respect to the weights.

    Raises:
        ConfigError: the model or the machine cannot be compiled.
    """

    def __init__(
        self, model: EScAIP, settings: GraphSettings, example: EvaluationInputs, differentiate: bool, learning: bool
    ) -> None:
        self._weights = tuple(model.parameters())
        self._tables_given = not learning and model.tables(learning) is not None
        self._learning = learning

        def function(tables: list[Tensor], *tensors: Tensor) -> list[Tensor]:
            known = tables if self._tables_given else model.tables(learning)
            with torch.enable_grad() if differentiate or learning else torch.no_grad():
                inputs = EvaluationInputs.from_flat(tensors)
                output, gradient = evaluate(model, settings, inputs, known, differentiate, learning)
            return [x for x in (output.energy, output.forces, gradient) if x is not None]

        self._has_forces = not model.config.is_conservative
        tensors, tables = example.padded().flat(), self._tables(model)
        _check_distinct(example.padded())
        self.graph_module = trace(function, [tables, *tensors], learning)
        self._function = torch.compile(self.graph_module, fullgraph=True)
        marked = [x.clone() for x in tensors]
        for x in marked:
            torch._dynamo.mark_dynamic(x, 0)
        with _quiet_compiler():
            self._run(tables, marked)

    def fits(self, model: EScAIP) -> bool:
        """Whether the weights are those that were compiled."""
        return all(a is b for a, b in zip(self._weights, model.parameters(), strict=True))

    def __call__(self, model: EScAIP, inputs: EvaluationInputs) -> tuple[ModelOutput, Tensor | None]:
        """As :func:`evaluate`."""
        padded = inputs.padded()
        results = self._run(self._tables(model), padded.flat())
        num_atoms, num_rows = inputs.weight.shape[0], inputs.vectors.shape[0]
        energy, forces = results.pop(0)[:num_atoms], results.pop(0)[:num_atoms] if self._has_forces else None
        if not results:
            return ModelOutput(energy, forces), None
        gradient = results[0]
        if num_atoms < padded.weight.shape[0]:  # the second atom's token stands after those of the first
            tokens = inputs.layout[_LAYOUT.index("reverse")].shape[0]
            gradient = torch.cat([gradient[:tokens], gradient[tokens + 1 :]])
        return ModelOutput(energy, forces), gradient[:num_rows]

    def _tables(self, model: EScAIP) -> list[Tensor]:
        return (model.tables(False) or []) if self._tables_given else []

    def _run(self, tables: list[Tensor], tensors: list[Tensor]) -> list[Tensor]:
        with contextlib.nullcontext() if self._learning else torch.no_grad():
            return list(self._function(tables, *tensors))


def trace(function: Callable[..., list[Tensor]], arguments: list[Any], learning: bool) -> torch.fx.GraphModule:
    """Traces a function that differentiates into one graph of plain operations, with symbols for sizes.

    Weights that the function closes over become attributes of the graph.
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    with traced_rows(differentiable=learning), _quiet_compiler():
        graph_module = make_fx(function, tracing_mode="symbolic", _allow_non_fake_inputs=True)(*arguments)
    # What autograd saved for the derivative was traced as detached, which would cut the second derivative.
    for node in graph_module.graph.find_nodes(op="call_function", target=torch.ops.aten.detach.default):
        if node.args[0].op != "placeholder":
            node.replace_all_uses_with(node.args[0])
            graph_module.graph.erase_node(node)
    graph_module.recompile()
    return graph_module


def compile_example(settings: GraphSettings, dtype: torch.dtype, device: torch.device) -> EvaluationInputs:
    """A crystal and a cluster of carbon, at distances that fit the cutoff: what a graph is traced with."""
    generator = torch.Generator().manual_seed(0)
    spacing = 0.4 * settings.cutoff
    corners = torch.cartesian_prod(*[torch.arange(2.0, dtype=torch.float64)] * 3)
    positions = torch.cat([corners, corners[:5]]) * spacing
    positions = positions + 0.05 * spacing * torch.rand(positions.shape, dtype=torch.float64, generator=generator)
    edge = torch.eye(3, dtype=torch.float64) * 2.0 * spacing
    system = torch.tensor([0] * 8 + [1] * 5)
    batch = SimpleNamespace(
        positions=positions,
        cell=torch.stack([edge, torch.zeros_like(edge)]),
        pbc=torch.tensor([[settings.periodic] * 3, [False] * 3]),
        batch=system,
        ptr=torch.tensor([0, 8, 13]),
    )
    graph = build_graph(batch, settings)
    vectors = displacements(positions, batch.cell, system, graph).to(dtype)
    ones = torch.ones_like(system)
    atoms = AtomInputs(6 * ones, 0 * ones, ones, 8 * system)
    inputs = EvaluationInputs.of_graph(vectors, torch.ones(13, dtype=dtype), atoms, graph)
    return EvaluationInputs.from_flat([x.to(device) for x in inputs.flat()])


def _check_distinct(inputs: EvaluationInputs) -> None:
    layout = dict(zip(_LAYOUT, inputs.layout, strict=True))
    num_atoms = inputs.weight.shape[0]
    sizes = [
        num_atoms,
        num_atoms + 1,
        layout["reverse"].shape[0],
        inputs.vectors.shape[0],
        layout["rank_token"].shape[0],
    ]
    if len(set(sizes)) < len(sizes):
        raise ConfigError(f"the example for the compiler has equal sizes {sizes}: choose another")


def _more(x: Tensor, count: int, value: int) -> Tensor:
    return torch.cat([x, x.new_full((count, *x.shape[1:]), value)])


@contextlib.contextmanager
def _quiet_compiler() -> Iterator[None]:
    """Without the remarks that the compiler makes to its own developers."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
        yield
