"""Rows by index and their sums: values, all derivatives, in the form that compiled models use."""

from __future__ import annotations

import torch
from torch import Tensor

from escaip.ops import rows, sum_rows, take_rows

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
