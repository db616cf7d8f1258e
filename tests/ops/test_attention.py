"""Neighborhood attention: reference against a written-out loop, dense against reference, all derivatives."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from attention_cases import CPU_BACKENDS, gradients, make_inputs, relative_errors, written_out
from torch import Tensor

from escaip.errors import ConfigError
from escaip.ops import neighborhood_attention, node_attention
from escaip.ops.reference import legendre_polynomials

BACKENDS = [info.name for info in CPU_BACKENDS]
TWICE = [info.name for info in CPU_BACKENDS if info.derivatives != 1]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("channels", [None, (2, 1, 1, 1, 1), (3, 3), (1, 0, 5)])
def test_equals_written_out_sum(backend: str, channels: tuple[int, ...] | None) -> None:
    inputs = make_inputs([3, 1, 5, 2])
    found = neighborhood_attention(**inputs, angular_channels=channels, scale=0.7, backend=backend)
    torch.testing.assert_close(found, written_out(inputs, channels, 0.7), rtol=1e-12, atol=1e-12)


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
@pytest.mark.parametrize("channels", [None, (2, 1, 1)])
def test_first_and_second_derivatives(backend: str, channels: tuple[int, ...] | None) -> None:
    inputs = make_inputs([3, 1, 4], heads=1, width=4)
    has_direction = (inputs["direction"] != 0).any(-1)
    leaves = [inputs[name].requires_grad_() for name in ("q", "k", "v", "log_envelope")]
    raw = inputs["direction"][has_direction].clone().requires_grad_()

    def function(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, directed: Tensor) -> Tensor:
        direction = torch.zeros(len(has_direction), 3, dtype=q.dtype).index_put((has_direction,), directed)
        return neighborhood_attention(q, k, v, bias, direction, inputs["offsets"], channels, 0.5, backend)

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
    full = neighborhood_attention(**inputs, angular_channels=channels, scale=0.5, backend="reference")
    some = {**inputs, "q": inputs["q"][rows]}
    found = neighborhood_attention(
        **some, angular_channels=channels, scale=0.5, backend=backend, self_queries_only=True
    )
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
