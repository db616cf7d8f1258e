"""Attention among all atoms of a system: every backend against a softmax written out per system."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from attention_cases import CPU_BACKENDS, gradients, relative_errors
from torch import Tensor

from escaip.errors import ConfigError
from escaip.ops import node_attention

BACKENDS = [info for info in CPU_BACKENDS if info.node_attention]


def written_out(q: Tensor, k: Tensor, v: Tensor, offsets: list[int], scale: float) -> Tensor:
    parts = []
    for first, last in pairwise(offsets):
        a, b, c = (x[first:last].transpose(0, 1) for x in (q, k, v))
        parts.append((torch.softmax(scale * a @ b.mT, -1) @ c).transpose(0, 1))
    return torch.cat(parts)


def twice(function: object, leaves: list[Tensor]) -> list[Tensor]:
    out = function(*leaves)  # type: ignore[operator]
    first = gradients(out.square().sum(), leaves, create_graph=True)
    return [out, *first, *gradients(sum(x.square().sum() for x in first), leaves)]  # type: ignore[arg-type]


@pytest.mark.parametrize("info", BACKENDS, ids=lambda info: info.name)
@pytest.mark.parametrize("sizes", [[5], [1, 7, 3], [4, 0, 2]])
def test_equals_softmax_per_system(info: object, sizes: list[int]) -> None:
    name, derivatives = info.name, info.derivatives  # type: ignore[attr-defined]
    offsets = [0, *torch.tensor(sizes).cumsum(0).tolist()]
    packed = torch.tensor(offsets)
    leaves = [torch.randn(offsets[-1], 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    expected = twice(lambda q, k, v: written_out(q, k, v, offsets, 0.4), leaves)
    if derivatives == 1:
        out = node_attention(*leaves, packed, 0.4, name)
        found = [out, *torch.autograd.grad(out.square().sum(), leaves)]
    else:
        found = twice(lambda q, k, v: node_attention(q, k, v, packed, 0.4, name), leaves)
    assert max(relative_errors(found, expected[: len(found)])) < 1e-11


def test_no_atoms() -> None:
    nothing = torch.zeros(0, 2, 4)
    assert node_attention(nothing, nothing, nothing, torch.tensor([0, 0]), 1.0).shape == (0, 2, 4)


@pytest.mark.bad_input
def test_a_backend_for_neighborhoods_only_is_refused() -> None:
    x = torch.zeros(2, 1, 4)
    with pytest.raises(ConfigError, match="'native' does no attention among all atoms of a system: choose auto"):
        node_attention(x, x, x, torch.tensor([0, 2]), 1.0, "native")
