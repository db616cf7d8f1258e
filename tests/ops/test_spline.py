"""Rows by index and splines in feature space: values, all derivatives, and kernels beside plain operations."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import pytest
import torch
from tiny import same_bits_on_threads
from torch import Tensor

from escaip.errors import ConfigError
from escaip.ops import cpp, rows, spline, sum_rows, take_rows

INDEX = torch.tensor([0, 2, 2, 1, 2, 0])  # row 3 belongs to nothing


def test_take_and_sum_are_each_other_s_adjoint() -> None:
    x, y = torch.randn(4, 3, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)
    torch.testing.assert_close((take_rows(x, INDEX) * y).sum(), (x * sum_rows(y, INDEX, 4)).sum())
    assert sum_rows(y, INDEX, 4)[3].abs().sum() == 0


def test_compiled_forms_equal_eager_in_all_derivatives() -> None:
    """What runs under torch.compile, called in eager mode."""
    x = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    y = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)

    def take(x: Tensor) -> Tensor:
        return rows._TakeRows.apply(x.square(), INDEX)

    def add(y: Tensor) -> Tensor:
        return rows._sum_rows(y.square(), INDEX, 4)

    torch.testing.assert_close(take(x), take_rows(x.square(), INDEX))
    torch.testing.assert_close(add(y), sum_rows(y.square(), INDEX, 4))
    for function, leaf in ((take, x), (add, y)):
        assert torch.autograd.gradcheck(function, leaf)
        assert torch.autograd.gradgradcheck(function, leaf)
    torch.library.opcheck(rows._sum_rows, (y, INDEX, 4))


TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 2e-2}


@pytest.mark.skipif(cpp.unavailable() is not None, reason=str(cpp.unavailable()))
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(400, 1), (400, 3), (2000, 200), (400,), (0, 3)])
def test_the_kernel_equals_the_plain_form_on_any_number_of_threads(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(shape[::-1], generator=generator).to(dtype).movedim(0, -1)  # strided
    index = torch.randint(0, 6, shape[:1], generator=generator)
    number, before = 7 if len(x) else 0, x.clone()
    (found,) = same_bits_on_threads(lambda: [torch.ops.escaip.sum_rows(x, index, number)])
    # Half types are summed in single precision.
    exact = rows._sum_rows._init_fn(x.float() if dtype == torch.bfloat16 else x, index, number).to(dtype)
    assert (found.dtype, found.shape) == (dtype, exact.shape)
    assert found.is_contiguous()
    scale = max(float(exact.abs().max()), 1.0) if exact.numel() else 1.0
    torch.testing.assert_close(found, exact, rtol=0, atol=TOLERANCE[dtype] * scale)
    assert torch.equal(x, before)


Operator = Callable[..., Tensor]
cpp.has_kernels()

END = 6.0
ORDERS = range(spline.DEGREE + 2)  # one beyond the last that is not zero


def table_of(function: Callable[[Tensor], Tensor], intervals: int) -> Tensor:
    return spline.coefficients(function(spline.knots(intervals, END, dtype=torch.float64)).unsqueeze(1))


def gaussian(x: Tensor, width: float = 0.2) -> Tensor:
    return torch.exp(-((x - 3.1) ** 2) / (2.0 * width**2))


def errors(intervals: int) -> tuple[float, float]:
    """Of the value and of the slope, in units of the function's own size and of one over its width."""
    point = torch.linspace(0.0, END, 5001, dtype=torch.float64, requires_grad=True)
    value = spline.interpolate(table_of(gaussian, intervals), point * (intervals / END)).squeeze(1)
    (slope,) = torch.autograd.grad(value.sum(), point)
    exact = -(point - 3.1) / 0.04 * gaussian(point)
    off, off_slope = (value - gaussian(point)).detach().abs(), (slope - exact).detach().abs()
    return float(off.max()), 0.2 * float(off_slope.max())


def test_polynomials_of_degree_five_are_exact_with_all_their_derivatives() -> None:
    powers = torch.tensor([0.3, -1.0, 0.7, 0.2, -0.05, 0.01], dtype=torch.float64)

    def polynomial(x: Tensor) -> Tensor:
        return sum(c * x**p for p, c in enumerate(powers))

    table = table_of(polynomial, 24)
    point = torch.linspace(0.0, END, 77, dtype=torch.float64, requires_grad=True)
    found = spline.interpolate(table, point * (24 / END)).squeeze(1)
    expected = polynomial(point)
    for _ in range(5):
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)
        (found,) = torch.autograd.grad(found.sum(), point, create_graph=True)
        (expected,) = torch.autograd.grad(expected.sum(), point, create_graph=True)


