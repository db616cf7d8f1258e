"""Activation and norm: the kernels against plain operations, in value and three derivatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import same_bits_on_threads
from torch import Tensor

from escaip.ops import cpp
from escaip.ops.layers import add_rows, gelu, gelu_of_rows, rms_norm

pytestmark = pytest.mark.skipif(cpp.unavailable() is not None, reason=str(cpp.unavailable()))
FLOOR = 1e-3


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return rms_norm(x, weight, FLOOR)


def plain_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * weight / (x.square().mean(-1, keepdim=True) + FLOOR).sqrt()


def ends(like: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of five rows for each row of ``like``, one of which no row takes."""
    rows = torch.arange(like.numel() // like.shape[-1])
    return rows * 7 % 4, rows // 3 % 5


def of_ends(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    i, j = ends(x)
    return gelu_of_rows(x.reshape(-1, x.shape[-1]), first, i, second, j)


def plain_of_ends(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    i, j = ends(x)
    return torch.nn.functional.gelu(add_rows(x.reshape(-1, x.shape[-1]), first, i, second, j))


def of_rows(x: Tensor) -> Tensor:
    x = x.reshape(-1, x.shape[-1])
    return gelu_of_rows(None, x, torch.arange(len(x)), 0.5 * x, torch.arange(len(x)).flip(0))


def plain_of_rows(x: Tensor) -> Tensor:
    x = x.reshape(-1, x.shape[-1])
    return torch.nn.functional.gelu(x + 0.5 * x.flip(0))


CASES = {
    "gelu": (gelu, torch.nn.functional.gelu, 1),
    "gelu of rows and a base": (of_ends, plain_of_ends, 3),
    "gelu of rows": (of_rows, plain_of_rows, 1),
    "rms_norm": (norm, plain_norm, 2),
}


def leaves(shape: tuple[int, ...], number: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype, generator=generator)

    x = 3.0 * random(*shape)
    x.view(-1)[:3] = torch.tensor([0.0, 12.0, -12.0])
    others = {1: [], 2: [0.5 + random(shape[-1]).abs()], 3: [random(5, shape[-1]), random(5, shape[-1])]}
    return [one.requires_grad_() for one in (x, *others[number])]


def derivatives(function: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)

    def cotangents(of: Any) -> list[Tensor]:
        return [torch.randn(x.shape, dtype=x.dtype, generator=generator).requires_grad_() for x in of]

    found = [function(*inputs)]
    grad = cotangents(found)
    first = torch.autograd.grad(found, inputs, grad, create_graph=True)
    tangents = cotangents(first)
    second = torch.autograd.grad(first, [*inputs, *grad], tangents, create_graph=True)
    third = torch.autograd.grad(second, [*inputs, *grad, *tangents], cotangents(second))
    return [*found, *first, *second, *third]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("shape", [(150, 19), (3, 5, 32), (1, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kernels_equal_plain_operations(case: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    function, plain, number = CASES[case]
    found = derivatives(function, leaves(shape, number, dtype))
    tolerance = 2e-6 if dtype == torch.float32 else 2e-14
    for x, expected in zip(found, derivatives(plain, leaves(shape, number, dtype)), strict=True):
        torch.testing.assert_close(x, expected, rtol=0, atol=tolerance * float(expected.detach().abs().max()))


def test_small_values_keep_their_digits() -> None:
    """Where the normal distribution is far below rounding, on the left."""
    x = torch.linspace(-9.0, -3.0, 61)
    expected = 0.5 * x.double() * torch.special.erfc(-x.double() / 2**0.5)
    torch.testing.assert_close(gelu(x).double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("case", CASES)
def test_the_number_of_threads_does_not_change_a_bit(case: str) -> None:
    function, _, number = CASES[case]

    def run() -> list[Tensor]:
        inputs = leaves((900, 24), number, torch.float32)
        first = torch.autograd.grad(function(*inputs).square().sum(), inputs, create_graph=True)
        return [*first, *torch.autograd.grad(sum(x.square().sum() for x in first), inputs)]

    same_bits_on_threads(run)


def test_derivatives_of_some_inputs_alone() -> None:
    """The first derivative by one input, of which the second is by all: how a training on forces uses them."""
    for chosen in range(3):
        found, expected = (
            torch.autograd.grad(
                torch.autograd.grad(function(*inputs).sin().sum(), inputs[chosen], create_graph=True)[0].square().sum(),
                inputs,
            )
            for function, inputs in ((one, leaves((30, 8), 3, torch.float64)) for one in (of_ends, plain_of_ends))
        )
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", ["gelu", "rms_norm"])
def test_operators_have_derivatives_where_the_dispatcher_looks(case: str) -> None:
    x, weight = leaves((4, 8), 2, torch.float32)
    inputs = (x, weight, FLOOR) if case == "rms_norm" else (x, None, None, None, None)
    torch.library.opcheck(getattr(torch.ops.escaip, case).default, inputs, test_utils="test_autograd_registration")


def test_empty() -> None:
    x = torch.zeros(0, 4, requires_grad=True)
    first = torch.autograd.grad(norm(gelu(x), torch.ones(4)).sum(), x, create_graph=True)
    assert torch.autograd.grad(first[0].sum(), x)[0].shape == (0, 4)
