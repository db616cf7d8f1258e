"""Compiled energy and forces: eager answers from one graph for all sizes, padded evaluations, kept code."""

from __future__ import annotations

import copy
import dataclasses
import os
import pickle
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ase.build
import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import TABLE, batch_of, odd_structures, rattled
from torch import Tensor
from torch_geometric.data import Batch

from escaip import EScAIPCalculator, Potential
from escaip.errors import ConfigError
from escaip.graph import build_graph, displacements
from escaip.nn.embedding import kept_tables
from escaip.potential import compile
from escaip.potential.compile import CompiledEvaluator, JitCode, compile_example, flat_evaluation, trace
from escaip.potential.derivatives import EvaluationInputs
from escaip.potential.padding import Sizes, pad, unpad
from escaip.train.init_from import freeze
from escaip.types import AtomInputs


def make_frozen(**overrides: object) -> Potential:
    return tiny.make_potential(num_layers=2, **TABLE, **overrides).requires_grad_(False)


def inputs_of(potential: Potential, *padded_structures: ase.Atoms) -> EvaluationInputs:
    batch = batch_of(*padded_structures)
    graph = build_graph(batch, potential.config.graph)
    vectors = displacements(batch.positions, batch.cell, batch.batch, graph)
    return EvaluationInputs(
        vectors, torch.ones(len(batch.positions), dtype=torch.float64), AtomInputs.of_batch(batch), graph
    )


