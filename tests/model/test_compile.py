"""Compiled energy and forces: eager's answers from one graph for all sizes, in prediction and training."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import ase.build
import numpy as np
import pytest
import torch
from torch import Tensor
from torch_geometric.data import Batch

import escaip.potential.potential
from escaip import EScAIPCalculator, EScAIPConfig, Potential
from escaip.data import AtomicData, collate
from escaip.models import EScAIP
from escaip.potential import ahead
from escaip.potential.compile import CompiledEvaluation, compile_example, flat_evaluation, trace

TINY = {
    "hidden_size": 16, "num_layers": 2, "num_heads": 2, "angular_channels": [3, 3, 2], "num_radial": 8,
    "radial_width": 1.0, "distance_size": 8, "element_size": 4, "boo_size": 4, "boo_degrees": 3, "num_neighbors": 6,
    "distance_table": "always", "distance_knots": 16,
}  # fmt: skip

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute of a Tensor that is")


def batches() -> list[Batch]:
    """No two of one size; what a compiler would take for a special case is among them."""
    lonely = [ase.Atoms("Cu")]
    apart = [ase.Atoms("CuH", positions=[[0, 0, 0], [0, 0, 50.0]])]
    pair = [ase.Atoms("H2", positions=[[0, 0, 0], [0, 0, 0.8]])]
    made = [lonely, apart, pair, [ase.build.molecule("CH3CH2OH")], [ase.build.bulk("Cu")]]
    for seed in range(5):
        crystal = ase.build.bulk("Cu", cubic=True).repeat((1 + seed % 3, 1, 1))
        made.append([crystal, ase.build.molecule("CH3CH2OH"), *[ase.build.molecule("H2O")] * (1 + seed)])
    for structures in made:
        for index, atoms in enumerate(structures):
            atoms.rattle(0.05, seed=index)
    return [collate([AtomicData.from_ase(atoms) for atoms in structures]) for structures in made]


def make_potential(**overrides: object) -> Potential:
    torch.manual_seed(0)
    potential = Potential(EScAIPConfig.from_dict({**TINY, **overrides})).double()
    with torch.no_grad():
        potential.scale.fill_(3.0)
    return potential


@pytest.fixture
def use_backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Compiles by another backend: tracing, where mistakes are made, is the same and fifty times as fast."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(escaip.potential.potential, "serves", lambda _: False)  # nothing ahead of time
    yield lambda name: monkeypatch.setattr(
        escaip.potential.potential, "CompiledEvaluation", partial(CompiledEvaluation, backend=name)
    )
    torch._dynamo.reset()


def num_graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def answers(potential: Potential, batch: Batch) -> list[Tensor]:
    """Energy, forces and stress; in training the gradients of a loss on them."""
    conservative = potential.config.is_conservative
    prediction = potential(batch, compute_stress=conservative)
    found = [prediction.energy, prediction.forces]
    if conservative:
        found.append(prediction.stress.nan_to_num(0.0))
    if potential.training:
        loss = sum(x.square().sum() for x in found)
        gradients = torch.autograd.grad(loss, list(potential.parameters()), allow_unused=True)
        found += [torch.zeros(()) if g is None else g for g in gradients]
    return [x.detach() for x in found]


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-11)


OPTIONS = [
    {},
    {"forces": "direct"},
    {"distance_table": "inference", "charge": True},
    {"aggregation": "graph_attention", "boo_weighting": "uniform"},
    {"num_neighbors": None, "message_gate": True},
]


@pytest.mark.parametrize("training", [False, True], ids=["prediction", "training"])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: ",".join(map(str, o.values())) or "default")
def test_traced_graphs_give_eager_answers_for_every_size(
    options: dict[str, object], training: bool, use_backend: Callable[[str], None]
) -> None:
    use_backend("eager")
    eager = make_potential(**options).train(training)
    compiled = copy.deepcopy(eager)
    compiled.compile()
    for batch in batches():
        assert_equal(answers(compiled, batch), answers(eager, batch))
    assert num_graphs() == 1


@pytest.mark.slow
def test_inductor_gives_eager_answers_in_the_process(use_backend: Callable[[str], None]) -> None:
    """As where nothing is compiled ahead of time; on one thread, as below."""
    use_backend("inductor")
    eager = make_potential(num_layers=1).eval()
    compiled = copy.deepcopy(eager)
    compiled.compile()
    assert len(batches()) == 10
    for batch in batches():
        assert_equal(answers(compiled, batch), answers(eager, batch))
    assert 1 <= num_graphs() <= 2  # Inductor compares sizes with widths of this tiny model


@pytest.fixture
def empty_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(ahead, "cache_folder", lambda _: tmp_path)
    return tmp_path


@pytest.mark.slow
def test_code_compiled_ahead_gives_eager_answers_and_is_kept(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On one thread as all tests here run, where Inductor's own sums over repeated indices are wrong (ops/rows.py)."""
    if not ahead.serves(torch.device("cpu")):
        pytest.skip("this torch, or this machine, compiles nothing ahead of time")
    eager = make_potential(num_layers=1).eval()
    compiled = copy.deepcopy(eager)
    compiled.compile()
    for batch in batches():
        assert_equal(answers(compiled, batch), answers(eager, batch))
    (file,) = empty_cache.iterdir()
    written = file.stat().st_ino

    for potential in (compiled, eager):  # biases begin as zeros, which a compiler may take for constants
        with torch.no_grad():
            for weight in potential.parameters():
                weight.add_(0.1)
    assert_equal(answers(compiled, batches()[6]), answers(eager, batches()[6]))
    for potential in (compiled, eager):
        for index, weight in enumerate(potential.parameters()):  # other tensors
            weight.data = weight.detach() * (1.0 + 0.01 * index)
    assert_equal(answers(compiled, batches()[6]), answers(eager, batches()[6]))

    other = make_potential(num_layers=1).eval()
    other.compile()
    assert_equal(answers(other, batches()[6]), answers(make_potential(num_layers=1).eval(), batches()[6]))
    assert [path.stat().st_ino for path in empty_cache.iterdir()] == [written]

    whole, constants, made = file.read_bytes(), next(iter(other._compiled.values()))._constants, []

    def write(model: EScAIP, differentiate: bool, path: Path) -> dict[str, str]:
        made.append(path)
        path.write_bytes(whole)
        return constants

    monkeypatch.setattr(ahead, "_write", write)
    file.write_bytes(whole[:-100])  # a full disk
    other._compiled.clear()
    assert_equal(answers(other, batches()[6]), answers(make_potential(num_layers=1).eval(), batches()[6]))
    assert len(made) == 1
    assert [path.read_bytes() for path in empty_cache.iterdir()] == [whole]
    monkeypatch.setattr(ahead, "_tolerance", lambda *_: -1.0)  # what is kept gives other answers than the weights
    other._compiled.clear()
    answers(other, batches()[6])
    assert len(made) == 2


