"""Sums over pairs of bonds: the kernel against harmonics in value and both derivatives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from escaip.errors import ConfigError
from escaip.graph import bond_orientational_order
from escaip.ops.steinhardt import has_kernels, orientation_backward, orientation_value, pair_power

pytestmark = pytest.mark.skipif(not has_kernels(torch.empty(0)), reason="no C++ compiler on this machine")


def bonds(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Vectors whose first of each atom is zero, weights, offsets and centers; one atom is alone."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.tensor([5, 1, 12, 2, 40])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])
    vector = torch.randn(int(offsets[-1]), 3, dtype=dtype, generator=generator)
    vector[offsets[:-1]] = 0.0
    vector[3] = -vector[2]  # antiparallel
    weight = torch.rand(len(vector), dtype=dtype, generator=generator)
    weight[4] = 0.0
    return vector, weight, offsets, torch.repeat_interleave(sizes)


def unit(vector: Tensor) -> Tensor:
    squared = vector.square().sum(1, keepdim=True)
    return torch.where(squared == 0, 0.0, vector * torch.where(squared == 0, 1.0, squared).rsqrt())


def derivatives(l_max: int, with_kernel: bool, dtype: torch.dtype) -> list[Tensor]:
    """The order, its gradient and the gradient of a product with the gradient."""
    vector, weight, offsets, center = bonds(dtype)
    vector.requires_grad_()
    weight.requires_grad_()
    generator = torch.Generator().manual_seed(1)
    order = bond_orientational_order(unit(vector), weight, center, 5, l_max, offsets=offsets if with_kernel else None)
    cotangent = torch.randn(order.shape, dtype=dtype, generator=generator)
    first = torch.autograd.grad((order * cotangent).sum(), [vector, weight], create_graph=True)
    product = sum((x * torch.randn(x.shape, dtype=dtype, generator=generator)).sum() for x in first)
    assert isinstance(product, Tensor)
    return [order, *first, *torch.autograd.grad(product, [vector, weight])]


@pytest.mark.parametrize("l_max", [1, 2, 3, 9, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pairs_equal_harmonics_in_value_and_two_derivatives(l_max: int, dtype: torch.dtype) -> None:
    tolerance = 1e-11 if dtype == torch.float64 else 2e-4
    for found, expected in zip(derivatives(l_max, True, dtype), derivatives(l_max, False, dtype), strict=True):
        torch.testing.assert_close(found, expected, rtol=0.0, atol=tolerance * float(expected.detach().abs().max()))


def test_degree_zero_counts_every_token() -> None:
    vector, weight, offsets, center = bonds()
    total = torch.zeros(5, dtype=torch.float64).index_add(0, center, weight)
    torch.testing.assert_close(pair_power(unit(vector), weight, offsets, 0).squeeze(1), total.square())


def test_derivatives_by_differences() -> None:
    vector, weight, offsets, _ = (x[:18] if x.dim() and len(x) > 18 else x for x in bonds())
    offsets = offsets[:4]
    free = (vector != 0).any(1, keepdim=True).double()
    inputs = (vector.requires_grad_(), weight.requires_grad_())

    def power(vector: Tensor, weight: Tensor) -> Tensor:
        return pair_power(vector * free, weight, offsets, 4)

    # Of a quarter of the length: beyond 1 the polynomials grow fast.
    scaled = (inputs[0].detach().mul(0.25).requires_grad_(), inputs[1])
    assert torch.autograd.gradcheck(power, scaled)
    assert torch.autograd.gradgradcheck(power, scaled)


def test_the_number_of_threads_does_not_change_a_bit() -> None:
    vector, weight, offsets, _ = bonds(torch.float32)
    many = torch.cat([offsets[:1], *(offsets[1:] + i * len(vector) for i in range(40))])
    direction, weight = unit(vector).repeat(40, 1), weight.repeat(40)
    grad = torch.ones(200, 7)
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            value = orientation_value(direction, weight, many, 6)
            results.append([value, *orientation_backward(grad, direction, weight, many)])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


def test_operators_keep_the_contract_of_the_dispatcher() -> None:
    vector, weight, offsets, _ = bonds(torch.float32)
    direction = unit(vector).requires_grad_()
    torch.library.opcheck(orientation_value, (direction, weight.requires_grad_(), offsets, 3))
    torch.library.opcheck(orientation_backward, (torch.ones(5, 4, requires_grad=True), direction, weight, offsets))


@pytest.mark.bad_input
def test_a_third_derivative_is_refused_with_the_remedy() -> None:
    vector, weight, offsets, _ = bonds()
    direction = unit(vector).requires_grad_()
    x = pair_power(direction, weight, offsets, 3).sum()
    for _ in range(2):
        (x,) = torch.autograd.grad(x.square().sum(), direction, create_graph=True)
    with pytest.raises(ConfigError, match="a third was asked for"):
        torch.autograd.grad(x.sum(), direction)