def crystal(seed: int, atoms: int = 8) -> ase.Atoms:
    made = ase.build.bulk("Cu", cubic=True).repeat((atoms // 4, 1, 1))
    made.rattle(0.1, seed=seed)
    return made


def padded_structures() -> list[list[ase.Atoms]]:
    ethanol = ase.build.molecule("CH3CH2OH")
    return [[ase.Atoms("Cu")], [ase.build.molecule("H2O")], [crystal(0), ethanol], [ethanol]]


def run_flat(potential: Potential, tensors: list[Tensor]) -> list[Tensor]:
    model = potential.model
    return flat_evaluation(model, kept_tables(model), tensors, potential.config.is_conservative, False)


@pytest.mark.parametrize("options", [{"num_energy_heads": 2}, {"forces": "direct"}, {"num_neighbors": None},
                                     {"charge": True}], ids=["heads", "direct", "radius", "charge"])  # fmt: skip
@pytest.mark.parametrize("more", [(1, 1, 0, 0), (3, 17, 5, 40), (2, 2, 1, 0), (0, 0, 4, 9), (5, 100, 0, 1)])
def test_added_rows_change_nothing(options: dict[str, object], more: tuple[int, int, int, int]) -> None:
    potential = make_frozen(**options)
    for batch in padded_structures():
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

        (right, right_gradient) = unpad(run_flat(potential, inputs.flat()), own, own, potential.config)
        (found, gradient) = unpad(run_flat(potential, padded.flat()), sizes, own, potential.config)
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


# Operations for which a host waits for its device: sizes or values that the host reads depend on values.
WAITING = {"nonzero", "_local_scalar_dense", "item", "masked_select", "unique",
           "repeat_interleave", "bincount", "equal"}  # fmt: skip

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute of a Tensor that is")


def batches() -> list[Batch]:
    """No two of one size, with the sizes that a compiler would specialise."""
    made = [[atoms] for atoms in odd_structures()]
    for seed in range(5):
        crystal = ase.build.bulk("Cu", cubic=True).repeat((1 + seed % 3, 1, 1))
        waters = [ase.build.molecule("H2O") for _ in range(1 + seed)]
        made.append(rattled(crystal, ase.build.molecule("CH3CH2OH"), *waters))
    found = [batch_of(*structures) for structures in made]
    for batch in found:
        batch.dataset = torch.arange(batch.num_graphs) % 2  # for models with a head for each
    return found


def make_potential(backend: str = "", **overrides: object) -> Potential:
    """A potential, compiled by a backend; "eager" traces, where mistakes are made, and is fifty times as fast."""
    potential = tiny.make_potential(**{"num_layers": 2, **TABLE, **overrides})
    if backend:
        potential.evaluator = CompiledEvaluator(backend=backend)
    return potential


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
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
        learning = [weight for weight in potential.parameters() if weight.requires_grad]
        gradients = torch.autograd.grad(loss, learning, allow_unused=True)
        found += [torch.zeros(()) if g is None else g for g in gradients]
    return [x.detach() for x in found]


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-11)


def scale_weights(potential: Potential, in_place: bool) -> None:
    """Changes every weight, in place or by new tensors."""
    with torch.no_grad():
        for index, weight in enumerate(potential.parameters()):
            if in_place:
                weight.add_(0.1).mul_(1.1)
            else:
                weight.data = weight.detach() * (1.0 + 0.01 * index)


OPTIONS = [
    {},
    {"forces": "direct", "angular_values": True, "num_layers": 1, "num_energy_heads": 2},
    {"num_energy_heads": 2, "num_layers": 1},
    {"node_density": 3, "num_layers": 1},
    {"distance_table": "inference", "charge": True, "num_layers": 1},
    {"aggregation": "graph_attention", "boo_weighting": "uniform", "angular_values": True, "num_layers": 1},
    {"num_neighbors": None, "message_gate": True, "density_radial": 4, "num_layers": 1},
]


@pytest.mark.parametrize(("options", "training"), [({}, False), *((each, True) for each in OPTIONS)])
def test_traced_graphs_give_eager_answers_for_every_size(options: dict[str, object], training: bool) -> None:
    eager, compiled = (make_potential(backend, **options).train(training) for backend in ("", "eager"))
    for batch in batches():
        assert_equal(answers(compiled, batch), answers(eager, batch))
    assert num_graphs() == 1


def test_traced_graphs_train_beside_frozen_parts() -> None:
    """Tables of frozen weights are inputs, and follow them."""
    eager, compiled = (make_potential(backend).train() for backend in ("", "eager"))
    for potential in (eager, compiled):
        freeze(potential.model, ["embedding", "blocks.1"])
    for _ in range(2):
        for batch in batches()[4:6]:
            assert_equal(answers(compiled, batch), answers(eager, batch))
        for potential in (eager, compiled):
            scale_weights(potential, in_place=True)
    assert num_graphs() == 1


@pytest.fixture
def empty_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Returns the folder that keeps code compiled ahead of time; skips where there is none."""
    if not compile.compiles_ahead(torch.device("cpu")):
        pytest.skip("this PyTorch, or this machine, compiles nothing ahead of time")
    monkeypatch.setenv("ESCAIP_CACHE", str(tmp_path))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    return tmp_path / "compiled"


@pytest.mark.slow
def test_code_compiled_ahead_gives_eager_answers_and_is_kept(
    empty_cache: Path, compile_once: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On one thread as all tests here, where Inductor's own sums over repeated indices are wrong (ops/rows.py)."""
    made: list[Path] = []
    monkeypatch.setattr(compile, "compile_ahead", lambda *given: (made.append(given[-1]), compile_once(*given))[1])
    eager = make_potential(num_layers=1).eval()
    compiled, batch = copy.deepcopy(eager), batches()[6]
    compiled.compile()
    for each in batches():
        assert_equal(answers(compiled, each), answers(eager, each))
    (file,) = empty_cache.iterdir()
    whole, written = file.read_bytes(), file.stat().st_ino

    for in_place in (True, False):  # biases begin as zeros, which a compiler may take for constants
        for potential in (compiled, eager):
            scale_weights(potential, in_place)
        assert_equal(answers(compiled, batch), answers(eager, batch))

    expected = answers(make_potential(num_layers=1).eval(), batch)

    def first_answers() -> None:
        """Of a potential that has the weights of the first one, and no code yet."""
        fresh = make_potential(num_layers=1).eval()
        fresh.compile()
        assert_equal(answers(fresh, batch), expected)

    first_answers()
    assert [path.stat().st_ino for path in empty_cache.iterdir()] == [written]
    assert len(made) == 1
    file.write_bytes(whole[:-100])  # a full disk
    first_answers()
    assert len(made) == 2
    assert [path.stat().st_size for path in empty_cache.iterdir()] == [len(whole)]
    with monkeypatch.context() as patch:  # the kept code gives other answers than the weights
        patch.setattr(compile.AotCode, "check", lambda *_: (_ for _ in ()).throw(compile.CheckpointError("other")))
        first_answers()
    assert len(made) == 3
    monkeypatch.setattr(compile.AotCode, "__init__", lambda *_: pytest.fail("code was run"))
    file.chmod(0o666)
    with pytest.raises(ConfigError, match="can be written by other users"):
        first_answers()


@pytest.mark.parametrize("place", [".", "compiled", "inductor"])
def test_code_that_others_may_have_written_is_not_loaded(place: str, empty_cache: Path) -> None:
    folder = empty_cache.parent / place
    folder.mkdir(exist_ok=True)
    folder.chmod(0o777)
    potential = make_potential().eval()
    potential.compile()
    with pytest.raises(ConfigError, match="can be written by other users"):
        answers(potential, batches()[5])
    assert stat.S_IMODE(folder.stat().st_mode) == 0o777
    assert not list(empty_cache.glob("*.pt2"))


@pytest.mark.parametrize("chosen", [None, "mine"])
def test_generated_code_goes_to_a_private_folder(chosen: str | None, tmp_path: Path) -> None:
    """In the user's cache, and not under a name in the folder of temporary files that others can take first."""
    program = (
        "from escaip.potential.compile import use_private_folder\nuse_private_folder()\n"
        "from torch._inductor.runtime.cache_dir_utils import cache_dir\nprint(cache_dir())"
    )
    environment = {**os.environ, "ESCAIP_CACHE": str(tmp_path / "cache"), "TMPDIR": str(tmp_path)}
    environment.pop("TORCHINDUCTOR_CACHE_DIR", None)
    if chosen is not None:
        environment["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path / chosen)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = Path(done.stdout.strip())
    assert found == tmp_path / (chosen or "cache/inductor")
    assert chosen or stat.S_IMODE(found.stat().st_mode) == 0o700


@pytest.mark.parametrize(("training", "in_place"), [(False, True), (True, False)])
def test_compiled_code_follows_the_weights(training: bool, in_place: bool) -> None:
    potential, batch = make_potential("eager", num_layers=1).train(training), batches()[5]
    before = answers(potential, batch)
    scale_weights(potential, in_place)
    eager = make_potential(num_layers=1).train(training)
    eager.load_state_dict(potential.state_dict())
    found = answers(potential, batch)
    assert_equal(found, answers(eager, batch))
    assert (found[0] - before[0]).abs().max() > 1e-6
    assert not in_place or num_graphs() == 1


def test_another_precision_is_compiled_anew_and_copies_compile_their_own() -> None:
    potential, batch = make_potential("eager", forces="direct", num_layers=1).eval(), batches()[5]
    expected = answers(potential, batch)
    other = pickle.loads(pickle.dumps(potential))  # as deepcopy, through __reduce__
    assert_equal(answers(other, batch), expected)
    assert other.evaluator.codes.keys() == potential.evaluator.codes.keys()
    single = answers(potential.float(), batch)
    assert single[1].dtype == torch.float32
    torch.testing.assert_close(single[1].double(), expected[1], rtol=1e-3, atol=1e-5)


def test_the_calculator_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CompiledEvaluator.__init__, "__defaults__", (False, "eager"))
    results = []
    for is_compiled in (True, False):
        atoms = ase.build.bulk("Cu", cubic=True)
        atoms.rattle(0.05, seed=0)
        atoms.calc = EScAIPCalculator(make_potential(num_layers=1), compile=is_compiled)
        results.append([atoms.get_potential_energy(), atoms.get_forces(), atoms.get_stress()])
        assert num_graphs() == 1
    for found, expected in zip(*results, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-11)


def test_positions_that_require_gradients_are_evaluated_without_compiling() -> None:
    potential, batch = make_potential("eager").eval(), batches()[3]
    batch.positions.requires_grad_()
    forces = potential(batch, create_graph=True).forces
    (row,) = torch.autograd.grad(forces[0, 0], batch.positions)
    assert row.abs().max() > 0
    assert num_graphs() == 0


@pytest.mark.parametrize("forces", ["conservative", "direct"])
def test_a_traced_graph_can_be_recorded_in_a_cuda_graph(forces: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It holds weights alone, since any other constant is a copy from the host, and waits for nothing."""
    monkeypatch.setattr("escaip.ops.harmonics.has_kernels", lambda: False)  # as on CUDA
    potential = make_potential(forces=forces, num_layers=1, distance_table="never").eval().requires_grad_(False)
    model = potential.model

    def function(*tensors: Tensor) -> list[Tensor]:
        return flat_evaluation(model, [], tensors, forces == "conservative", False)

    graph = trace(function, compile_example(potential.config.graph, potential.dtype, potential.device).flat(), False)
    weights = {id(x) for x in (*model.parameters(), *model.buffers())}
    held = [getattr(graph, node.target) for node in graph.graph.find_nodes(op="get_attr")]
    assert held
    assert all(id(x) in weights for x in held)
    names = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert len(names) > 100
    assert [name for name in names if WAITING & set(name.split("."))] == []


@pytest.mark.parametrize("forces", ["conservative", "direct"])
def test_cuda_graphs_rarely_meet_a_new_size(forces: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch records a graph for each size, and overwrites results at the next launch; both are played here."""
    eager = make_potential(forces=forces, num_layers=1).eval().requires_grad_(False)
    compiled, sizes, launched = copy.deepcopy(eager), set(), []
    compiled.evaluator = CompiledEvaluator(cuda_graphs=True, backend="eager")
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: [x.fill_(torch.nan) for x in launched])
    original, returned = JitCode._run, []

    def run(self: JitCode, tables: list[Tensor], tensors: list[Tensor]) -> list[Tensor]:
        results = original(self, tables, tensors)
        sizes.add((len(tensors[0]), len(tensors[1]), len(tensors[-1])))
        launched[:] = results
        return results

    monkeypatch.setattr(JitCode, "_run", run)
    call = JitCode.__call__
    monkeypatch.setattr(JitCode, "__call__", lambda *arguments: returned.append(call(*arguments)) or returned[-1])
    made, found = [], []
    with torch.no_grad():
        for seed in range(12):
            crystal = ase.build.bulk("Cu", cubic=True).repeat((8, 1, 1))
            crystal.rattle(0.1, seed=seed)
            made.append(batch_of(crystal))
            found.append(answers(compiled, made[-1]))
        assert len({eager.graph_of(batch).num_tokens for batch in made}) > 6
        assert len(sizes) <= 3  # that of the compiler's example is one of them
        answers(compiled, batches()[3])
    for batch, result, (output, _) in zip(made, found, returned, strict=False):
        assert_equal(result, answers(eager, batch))
        assert bool(output.energy.isfinite().all())
    assert len(sizes) <= 4
    assert min(num_atoms for _, num_atoms, _ in sizes) < 13  # small structures are not padded to the size of large ones


def test_cuda_graphs_want_cuda_and_compiled_code() -> None:
    with pytest.raises(ConfigError, match="the potential is on cpu"):
        make_potential().compile(cuda_graphs=True)
    with pytest.raises(ConfigError, match="set compile=True"):
        EScAIPCalculator(make_potential(), cuda_graphs=True)