@pytest.mark.parametrize("training", [False, True], ids=["prediction", "training"])
def test_compiled_code_follows_the_weights(training: bool, use_backend: Callable[[str], None]) -> None:
    use_backend("eager")
    potential, batch = make_potential().train(training), batches()[5]
    potential.compile()
    before = answers(potential, batch)
    with torch.no_grad():
        for weight in potential.parameters():
            weight.mul_(1.1)
    eager = make_potential().train(training)
    eager.load_state_dict(potential.state_dict())
    found = answers(potential, batch)
    assert_equal(found, answers(eager, batch))
    assert (found[0] - before[0]).abs().max() > 1e-6
    assert num_graphs() == 1


def test_another_precision_is_compiled_anew_and_copies_compile_their_own(use_backend: Callable[[str], None]) -> None:
    use_backend("eager")
    potential, batch = make_potential().eval(), batches()[5]
    potential.compile()
    expected = answers(potential, batch)
    for other in (copy.deepcopy(potential), pickle.loads(pickle.dumps(potential))):
        assert_equal(answers(other, batch), expected)
    single = answers(potential.float(), batch)
    assert single[1].dtype == torch.float32
    torch.testing.assert_close(single[1].double(), expected[1], rtol=1e-3, atol=1e-5)


def test_other_weights_are_taken(use_backend: Callable[[str], None]) -> None:
    use_backend("eager")
    potential, batch = make_potential().eval(), batches()[5]
    potential.compile()
    answers(potential, batch)
    torch.manual_seed(1)
    other = Potential(potential.config).double().eval()
    potential.load_state_dict(other.state_dict())
    assert_equal(answers(potential, batch), answers(other, batch))
    for weight in potential.parameters():  # new tensors, which compiled code does not know
        weight.data = weight.detach() * 1.1
    with torch.no_grad():
        for weight in other.parameters():
            weight.mul_(1.1)
    assert_equal(answers(potential, batch), answers(other, batch))


def test_the_calculator_compiles(use_backend: Callable[[str], None]) -> None:
    use_backend("eager")
    results = []
    for is_compiled in (True, False):
        atoms = ase.build.bulk("Cu", cubic=True)
        atoms.rattle(0.05, seed=0)
        atoms.calc = EScAIPCalculator(make_potential(), compile=is_compiled)
        results.append([atoms.get_potential_energy(), atoms.get_forces(), atoms.get_stress()])
        assert num_graphs() == 1
    for found, expected in zip(*results, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-11)


def test_positions_that_require_gradients_are_evaluated_without_compiling(use_backend: Callable[[str], None]) -> None:
    use_backend("eager")
    potential, batch = make_potential().eval(), batches()[3]
    potential.compile()
    batch.positions.requires_grad_()
    forces = potential(batch, create_graph=True).forces
    (row,) = torch.autograd.grad(forces[0, 0], batch.positions)
    assert row.abs().max() > 0
    assert num_graphs() == 0


@pytest.mark.parametrize("forces", ["conservative", "direct"])
def test_a_traced_graph_holds_weights_alone(forces: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any other constant is a copy from the host at every call, which a CUDA graph cannot record."""
    monkeypatch.setattr("escaip.graph.features.has_kernels", lambda x: False)  # as on CUDA
    potential = make_potential(forces=forces, num_layers=1, distance_table="never").eval().requires_grad_(False)
    model, settings = potential.model, potential.config.graph
    inputs = compile_example(settings, potential.dtype, potential.device)

    def function(*tensors: Tensor) -> list[Tensor]:
        return flat_evaluation(model, [], tensors, forces == "conservative", False)

    graph = trace(function, inputs.flat(), False)
    weights = {id(x) for x in (*model.parameters(), *model.buffers())}
    held = [getattr(graph, node.target) for node in graph.graph.find_nodes(op="get_attr")]
    assert held
    assert all(id(x) in weights for x in held)
