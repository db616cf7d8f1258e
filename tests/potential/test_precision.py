"""Lower precision rounds products of tokens and nothing else, and settings around an evaluation are restored."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ase.build
import pytest
import tiny
import torch
from tiny import TABLE, batch_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch_geometric.data import Batch

from escaip import EScAIPCalculator, EScAIPConfig, Potential, load_potential
from escaip.cli import parser_of
from escaip.errors import ConfigError
from escaip.graph import build_graph
from escaip.potential.compile import CompiledEvaluator
from escaip.potential.precision import PRECISIONS, in_precision

HALF = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def make_potential(**overrides: Any) -> Potential:
    return tiny.make_potential(**{"dtype": torch.float32, "num_layers": 2, **TABLE, **overrides})


def make_batch() -> Batch:
    structures = [ase.build.bulk("Cu", cubic=True).repeat((2, 1, 1)), ase.build.molecule("CH3CH2OH")]
    for atoms in structures:
        atoms.rattle(0.1, seed=0)
    return batch_of(*structures)


def relative(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm())


def flat(tensors: Sequence[Tensor | None]) -> Tensor:
    return torch.cat([x.flatten().double() for x in tensors if x is not None])


class Products(TorchDispatchMode):
    """Shapes of the matrix products made, by dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: dict[torch.dtype, list[tuple[int, ...]]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default):
            left, right = args[-2:]
            self.shapes.setdefault(left.dtype, []).append((*left.shape, *right.shape))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", [{"forces": "direct"}, {"aggregation": "graph_attention"}])
def test_products_of_tokens_alone_are_rounded(options: dict[str, Any]) -> None:
    """In the value, in its derivative, and in the derivative of that."""
    potential, batch = make_potential(**options).train(), make_batch()
    num_tokens = build_graph(batch, potential.config.graph).num_tokens
    with Products() as products:
        with torch.autocast("cpu", torch.bfloat16):
            prediction = potential(batch)
        (prediction.energy.sum() + prediction.forces.square().sum()).backward()
    exact, rounded = products.shapes[torch.float32], products.shapes[torch.bfloat16]
    assert all(num_tokens in shape for shape in rounded)
    assert not any(num_tokens in shape for shape in exact)
    assert len(exact) > 20
    assert len(rounded) > 20


@pytest.mark.parametrize("forces", ["conservative", "direct"])
@pytest.mark.parametrize("table", ["always", "never"])
def test_errors_of_a_preset(forces: str, table: str) -> None:
    """Eleven bits and eight bits of each product; energies against their spread, small by chance with seed 0."""
    torch.manual_seed(1)
    potential = Potential(EScAIPConfig.preset("1m", forces=forces, num_layers=2, distance_table=table)).eval()
    batch = make_batch()
    exact = copy.deepcopy(potential).double()(batch)
    spread = (exact.atomic_energies - exact.atomic_energies.mean()).norm()
    for name, energy_bound, force_bound in (("float16", 0.004, 0.004), ("bfloat16", 0.025, 0.025)):
        potential.precision = name
        found = potential(batch)
        assert found.energy.dtype == torch.float64
        assert found.forces.dtype == torch.float32
        assert 1e-4 < relative(found.forces, exact.forces) < force_bound
        assert (found.atomic_energies - exact.atomic_energies).norm() < energy_bound * spread


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
@pytest.mark.parametrize(
    "options",
    [
        {}, {"forces": "direct"}, {"norm": "layernorm"}, {"message_gate": True, "charge": True, "spin": True},
        {"aggregation": "graph_attention"}, {"attention_backend": "blocked"}, {"attention_backend": "dense"},
        {"distance_table": "never"},
    ],
)  # fmt: skip
def test_training_under_autocast(kind: str, options: dict[str, Any]) -> None:
    """Gradients of a loss on energies and forces for all weights, scaled as a gradient scaler would."""
    potential, batch = make_potential(**options).train(), make_batch()

    def gradient(potential: Potential) -> Tensor:
        prediction = potential(batch)
        loss = prediction.atomic_energies.mean().square() + (prediction.forces - 1.0).square().mean()
        weights = list(potential.parameters())
        return flat(torch.autograd.grad(2.0**12 * loss, weights, allow_unused=True))

    expected = gradient(copy.deepcopy(potential).double())
    for recompute in (None, True):
        potential.recompute = recompute
        with torch.autocast("cpu", HALF[kind]):
            found = gradient(potential)
        assert relative(found, expected) < (0.01 if kind == "float16" else 0.04)


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_the_option_is_autocast_around_the_evaluation(kind: str) -> None:
    potential, batch = make_potential(), make_batch()
    highest = potential(batch).forces
    with torch.autocast("cpu", HALF[kind]):
        expected = potential(batch).forces
        assert torch.is_autocast_enabled("cpu")
    assert not torch.equal(expected, highest)
    potential.precision = kind
    assert torch.equal(potential(batch).forces, expected)
    assert not torch.is_autocast_enabled("cpu")
    # Tables kept from a rounded evaluation are those of any other.
    potential.precision = "highest"
    assert torch.equal(potential(batch).forces, highest)