def test_error_falls_with_the_sixth_power_and_stays_below_its_bound() -> None:
    """The bound that docs/howto/speed.md states: an eighth of a width between knots."""
    coarse, fine = errors(120), errors(240)
    assert coarse[0] / fine[0] > 2**5.5
    assert coarse[1] / fine[1] > 2**4.5
    assert fine[0] < 1e-6
    assert fine[1] < 5e-6


def test_four_derivatives_are_continuous_at_knots() -> None:
    table = torch.randn(20, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    knots = torch.arange(1.0, 14.0, dtype=torch.float64)
    for order, step in itertools.product(range(5), [1e-9]):
        before, after = (spline.spline_values(table, knots + sign * step, order) for sign in (-1, 1))
        torch.testing.assert_close(before, after, rtol=0.0, atol=1e-6)
    jump = spline.spline_values(table, knots - 1e-9, 5) - spline.spline_values(table, knots + 1e-9, 5)
    assert jump.abs().max() > 0.1


def test_derivatives_of_every_operator() -> None:
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(11, 3, dtype=torch.float64, generator=generator).requires_grad_()
    point = (6.0 * torch.rand(5, dtype=torch.float64, generator=generator)).requires_grad_()
    cotangent = torch.randn(5, 3, dtype=torch.float64, generator=generator).requires_grad_()
    cases: list[tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = [
        (spline.interpolate, (table, point)),
        (lambda g, c, t: spline.spline_products(g, c, t, 1), (cotangent, table, point)),
        (lambda g, t: spline.spline_transpose(g, t, 1, 11), (cotangent, point)),
    ]
    for function, inputs in cases:
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("points", "rows", "columns"), [(0, 8, 3), (1, 6, 1), (700, 40, 96), (300, 200, 33)])
def test_kernels_equal_plain_operations(points: int, rows: int, columns: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(rows, 2 * columns, dtype=dtype, generator=generator)[:, ::2]
    # Both ends, a knot, and places outside, where the nearest polynomial goes on.
    point = (torch.rand(points, dtype=dtype, generator=generator) * (rows - 5) * 1.1) - 0.2
    special = torch.tensor([0.0, rows - 5.0, 1.0])[:points]
    point[: len(special)] = special.to(dtype)
    cotangent = torch.randn(columns, points, dtype=dtype, generator=generator).T  # not contiguous

    def everything(operators: Sequence[Operator], dtype: torch.dtype) -> list[Tensor]:
        values, products, transpose = operators
        table, point, cotangent = (x.to(dtype) for x in given)
        found = [values(table, point, order) for order in ORDERS]
        found += [products(cotangent, table, point, order) for order in ORDERS]
        found += [products(torch.ones_like(point)[:, None].expand(-1, columns), table, point, 0)]
        return found + [transpose(cotangent, point, order, rows) for order in ORDERS]

    given = (table, point, cotangent)
    before = [x.clone() for x in given]
    operators = (spline.spline_values, spline.spline_products, spline.spline_transpose)
    tolerance = {torch.float32: 2e-5, torch.float64: 1e-13, torch.bfloat16: 2e-2}[dtype]
    # Half types are summed in single precision.
    plain = everything([x._init_fn for x in operators], torch.float32 if dtype == torch.bfloat16 else dtype)
    for found, expected in zip(everything(operators, dtype), plain, strict=True):
        size = float(expected.abs().max()) if expected.numel() else 0.0
        torch.testing.assert_close(found, expected.to(dtype), rtol=0.0, atol=tolerance * size)
    assert all(torch.equal(x, y) for x, y in zip(given, before, strict=True))


def test_the_number_of_threads_does_not_change_a_bit() -> None:
    generator = torch.Generator().manual_seed(0)
    table, point = torch.randn(50, 96, generator=generator), 45.0 * torch.rand(4000, generator=generator)
    cotangent = torch.randn(4000, 96, generator=generator)
    same_bits_on_threads(
        lambda: [
            spline.spline_values(table, point, 0),
            spline.spline_products(cotangent, table, point, 1),
            spline.spline_transpose(cotangent, point, 0, 50),
        ]
    )


def test_operators_keep_the_contract_of_the_dispatcher() -> None:
    table, point = torch.randn(9, 3, requires_grad=True), (4.0 * torch.rand(5)).requires_grad_()
    cotangent = torch.randn(5, 3, requires_grad=True)
    torch.library.opcheck(spline.spline_values, (table, point, 0))
    torch.library.opcheck(spline.spline_products, (cotangent, table, point, 1))
    torch.library.opcheck(spline.spline_transpose, (cotangent, point, 0, 9))


@pytest.mark.bad_input
def test_a_table_that_is_too_short_is_refused() -> None:
    with pytest.raises(ConfigError, match="5 rows: it must have at least 6"):
        spline.interpolate(torch.zeros(5, 2), torch.zeros(1))


def test_a_place_that_is_no_number_stays_none() -> None:
    assert torch.isnan(spline.interpolate(torch.ones(9, 2), torch.tensor([torch.nan]))).all()
