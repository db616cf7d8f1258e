"""Gaussians far from their center: no denormal numbers, and nothing that counts is lost."""

from __future__ import annotations

import pytest
import torch

from escaip.nn.embedding import GaussianBasis


@pytest.mark.parametrize(("num_radial", "width"), [(600, 2.0), (32, 1.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_with_gradients_stay_normal_numbers(num_radial: int, width: float, dtype: torch.dtype) -> None:
    basis = GaussianBasis(num_radial, 6.0, width).to(dtype)
    distance = torch.linspace(0.5, 6.0, 200, dtype=dtype)
    value = basis(distance)
    assert (1e-12 * value).min() >= torch.finfo(torch.float32).tiny
    exact = torch.exp(-basis.sharpness * (distance.unsqueeze(-1) - basis.centers).square())
    assert (value - exact).abs().max() < 1e-19


def test_gradients_are_those_of_gaussians() -> None:
    basis = GaussianBasis(40, 6.0, 1.0).double()
    distance = torch.tensor([0.7, 3.1, 5.9], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(basis, distance)
    assert torch.autograd.gradgradcheck(basis, distance)
