"""Harmonics and bond-orientational order."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from e3nn import o3
from torch.nn.functional import normalize

from escaip.errors import ConfigError
from escaip.graph import bond_orientational_order
from escaip.graph.features import real_harmonics

L_MAX = 9
SIZES = [2 * degree + 1 for degree in range(L_MAX + 1)]


def unit_vectors(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    poles = torch.tensor([[0.0, 0, 1], [0, 0, -1], [1, 0, 0], [0, -1, 0]], dtype=torch.float64)
    return torch.cat([poles, normalize(torch.randn(count, 3, generator=generator, dtype=torch.float64), dim=1)])


def test_addition_theorem() -> None:
    vectors = unit_vectors(40)
    harmonics = real_harmonics(vectors, L_MAX)
    cosine = (vectors @ vectors.T).clamp(-1, 1).numpy()
    for degree, part in enumerate(harmonics.split(SIZES, dim=1)):
        legendre = np.polynomial.legendre.legval(cosine, [0.0] * degree + [1.0])
        np.testing.assert_allclose((part @ part.T).numpy(), legendre, rtol=0, atol=2e-13)


def test_agrees_with_e3nn_up_to_order_and_sign() -> None:
    """e3nn takes y as its polar axis and lists m from −l to l: Ŷ_lm(x, y, z) here is theirs at (y, z, x)."""
    vectors = unit_vectors(200)
    for degree, part in enumerate(real_harmonics(vectors, L_MAX).split(SIZES, dim=1)):
        theirs = o3.spherical_harmonics(degree, vectors[:, [1, 2, 0]], normalize=False, normalization="norm")
        ours = torch.cat([part[:, degree + 1 :].flip(1), part[:, : degree + 1]], dim=1)
        torch.testing.assert_close(ours.abs(), theirs.abs(), rtol=0, atol=1e-12)
        torch.testing.assert_close(ours @ ours.T, theirs @ theirs.T, rtol=0, atol=1e-12)


def test_harmonics_are_orthogonal_and_vanish_at_zero() -> None:
    nodes, weights = np.polynomial.legendre.leggauss(12)
    angle = 2 * math.pi * np.arange(24) / 24
    z, phi = (x.ravel() for x in np.meshgrid(nodes, angle, indexing="ij"))
    radius = np.sqrt(1 - z**2)
    sphere = torch.tensor(np.stack([radius * np.cos(phi), radius * np.sin(phi), z], axis=1))
    harmonics = real_harmonics(sphere, L_MAX)
    gram = harmonics.T @ (harmonics * torch.tensor(np.repeat(weights, 24) / 48)[:, None])
    expected = torch.cat([torch.full((size,), 1.0 / size, dtype=torch.float64) for size in SIZES])
    torch.testing.assert_close(gram, torch.diag(expected), rtol=0, atol=1e-13)
    assert real_harmonics(torch.zeros(2, 3), L_MAX).tolist() == [[1.0] + [0.0] * 99] * 2


def test_harmonics_have_both_derivatives_everywhere() -> None:
    vectors = torch.cat([unit_vectors(2), torch.zeros(1, 3, dtype=torch.float64)]).requires_grad_()
    mix = torch.randn(100, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda v: real_harmonics(v, L_MAX) @ mix, vectors)
    assert torch.autograd.gradgradcheck(lambda v: real_harmonics(v, L_MAX) @ mix, vectors)


def direct_order(direction: np.ndarray, weight: np.ndarray) -> list[float]:
    """Root of Σ_jk w_j w_k P_l(n_j·n_k) / (Σ w)², with P_l := δ_l0 for the zero vector."""
    has = np.linalg.norm(direction, axis=1) > 0.5
    result = []
    for degree in range(L_MAX + 1):
        legendre = np.polynomial.legendre.legval(direction @ direction.T, [0.0] * degree + [1.0])
        legendre = np.where(has[:, None] & has[None], legendre, float(degree == 0))
        result.append(weight @ legendre @ weight / weight.sum() ** 2)
    return result


@pytest.mark.parametrize("epsilon", [1e-6, 1e-2])
@pytest.mark.parametrize("floor", ["smooth", "clamp"])
def test_order_matches_the_double_sum(floor: str, epsilon: float) -> None:
    direction = unit_vectors(20)
    direction[[0, 7]] = 0.0
    weight = torch.rand(24, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    center = torch.tensor([0] * 7 + [1] * 17)
    found = bond_orientational_order(direction, weight, center, 2, L_MAX, floor=floor, epsilon=epsilon)
    for atom, part in enumerate((slice(0, 7), slice(7, 24))):
        power = np.array(direct_order(direction[part].numpy(), weight[part].numpy()))
        rounded = np.sqrt((power + epsilon) / (1 + epsilon))
        expected = np.sqrt(np.maximum(power, epsilon)) if floor == "clamp" else rounded
        np.testing.assert_allclose(found[atom].numpy(), expected, rtol=0, atol=1e-12)


def test_known_values_of_cubic_surroundings() -> None:
    """Simple cubic shell without its self token: Q4 = 0.7638, Q6 = 0.3536 (Steinhardt 1983); odd ones vanish."""
    axes = torch.eye(3, dtype=torch.float64)
    order = bond_orientational_order(torch.cat([axes, -axes]), torch.ones(6).double(), torch.zeros(6).long(), 1, 8)[0]
    assert order[0] == 1.0
    assert order[4] == pytest.approx(0.76376, abs=1e-4)
    assert order[6] == pytest.approx(0.35355, abs=1e-4)
    for degree in (1, 2, 3, 5, 7):
        assert order[degree] == pytest.approx(1e-3, abs=1e-8)


def test_an_atom_alone() -> None:
    order = bond_orientational_order(torch.zeros(1, 3), torch.ones(1), torch.zeros(1).long(), 1, 3)
    torch.testing.assert_close(order, torch.tensor([[1.0, 1e-3, 1e-3, 1e-3]]))


def test_derivatives_flow_through_direction_and_weight() -> None:
    direction = unit_vectors(3).requires_grad_()
    weight = torch.rand(7, generator=torch.Generator().manual_seed(3), dtype=torch.float64).requires_grad_()
    center = torch.tensor([0, 0, 0, 0, 1, 1, 1])

    def function(direction: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return bond_orientational_order(direction, weight, center, 2, 5)

    assert torch.autograd.gradcheck(function, (direction, weight))
    assert torch.autograd.gradgradcheck(function, (direction, weight), atol=1e-4)


def test_smooth_floor_has_no_kink_where_the_clamp_has_one() -> None:
    """Through the symmetric geometry of a cubic shell, where BOO_1 touches zero."""

    def slopes(floor: str) -> torch.Tensor:
        x = torch.linspace(-0.004, 0.004, 401, dtype=torch.float64, requires_grad=True)
        one = torch.ones_like(x)
        pair = normalize(torch.stack([torch.stack([x, 0 * x, one], 1), torch.stack([x, 0 * x, -one], 1)]), dim=2)
        center = torch.arange(401).repeat(2)
        order = bond_orientational_order(pair.reshape(-1, 3), one.repeat(2), center, 401, 1, floor=floor)
        return torch.autograd.grad(order[:, 1].sum(), x)[0]

    assert slopes("smooth").diff().abs().max() < 0.03
    assert slopes("clamp").diff().abs().max() > 0.9


@pytest.mark.bad_input
def test_unknown_floor() -> None:
    with pytest.raises(ConfigError, match="floor 'soft' does not exist: choose smooth or clamp"):
        bond_orientational_order(torch.zeros(1, 3), torch.ones(1), torch.zeros(1).long(), 1, 3, floor="soft")


@pytest.mark.bad_input
def test_degree_out_of_range() -> None:
    with pytest.raises(ConfigError, match=r"l_max is 17: it must be in 0 .. 16"):
        bond_orientational_order(torch.zeros(1, 3), torch.ones(1), torch.zeros(1).long(), 1, 17)
