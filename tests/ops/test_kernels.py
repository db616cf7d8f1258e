"""C++ kernels of rows and splines against the plain operators that they replace."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from escaip.ops import cpp, rows, spline

pytestmark = pytest.mark.skipif(cpp.unavailable() is not None, reason=str(cpp.unavailable()))
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 2e-2}


def cases(dtype: torch.dtype) -> dict[str, tuple[Any, Callable[..., Tensor], list[Any]]]:
    """Name to the operator, its plain form and arguments, strided ones among them."""
    generator = torch.Generator().manual_seed(3)
    table = torch.randn(5, 20, dtype=dtype, generator=generator).repeat(4, 1)[::2]
    point = torch.linspace(0.0, 15.0, 40, dtype=dtype)[::2]
    cotangent = torch.randn(20, 20, dtype=dtype, generator=generator).T
    index = torch.randint(0, 6, (400,), generator=generator)
    ops = torch.ops.escaip
    found: dict[str, tuple[Any, Callable[..., Tensor], list[Any]]] = {}
    for width in (1, 3, 200):  # the last is divided between threads
        x = torch.randn(width, 400, dtype=dtype, generator=generator).T
        found[f"sum_rows {width}"] = (ops.sum_rows, rows._sum_rows._init_fn, [x, index, 7])
    found["sum_rows of numbers"] = (ops.sum_rows, rows._sum_rows._init_fn, [x[:, 0].contiguous(), index, 7])
    found["sum_rows of nothing"] = (ops.sum_rows, rows._sum_rows._init_fn, [x[:0], index[:0], 0])
    found["values"] = (ops.spline_values, spline.spline_values._init_fn, [table, point, 1])
    found["products"] = (ops.spline_products, spline.spline_products._init_fn, [cotangent, table, point, 0])
    found["transpose"] = (ops.spline_transpose, spline.spline_transpose._init_fn, [cotangent, point, 2, 9])
    return found


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("name", list(cases(torch.float32)))
def test_kernels_equal_the_plain_form(name: str, dtype: torch.dtype) -> None:
    operator, plain, arguments = cases(dtype)[name]
    before = [x.clone() for x in arguments if isinstance(x, Tensor)]
    # Half types are summed in single precision.
    precise = [x.float() if isinstance(x, Tensor) and x.dtype == torch.bfloat16 else x for x in arguments]
    found, exact = operator(*arguments), plain(*precise)
    assert (found.dtype, found.shape) == (dtype, exact.shape)
    assert found.is_contiguous()
    scale = float(exact.abs().max()) if exact.numel() else 1.0
    torch.testing.assert_close(found, exact.to(dtype), rtol=0, atol=TOLERANCE[dtype] * max(scale, 1.0))
    assert all(torch.equal(x, y) for x, y in zip((x for x in arguments if isinstance(x, Tensor)), before, strict=True))


def test_sums_have_the_same_bits_on_any_number_of_threads() -> None:
    x, index = torch.randn(2000, 96), torch.randint(0, 50, (2000,))
    threads = torch.get_num_threads()
    found = []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            found.append(torch.ops.escaip.sum_rows(x, index, 50))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in itertools.pairwise(found))
