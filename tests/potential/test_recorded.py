"""Padded and recorded evaluations: rows that nothing depends on, and recordings that follow sizes and weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import ase.build
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from escaip import EScAIPCalculator, EScAIPConfig, Potential
from escaip.data import AtomicData, collate
from escaip.errors import ConfigError
from escaip.graph import build_graph, displacements
from escaip.nn.embedding import kept_tables
from escaip.potential.compile import CompiledEvaluation, compile_example, flat_evaluation
from escaip.potential.derivatives import EvaluationInputs
from escaip.potential.padding import Sizes, pad, unpad
from escaip.potential.recorded import RecordedEvaluation
from escaip.types import AtomInputs

TINY = {
    "hidden_size": 16, "num_layers": 2, "num_heads": 2, "angular_channels": [3, 3, 2], "num_radial": 8,
    "radial_width": 1.0, "distance_size": 8, "element_size": 4, "boo_size": 4, "boo_degrees": 3, "num_neighbors": 6,
    "distance_table": "always", "distance_knots": 16,
}  # fmt: skip

# What a device makes its host wait for: results whose size, or a value that the host reads, depends on values.
WAITING = {"nonzero", "_local_scalar_dense", "item", "masked_select", "unique",
           "repeat_interleave", "bincount", "equal"}  # fmt: skip


def make_potential(**overrides: object) -> Potential:
    torch.manual_seed(0)
    return Potential(EScAIPConfig.from_dict({**TINY, **overrides})).double().eval().requires_grad_(False)


def inputs_of(potential: Potential, *structures: ase.Atoms) -> EvaluationInputs:
    batch = collate([AtomicData.from_ase(atoms) for atoms in structures])
    graph = build_graph(batch, potential.config.graph)
    vectors = displacements(batch.positions, batch.cell, batch.batch, graph)
    return EvaluationInputs(
        vectors, torch.ones(len(batch.positions), dtype=torch.float64), AtomInputs.of_batch(batch), graph
    )


def crystal(seed: int, atoms: int = 8) -> ase.Atoms:
    made = ase.build.bulk("Cu", cubic=True).repeat((atoms // 4, 1, 1))
    made.rattle(0.1, seed=seed)
    return made


def structures() -> list[list[ase.Atoms]]:
    ethanol = ase.build.molecule("CH3CH2OH")
    return [[ase.Atoms("Cu")], [ase.build.molecule("H2O")], [crystal(0), ethanol], [ethanol]]


def run(potential: Potential, tensors: list[Tensor]) -> list[Tensor]:
    model, config = potential.model, potential.config
    return flat_evaluation(model, kept_tables(model), tensors, config.is_conservative, False)


@pytest.mark.parametrize("options", [{}, {"forces": "direct"}, {"num_neighbors": None}, {"charge": True}],
                         ids=["default", "direct", "radius", "charge"])  # fmt: skip
@pytest.mark.parametrize("more", [(1, 1, 0, 0), (3, 17, 5, 40), (2, 2, 1, 0), (0, 0, 4, 9), (5, 100, 0, 1)])
def test_added_rows_change_nothing(options: dict[str, object], more: tuple[int, int, int, int]) -> None:
    potential = make_potential(**options)
    for batch in structures():
        inputs = inputs_of(potential, *batch)
        own = Sizes.of(inputs)
        sizes = Sizes(*(mine + added for mine, added in zip(dataclasses.astuple(own), more, strict=True)))
        padded = pad(inputs, sizes)
        assert Sizes.of(padded) == sizes
        tokens = torch.arange(sizes.tokens)
        reverse = padded.layout.reverse
        assert torch.equal(reverse[reverse], tokens)
        assert torch.equal(padded.layout.offsets[:-1], padded.layout.self_token)
        assert padded.layout.offsets[-1] == sizes.tokens
        centers = torch.repeat_interleave(torch.arange(sizes.atoms), padded.layout.offsets.diff())
        assert torch.equal(centers, padded.layout.token_center)

        (right, right_gradient) = unpad(run(potential, inputs.flat()), own, own, potential.config)
        (found, gradient) = unpad(run(potential, padded.flat()), sizes, own, potential.config)
        for x, y in ((found.energy, right.energy), (found.forces, right.forces), (gradient, right_gradient)):
            assert (x is None) == (y is None)
            if x is not None and y is not None:
                torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12)


@given(st.integers(1, 3000), st.integers(0, 60_000), st.integers(0, 50_000), st.integers(0, 10**6))
def test_a_capacity_holds_its_sizes_and_is_not_much_larger(atoms: int, tokens: int, extra: int, pairs: int) -> None:
    own = Sizes(atoms, atoms + tokens, extra, pairs)
    capacity = own.capacity()
    assert capacity.hold(own)
    assert capacity.hold(capacity)
    assert capacity.tokens <= 1.12 * own.tokens + 8
    assert not own.hold(capacity)


def record(function: Callable[[list[Tensor]], list[Tensor]], inputs: list[Tensor]):  # type: ignore[no-untyped-def]
    """As CUDA does: results stand where the recording put them."""
    results = [torch.full_like(x, torch.nan) for x in function(inputs)]

    def replay() -> None:
        for result, value in zip(results, function(inputs), strict=True):
            result.copy_(value)

    return replay, results


def make_recorded(potential: Potential) -> RecordedEvaluation:
    settings, model = potential.config.graph, potential.model
    example = compile_example(settings, potential.dtype, potential.device)
    compiled = CompiledEvaluation(model, example, potential.config.is_conservative, False, backend="eager")
    return RecordedEvaluation(compiled, record)


def assert_evaluates(recorded: RecordedEvaluation, potential: Potential, inputs: EvaluationInputs) -> list[Tensor]:
    has_forces = not potential.config.is_conservative
    own = Sizes.of(inputs)
    expected = unpad(run(potential, inputs.flat()), own, own, potential.config)
    found = recorded(potential.model, inputs)
    torch.testing.assert_close(found[0].energy, expected[0].energy, rtol=1e-10, atol=1e-12)
    if has_forces:
        torch.testing.assert_close(found[0].forces, expected[0].forces, rtol=1e-10, atol=1e-12)
    else:
        torch.testing.assert_close(found[1], expected[1], rtol=1e-10, atol=1e-12)
    return [x for x in (found[0].energy, found[0].forces, found[1]) if x is not None]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("forces", ["conservative", "direct"])
def test_one_recording_serves_a_simulation(forces: str) -> None:
    potential = make_potential(forces=forces)
    recorded = make_recorded(potential)
    sizes, kept = set(), []
    for seed in range(12):
        inputs = inputs_of(potential, crystal(seed, 32))
        sizes.add(Sizes.of(inputs))
        found = assert_evaluates(recorded, potential, inputs)
        kept.append((found, [x.clone() for x in found]))
    assert len(sizes) > 6
    assert recorded.num_recordings <= 2
    for found, copies in kept:  # no later replay wrote into what was returned
        for x, y in zip(found, copies, strict=True):
            assert torch.equal(x, y)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_recordings_follow_weights_and_sizes() -> None:
    potential = make_potential()
    recorded = make_recorded(potential)
    small, large = inputs_of(potential, crystal(0, 8)), inputs_of(potential, crystal(0, 64))
    for inputs in (small, large, small, large):
        assert_evaluates(recorded, potential, inputs)
    assert recorded.num_recordings == 2  # a small structure is not evaluated in the recording of a large one
    for weight in potential.parameters():
        weight.mul_(1.05)
    assert_evaluates(recorded, potential, small)
    assert recorded.num_recordings == 3
    for atoms in (4, 12, 20, 28, 36, 44):
        assert_evaluates(recorded, potential, inputs_of(potential, crystal(0, atoms)))
    assert len(recorded._recordings) == 4


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("options", [{}, {"forces": "direct"}], ids=["conservative", "direct"])
def test_nothing_in_what_is_recorded_waits_for_a_device(options: dict[str, object]) -> None:
    potential = make_potential(**options)
    graph = make_recorded(potential)._evaluation.graph_module.graph
    names = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    assert len(names) > 100
    assert [name for name in names if WAITING & set(name.split("."))] == []


def test_cuda_graphs_want_cuda_and_compiled_code() -> None:
    potential = make_potential()
    with pytest.raises(ConfigError, match="the potential is on cpu"):
        potential.compile(cuda_graphs=True)
    with pytest.raises(ConfigError, match="set compile=True"):
        EScAIPCalculator(potential, cuda_graphs=True)
