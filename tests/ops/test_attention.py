"""Attention by every backend: against sums written out, all derivatives, the registered operators, what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from attention_cases import CPU_BACKENDS, LEAVES, derivatives, gradients, make_inputs, relative_errors, written_out
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from escaip.errors import ConfigError
from escaip.ops import backends, blocked, neighborhood_attention, node_attention
from escaip.ops.autograd import OPERATORS
from escaip.ops.inputs import AttentionInputs, Gradients
from escaip.ops.reference import legendre_polynomials

BACKENDS = [info.name for info in CPU_BACKENDS]
ANGULAR_VALUES = [info.name for info in CPU_BACKENDS if info.angular_values]
TWICE = [info.name for info in CPU_BACKENDS if info.derivatives != 1]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("channels", [None, (2, 1, 1, 1, 1), (3, 3), (1, 0, 5)])
def test_equals_written_out_sum(backend: str, channels: tuple[int, ...] | None) -> None:
    inputs = make_inputs([3, 1, 5, 2])
    for angular_values in (False, True) if backend in ANGULAR_VALUES and channels else (False,):
        arguments = {"angular_channels": channels, "scale": 0.7, "angular_values": angular_values}
        found = neighborhood_attention(**inputs, **arguments, backend=backend)
        expected = written_out(inputs, channels, 0.7, angular_values)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_angular_groups_equal_expanded_harmonics(backend: str) -> None:
    """The addition theorem: P_l of the angle equals channels repeated over 2l+1 harmonics."""
    o3 = pytest.importorskip("e3nn.o3")
    channels, scale = (2, 1, 1, 1, 1), 0.4
    inputs = make_inputs([4, 6])
    harmonics = []
    for degree, count in enumerate(channels):
        values = o3.spherical_harmonics(degree, inputs["direction"], normalize=False, normalization="norm")
        harmonics.append(values.repeat(1, count))  # zero for self tokens except l = 0
    expand = [2 * degree + 1 for degree, count in enumerate(channels) for _ in range(count)]
    widths = torch.tensor(expand)
    frequency = torch.cat(harmonics, -1).unsqueeze(1)

    def expanded(x: Tensor) -> Tensor:
        return x.repeat_interleave(widths, -1) * frequency

    flat = {**inputs, "q": expanded(inputs["q"]), "k": expanded(inputs["k"])}
    width = flat["q"].shape[-1]
    padded_v = torch.nn.functional.pad(inputs["v"], (0, width - inputs["v"].shape[-1]))
    expected = neighborhood_attention(
        **{**flat, "v": padded_v}, angular_channels=None, scale=scale, backend="reference"
    )
    found = neighborhood_attention(**inputs, angular_channels=channels, scale=scale, backend=backend)
    torch.testing.assert_close(found, expected[..., : inputs["v"].shape[-1]], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", TWICE)
@pytest.mark.parametrize(("channels", "angular_values"), [(None, False), ((2, 1, 1), False), ((2, 1, 1), True)])
def test_first_and_second_derivatives(backend: str, channels: tuple[int, ...] | None, angular_values: bool) -> None:
    inputs = make_inputs([3, 1, 4], heads=1, width=4)
    has_direction = (inputs["direction"] != 0).any(-1)
    leaves = [inputs[name].requires_grad_() for name in ("q", "k", "v", "log_envelope")]
    raw = inputs["direction"][has_direction].clone().requires_grad_()

    def function(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, directed: Tensor) -> Tensor:
        direction = torch.zeros(len(has_direction), 3, dtype=q.dtype).index_put((has_direction,), directed)
        arguments = (q, k, v, bias, direction, inputs["offsets"], channels, 0.5, backend)
        return neighborhood_attention(*arguments, angular_values=angular_values)

    assert torch.autograd.gradcheck(function, (*leaves, raw))
    assert torch.autograd.gradgradcheck(function, (*leaves, raw))


@pytest.mark.parametrize("backend", TWICE)
def test_removed_keys_have_no_influence_and_no_nan(backend: str) -> None:
    inputs = make_inputs([4, 3])
    inputs["log_envelope"][2] = -math.inf
    leaves = [inputs[name].requires_grad_() for name in ("q", "k", "v", "direction")]
    out = neighborhood_attention(**inputs, angular_channels=(3, 3), scale=0.5, backend=backend)
    first = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
    assert all(torch.isfinite(g).all() for g in (*first, *second))
    assert (first[1][2] == 0).all()
    changed = {**inputs, "k": inputs["k"].detach().clone(), "v": inputs["v"].detach().clone()}
    changed["k"][2] += 5.0
    changed["v"][2] -= 5.0
    again = neighborhood_attention(**changed, angular_channels=(3, 3), scale=0.5, backend=backend)
    keep = [0, 1, 3, 4, 5, 6]
    torch.testing.assert_close(again[keep], out[keep])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("channels", [None, (2, 2, 2)])
def test_self_queries_equal_the_rows_of_all_queries(backend: str, channels: tuple[int, ...] | None) -> None:
    inputs = make_inputs([4, 1, 6])
    rows = inputs["offsets"][:-1]
    some = {**inputs, "q": inputs["q"][rows]}
    for angular_values in (False, channels is not None):  # self tokens have no angles
        arguments = {"angular_channels": channels, "scale": 0.5, "angular_values": angular_values}
        full = neighborhood_attention(**inputs, **arguments, backend="reference")
        found = neighborhood_attention(**some, **arguments, backend=backend, self_queries_only=True)
        torch.testing.assert_close(found, full[rows], rtol=1e-12, atol=1e-12)


def test_order_of_neighbors_does_not_matter() -> None:
    inputs = make_inputs([5])
    order = torch.tensor([0, 3, 1, 4, 2])
    out = neighborhood_attention(**inputs, angular_channels=(2, 2, 2), scale=1.0)
    permuted = {name: value if name == "offsets" else value[order] for name, value in inputs.items()}
    torch.testing.assert_close(neighborhood_attention(**permuted, angular_channels=(2, 2, 2), scale=1.0), out[order])


def test_legendre_values() -> None:
    cosine = torch.linspace(-1, 1, 9, dtype=torch.float64)
    expected = [cosine**0, cosine, (3 * cosine**2 - 1) / 2, (5 * cosine**3 - 3 * cosine) / 2,
                (35 * cosine**4 - 30 * cosine**2 + 3) / 8]  # fmt: skip
    for found, value in zip(legendre_polynomials(cosine, 4), expected, strict=True):
        torch.testing.assert_close(found, value)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend": "flash9"}, "choose auto"),
        ({"angular_channels": (2, 2)}, "sum to the head dimension 6"),
        ({"angular_channels": (1, 1, 1, 1, 1, 1)}, "l goes up to 4"),
        ({"angular_channels": None, "angular_values": True}, "needs angular_channels"),
        ({"backend": "sdpa", "angular_values": True}, "'sdpa' has no angular values: choose auto"),
    ],
)
def test_wrong_requests_are_refused(change: dict[str, object], message: str) -> None:
    arguments = {"angular_channels": (2, 2, 2), "scale": 1.0, **change}
    with pytest.raises(ConfigError, match=message):
        neighborhood_attention(**make_inputs([3, 2]), **arguments)


def softmax_per_system(q: Tensor, k: Tensor, v: Tensor, offsets: list[int], scale: float) -> Tensor:
    parts = []
    for first, last in pairwise(offsets):
        a, b, c = (x[first:last].transpose(0, 1) for x in (q, k, v))
        parts.append((torch.softmax(scale * a @ b.mT, -1) @ c).transpose(0, 1))
    return torch.cat(parts)


def twice(function: Callable[..., Tensor], leaves: list[Tensor], order: int) -> list[Tensor]:
    out = function(*leaves)
    first = gradients(out.square().sum(), leaves, create_graph=order > 1)
    return [out, *first, *(gradients(sum(x.square().sum() for x in first), leaves) if order > 1 else [])]


@pytest.mark.parametrize("info", [info for info in CPU_BACKENDS if info.node_attention], ids=lambda info: info.name)
@pytest.mark.parametrize("sizes", [[5], [1, 7, 3], [4, 0, 2]])
def test_attention_among_all_atoms_equals_softmax_per_system(info: Any, sizes: list[int]) -> None:
    offsets = [0, *torch.tensor(sizes).cumsum(0).tolist()]
    order = 1 if info.derivatives == 1 else 2
    leaves = [torch.randn(offsets[-1], 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    expected = twice(lambda q, k, v: softmax_per_system(q, k, v, offsets, 0.4), leaves, order)
    found = twice(lambda q, k, v: node_attention(q, k, v, torch.tensor(offsets), 0.4, info.name), leaves, order)
    assert max(relative_errors(found, expected)) < 1e-11


def test_no_atoms() -> None:
    nothing = torch.zeros(0, 2, 4)
    assert node_attention(nothing, nothing, nothing, torch.tensor([0, 0]), 1.0).shape == (0, 2, 4)


@pytest.mark.bad_input
def test_a_backend_for_neighborhoods_only_is_refused() -> None:
    x = torch.zeros(2, 1, 4)
    with pytest.raises(ConfigError, match="'native' does no attention among all atoms of a system: choose auto"):
        node_attention(x, x, x, torch.tensor([0, 2]), 1.0, "native")


CHANNELS = (2, 1, 1, 1, 1)
USABLE_FAMILIES = [info.name for info in CPU_BACKENDS if info.name in OPERATORS]


def call(inputs: dict[str, Tensor], backend: str, **changes: Any) -> Tensor:
    arguments = {"angular_channels": CHANNELS, "scale": 0.5, "backend": backend, **inputs, **changes}
    return neighborhood_attention(**arguments)


@pytest.mark.parametrize("family", USABLE_FAMILIES)
@pytest.mark.parametrize("angular", [True, False])
def test_operators_keep_their_promises_to_pytorch(family: str, angular: bool) -> None:
    """Schema, fake tensors with dynamic shapes, and autograd registration of all three."""
    inputs = make_inputs([4, 1, 6])
    tensors = [inputs[name].requires_grad_() for name in LEAVES]
    geometry = tensors[3:] if angular else [None, None]
    constants = ([*CHANNELS] if angular else [6], 0.4, angular)
    operators = OPERATORS[family]
    offsets = inputs["offsets"]
    forward = (*tensors[:3], *geometry, offsets, offsets)
    torch.library.opcheck(operators.value, (*forward, *constants))
    out, lse = (x.detach() for x in operators.value(*forward, *constants))
    torch.library.opcheck(
        operators.backward, (torch.randn_like(out).requires_grad_(), *forward, out, lse, *constants, angular)
    )
    tangents = [None if x is None else torch.randn_like(x) for x in (*tensors[:3], *geometry)]
    torch.library.opcheck(
        operators.double_backward,
        (*tangents, torch.randn_like(out), *(None if x is None else x.detach() for x in forward), out, lse, *constants),
    )


@pytest.mark.parametrize("backend", USABLE_FAMILIES)
def test_derivatives_that_nobody_asked_for_are_zero_cotangents(backend: str) -> None:
    """Only some of the first derivatives enter the second: the others count as zero, and directions may be constant."""
    inputs = make_inputs([3, 5])
    for wanted in (("q",), ("k", "v"), ("log_envelope",), ("direction",), ("q", "direction")):
        found = []
        for name in (backend, "reference"):
            leaves = {n: inputs[n].detach().requires_grad_(n in wanted) for n in LEAVES}
            out = call({**inputs, **leaves}, name)
            first = torch.autograd.grad(out.square().sum(), [leaves[n] for n in wanted], create_graph=True)
            second = torch.autograd.grad(first[0].square().sum(), [leaves[n] for n in wanted])
            found.append([*first, *second])
        assert max(relative_errors(*found)) < 1e-12, wanted


@pytest.mark.parametrize("backend", USABLE_FAMILIES)
def test_third_derivative_is_refused_by_name(backend: str) -> None:
    inputs = make_inputs([3, 2])
    q = inputs["q"].requires_grad_()
    value = call(inputs, backend).square().sum()
    for _ in range(2):
        value = torch.autograd.grad(value, q, create_graph=True)[0].square().sum()
    with pytest.raises(ConfigError, match=f"'{backend}' has two derivatives.*reference"):
        torch.autograd.grad(value, q)


@pytest.mark.parametrize("elements", [1, 100, 1 << 16])
@pytest.mark.parametrize("channels", [None, CHANNELS, (3, 0, 3), (6, 0)])
@pytest.mark.parametrize("only_self", [False, True])
def test_blocks_of_any_size_agree(
    monkeypatch: pytest.MonkeyPatch, elements: int, channels: tuple[int, ...] | None, only_self: bool
) -> None:
    """Runs of queries of one neighborhood, single neighborhoods, and padded groups of several."""
    monkeypatch.setattr(blocked, "BLOCK_ELEMENTS", elements)
    monkeypatch.setattr(blocked, "MIN_ROWS", 1)
    inputs = make_inputs([4, 1, 6, 3, 5, 5])
    if only_self:
        inputs["q"] = inputs["q"][inputs["offsets"][:-1]]

    def through(backend: str) -> list[Tensor]:
        def function(*leaves: Tensor) -> Tensor:
            named = dict(zip(LEAVES, leaves, strict=True), offsets=inputs["offsets"])
            options = {"self_queries_only": only_self, "angular_values": channels == CHANNELS}
            return call(named, backend, angular_channels=channels, **options)

        return derivatives(function, inputs, 2)

    assert max(relative_errors(through("blocked"), through("reference"))) < 1e-12


def test_blocked_memory_is_linear_in_the_tokens() -> None:
    """No tensor grows with the square of a system; the largest holds q's elements or one block."""

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(tensor, Tensor):
                    self.elements = max(self.elements, tensor.numel())
            return result

    atoms = 3000
    q, k, v = torch.randn(3, atoms, 1, 8)
    offsets = torch.tensor([0, atoms])
    problem = AttentionInputs(q, k, v, None, None, offsets, offsets, (8,), 0.3)
    with Largest() as largest:
        result = blocked.forward(problem)
        blocked.backward(problem, result, q, False)
        blocked.double_backward(problem, result, q, Gradients(q, k, v, None, None))
    assert largest.elements <= max(blocked.BLOCK_ELEMENTS, q.numel() * 8)