def test_float64_is_left_alone() -> None:
    potential, batch = make_potential().double(), make_batch()
    expected = potential(batch).forces
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(potential(batch).forces, expected)


@pytest.mark.slow
def test_compiled_evaluations_are_kept_by_precision() -> None:
    """The casts are in the graph, and torch's autocast is off wherever the compiler looks.

    Rounding to bfloat16 moves forces by a hundredth. Kernels and compiled norms differ in the last bit of float32,
    which a few of these roundings see.
    """
    eager, batch = make_potential(num_layers=1).requires_grad_(False), make_batch()
    compiled = copy.deepcopy(eager)
    compiled.evaluator = CompiledEvaluator(backend="eager")
    for kind, tolerance in (("highest", 1e-6), ("bfloat16", 5e-4)):
        eager.precision = compiled.precision = kind
        expected = eager(batch).forces
        assert relative(compiled(batch).forces, expected) < tolerance
    compiled.precision = "highest"
    with torch.autocast("cpu", torch.bfloat16):
        assert relative(compiled(batch).forces, expected) < tolerance
    assert len(compiled.evaluator.codes) == 2


def flags() -> tuple[Any, ...]:
    matmul = torch.backends.cuda.matmul
    return matmul.fp32_precision, matmul.allow_tf32, torch.get_float32_matmul_precision()


@pytest.mark.parametrize("before", ["none", "ieee", "tf32"])
def test_tf32_is_set_within_and_restored(before: str) -> None:
    """The flags exist without a GPU."""
    matmul, device = torch.backends.cuda.matmul, torch.device("cpu")
    original = matmul.fp32_precision
    try:
        matmul.allow_tf32 = before == "tf32"
        matmul.fp32_precision = before
        state = flags()
        with in_precision("tf32", device):
            assert flags()[:2] == ("tf32", True)
        assert flags() == state
        with pytest.raises(ZeroDivisionError), in_precision("tf32", device):
            raise ZeroDivisionError
        assert flags() == state
    finally:
        matmul.allow_tf32 = False
        matmul.fp32_precision = original


def test_where_a_precision_is_given(tmp_path: Path) -> None:
    path = tmp_path / "model.escaip"
    make_potential().save(path)
    assert load_potential(path, device="cpu").precision == "highest"
    loaded = load_potential(path, device="cpu", precision="bfloat16")
    assert loaded.precision == copy.deepcopy(loaded).precision == "bfloat16"
    assert EScAIPCalculator(loaded).potential.precision == "bfloat16"
    assert EScAIPCalculator(loaded, precision="highest").potential.precision == "highest"
    assert EScAIPCalculator(path, device="cpu", precision="float16").potential.precision == "float16"
    for name in PRECISIONS:
        assert parser_of("relax").parse_args(["m", "s", "--precision", name]).precision == name


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("precision", "dtype", "message"),
    [
        ("half", None, "precision 'half' does not exist: choose highest"),
        ("tf32", None, "'tf32' exists on CUDA devices, and the model is on cpu"),
        ("bfloat16", "float64", "'bfloat16' is for float32 models, and this one is float64"),
        ("highest", "bfloat16", "dtype 'bfloat16' is not supported: .* with precision bfloat16"),
        ("highest", torch.float16, "dtype 'float16' is not supported"),
    ],
)
def test_precisions_that_cannot_be(precision: str, dtype: Any, message: str, tmp_path: Path) -> None:
    potential = make_potential()
    potential.save(tmp_path / "model.escaip")
    with pytest.raises(ConfigError, match=message):
        load_potential(tmp_path / "model.escaip", device="cpu", dtype=dtype, precision=precision)
    with pytest.raises(ConfigError, match=message):
        EScAIPCalculator(potential, dtype=dtype, precision=precision)


@pytest.mark.bad_input
def test_precisions_are_checked_at_every_evaluation() -> None:
    potential = make_potential()
    potential.precision = "tf32"
    with pytest.raises(ConfigError, match="'tf32' exists on CUDA"):
        potential(make_batch())
    with pytest.raises(ConfigError, match="weights in bfloat16"):
        make_potential().bfloat16()(make_batch())
