"""Rows by index and their sums: values, all derivatives, the form that compiled models use, and the C++ kernel."""

from __future__ import annotations

import pytest
import torch
from tiny import same_bits_on_threads
from torch import Tensor

from escaip.ops import cpp, rows, sum_rows, take_rows

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
