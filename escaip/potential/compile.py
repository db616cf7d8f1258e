"""One compiled graph for the energy and its derivative (docs/performance.md): the only place where code is compiled.

The model and the gradient of its energy are traced together into one graph of plain operations, which Inductor then
compiles: in inference nothing is left to differentiate, and in training on forces the compiler takes one ordinary
derivative of a graph that already holds the forces. Sizes are symbols. A first run on a structure made for it fixes
them as such, so that no later batch, whatever its size, compiles again; what a compiler would take for a special case
(one atom, no neighbors, no compared ranks) is padded by rows that no result depends on.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from escaip.errors import ConfigError
from escaip.graph import build_graph, displacements
from escaip.models import Model, ModelConfig
from escaip.nn.embedding import given_tables, kept_tables
from escaip.ops.rows import traced_rows
from escaip.potential.derivatives import EvaluationInputs, energy_and_gradient
from escaip.potential.padding import Sizes, pad, unpad
from escaip.types import AtomInputs, GraphSettings, ModelOutput


class CompiledEvaluation:
    """:func:`energy_and_gradient` of one model, compiled for all sizes, for weights that are fixed or that learn.

    Args:
        model: as it is now: its weights may change in place, but not their device, dtype or identity.
        example: a batch whose sizes are all different and above one.
        differentiate: whether the gradient is wanted.
        learning: whether results will be differentiated with respect to the weights.
        backend: of ``torch.compile``.

    Raises:
        ConfigError: the model or the machine cannot be compiled.
    """

    def __init__(
        self,
        model: Model,
        example: EvaluationInputs,
        differentiate: bool,
        learning: bool,
        backend: str = "inductor",
    ) -> None:
        self._weights = [(weight, weight.dtype, weight.device) for weight in model.parameters()]
        self._learning = learning

        def function(tables: list[Tensor], *tensors: Tensor) -> list[Tensor]:
            return flat_evaluation(model, tables, tensors, differentiate, learning)

        self.config = model.config
        check_distinct(example)
        tensors, tables = example.flat(), self._tables(model)
        self.graph_module = trace(function, [tables, *tensors], learning)
        self._function = torch.compile(self.graph_module, fullgraph=True, backend=backend)
        marked = [x.clone() for x in tensors]
        for x in marked:
            torch._dynamo.mark_dynamic(x, 0)
        with quiet_compiler():
            self._run(tables, marked)

    def fits(self, model: Model) -> bool:
        """Whether the weights are those that were compiled."""
        pairs = zip(self._weights, model.parameters(), strict=True)
        return all(a is b and (dtype, device) == (b.dtype, b.device) for (a, dtype, device), b in pairs)

    def __call__(self, model: Model, inputs: EvaluationInputs) -> tuple[ModelOutput, Tensor | None]:
        """As :func:`energy_and_gradient`."""
        return run_padded(partial(self.run, model), inputs, self.config)

    def run(self, model: Model, tensors: list[Tensor]) -> list[Tensor]:
        """As :func:`flat_evaluation`, for inputs of at least two of everything."""
        return self._run(self._tables(model), tensors)

    def _tables(self, model: Model) -> list[Tensor]:
        return [] if self._learning else kept_tables(model)

    def _run(self, tables: list[Tensor], tensors: list[Tensor]) -> list[Tensor]:
        with contextlib.nullcontext() if self._learning else torch.no_grad():
            return list(self._function(tables, *tensors))


def flat_evaluation(
    model: Model, tables: Sequence[Tensor], tensors: Sequence[Tensor], differentiate: bool, learning: bool
) -> list[Tensor]:
    """Runs :func:`energy_and_gradient` on :meth:`EvaluationInputs.flat`.

    Args:
        model: whose weights may be closed over.
        tables: of :func:`escaip.nn.embedding.kept_tables`; none where the model is to make its own.
        tensors: the inputs.
        differentiate: whether the gradient is wanted.
        learning: whether results will be differentiated with respect to the weights.

    Returns:
        Energy, direct forces, properties in the order of the config's heads, gradient; only those there are.
    """
    with torch.enable_grad() if differentiate or learning else torch.no_grad(), given_tables(model, tables):
        inputs = EvaluationInputs.from_flat(tensors)
        output, gradient = energy_and_gradient(model, inputs, differentiate, learning)
    properties = [output.properties[name] for name in model.config.heads]
    return [x for x in (output.energy, output.forces, *properties, gradient) if x is not None]


def run_padded(
    run: Callable[[list[Tensor]], list[Tensor]], inputs: EvaluationInputs, config: ModelConfig
) -> tuple[ModelOutput, Tensor | None]:
    """Runs compiled code on padded inputs and takes from its results what belongs to the inputs.

    Args:
        run: as :func:`flat_evaluation`.
        inputs: of a batch.
        config: of the model.
    """
    own = Sizes.of(inputs)
    padded = own.at_least_two()
    return unpad(run(pad(inputs, padded).flat()), padded, own, config)


def trace(function: Callable[..., list[Tensor]], arguments: list[Any], learning: bool) -> torch.fx.GraphModule:
    """Traces a function that differentiates into one graph of plain operations, with symbols for sizes.

    Weights that the function closes over become attributes of the graph.
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    with traced_rows(differentiable=learning), quiet_compiler():
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
    vectors = displacements(positions, batch.cell, system, graph)
    ones = torch.ones_like(system)
    atoms = AtomInputs(6 * ones, 0 * ones, ones, 8 * system)
    inputs = EvaluationInputs(vectors, torch.ones(13, dtype=dtype), atoms, graph)
    inputs = EvaluationInputs.from_flat([x.to(device) for x in inputs.flat()])
    return pad(inputs, Sizes.of(inputs).at_least_two())


def check_distinct(inputs: EvaluationInputs) -> None:
    """Raises ConfigError for an example from which a tracer would learn that two sizes are always equal."""
    num_atoms, layout = inputs.weight.shape[0], inputs.layout
    sizes = [num_atoms, num_atoms + 1, layout.num_tokens, len(inputs.vectors), len(layout.rank_token)]
    if len(set(sizes)) < len(sizes):
        raise ConfigError(f"the example for the compiler has equal sizes {sizes}: choose another")


@contextlib.contextmanager
def quiet_compiler() -> Iterator[None]:
    """Without remarks of the compiler to its own developers, and its advice to take TF32 (docs/precision.md)."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
        warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")
        yield