@pytest.mark.parametrize("backend", ["reference", "dense", *USABLE_FAMILIES])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_sum_in_float32(backend: str, dtype: torch.dtype) -> None:
    inputs = make_inputs([9, 4, 12], heads=2, width=16)
    rounded = {n: inputs[n].to(dtype).double() if n in "qkv" else inputs[n].float().double() for n in LEAVES}
    exact = call({**rounded, "offsets": inputs["offsets"]}, "reference", angular_channels=(8, 4, 4))
    half = {n: rounded[n].to(dtype if n in "qkv" else torch.float32) for n in LEAVES}
    found = call({**half, "offsets": inputs["offsets"]}, backend, angular_channels=(8, 4, 4))
    assert found.dtype == dtype
    # One rounding of the result, not an accumulation of them.
    assert relative_errors([found], [exact])[0] < (4e-3 if dtype == torch.bfloat16 else 5e-4)


@pytest.mark.parametrize("backend", [info.name for info in CPU_BACKENDS])
def test_autocast_takes_features_in_its_dtype_and_keeps_the_geometry(backend: str) -> None:
    inputs = make_inputs([9, 4], width=16)
    single = {name: inputs[name].float().requires_grad_() for name in LEAVES}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = call({**single, "offsets": inputs["offsets"]}, backend, angular_channels=(8, 4, 4))
    assert found.dtype == torch.bfloat16
    first = torch.autograd.grad(found.float().sum(), list(single.values()))
    assert all(g.dtype == torch.float32 and torch.isfinite(g).all() for g in first)
    plain = {name: value.detach() for name, value in single.items()} | {"offsets": inputs["offsets"]}
    in_bfloat16 = {name: value.bfloat16() if name in "qkv" else value for name, value in plain.items()}
    torch.testing.assert_close(found, call(in_bfloat16, backend, angular_channels=(8, 4, 4)))


@pytest.mark.parametrize("backend", [*USABLE_FAMILIES, "auto"])
def test_compiles_in_one_graph_for_all_sizes(backend: str) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()

    def step(q: Tensor, k: Tensor, v: Tensor, log_envelope: Tensor, direction: Tensor, offsets: Tensor) -> Tensor:
        out = neighborhood_attention(2.0 * q, k, v, log_envelope, direction, offsets, CHANNELS, 0.5, backend)
        return out.square().sum()

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=True)
    for sizes in ([3, 4, 1, 2], [5, 1, 2, 4, 7], [6, 6, 2, 3, 1, 1, 1, 1], [2, 9, 4, 5, 5, 5, 1]):
        found = []
        for function in (step, compiled):
            inputs = make_inputs(sizes)
            leaves = [inputs[name].requires_grad_() for name in LEAVES]
            loss = function(*leaves, inputs["offsets"])
            found.append([loss, *torch.autograd.grad(loss, leaves)])
        torch.testing.assert_close(found[0], found[1])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_auto_takes_the_first_that_can() -> None:
    def chosen(**changes: Any) -> str:
        values = {"device": "cpu", "dtype": torch.float32, "derivatives": 2, "dropout": False, "node_attention": False,
                  "angular_values": False}  # fmt: skip
        values |= changes
        return backends.choose_backend("auto", backends.Request(**values)).name

    assert chosen() == USABLE_FAMILIES[0]
    assert chosen(derivatives=3) == "dense"
    assert chosen(dropout=True) == "dense"
    assert chosen(node_attention=True) == "blocked"
    assert chosen(angular_values=True, derivatives=3) == "dense"


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("backend", "changes", "message"),
    [
        ("blocked", {"dropout": 0.1}, "'blocked' has no dropout of attention weights: choose auto, dense"),
        ("sdpa", {"dropout": 0.1}, "'sdpa' has no dropout of attention weights: choose auto, dense"),
        ("sdpa", {"derivatives": 2}, "'sdpa' has 1 derivative, not 2: choose auto, .*blocked"),
        ("blocked", {"derivatives": 3}, "'blocked' has 2 derivatives, not 3: choose auto, dense, reference"),
        ("triton", {}, "'triton' does not run on cpu: choose auto, "),
    ],
)
def test_what_a_backend_cannot_do_is_refused_with_those_that_can(
    backend: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        call(make_inputs([3]), backend, **changes)


@pytest.mark.bad_input
def test_mixed_dtypes_are_refused() -> None:
    inputs = make_inputs([3])
    inputs["k"] = inputs["k"].float()
    with pytest.raises(ConfigError, match=r"one dtype, not torch.float64, torch.float32 and torch.float64"):
        call(inputs, "auto")
