"""Power spectra and bond-orientational order: plain operations against the double sum, the kernel against those."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tiny import same_bits_on_threads
from torch import Tensor
from torch.nn.functional import normalize

from escaip.errors import ConfigError
from escaip.ops import bond_orientational_order, cpp
from escaip.ops.harmonics import power_spectrum, spherical_harmonics

with_kernels = pytest.mark.skipif(cpp.unavailable() is not None, reason=str(cpp.unavailable()))


L_MAX = 9
SIZES = [2 * degree + 1 for degree in range(L_MAX + 1)]


def unit_vectors(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    poles = torch.tensor([[0.0, 0, 1], [0, 0, -1], [1, 0, 0], [0, -1, 0]], dtype=torch.float64)
    return torch.cat([poles, normalize(torch.randn(count, 3, generator=generator, dtype=torch.float64), dim=1)])


def test_addition_theorem() -> None:
    vectors = unit_vectors(40)
    harmonics = spherical_harmonics(vectors, L_MAX)
    cosine = (vectors @ vectors.T).clamp(-1, 1).numpy()
    for degree, part in enumerate(harmonics.split(SIZES, dim=1)):
        legendre = np.polynomial.legendre.legval(cosine, [0.0] * degree + [1.0])
        np.testing.assert_allclose((part @ part.T).numpy(), legendre, rtol=0, atol=2e-13)


def test_harmonics_vanish_at_zero_with_finite_derivatives() -> None:
    assert spherical_harmonics(torch.zeros(2, 3), L_MAX).tolist() == [[1.0] + [0.0] * 99] * 2
    vectors = torch.cat([unit_vectors(2), torch.zeros(1, 3, dtype=torch.float64)]).requires_grad_()
    mix = torch.randn(100, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda v: spherical_harmonics(v, L_MAX) @ mix, vectors)
    assert torch.autograd.gradgradcheck(lambda v: spherical_harmonics(v, L_MAX) @ mix, vectors)


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
@pytest.mark.parametrize(
    ("l_max", "floor", "message"),
    [
        (3, "soft", "floor 'soft' does not exist: choose smooth or clamp"),
        (17, "smooth", "l_max is 17: it must be in 0 .."),
    ],
)
def test_settings_that_do_not_exist(l_max: int, floor: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        bond_orientational_order(torch.zeros(1, 3), torch.ones(1), torch.zeros(1).long(), 1, l_max, floor=floor)


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


PAIRS = (torch.tensor([0, 0, 2, 1]), torch.tensor([0, 2, 2, 0]))


def order(direction: Tensor, weight: Tensor, l_max: int, **options: Any) -> Tensor:
    return bond_orientational_order(direction, weight[:, 0], bonds()[3], 5, l_max, **options)


def spectrum(direction: Tensor, weight: Tensor, l_max: int, **options: Any) -> Tensor:
    return power_spectrum(direction, weight, bonds()[3], 5, l_max, **options)


def products(direction: Tensor, weight: Tensor, l_max: int, **options: Any) -> Tensor:
    return power_spectrum(direction, weight, bonds()[3], 5, l_max, PAIRS, **options)


def derivatives(function: Callable[..., Tensor], l_max: int, with_kernel: bool, dtype: torch.dtype) -> list[Tensor]:
    """A function of bonds, its gradient and the gradient of a product with the gradient."""
    vector, weight, offsets, _ = bonds(dtype)
    weight = torch.stack([weight, weight.flip(0) - 0.3, weight.square()], 1)
    vector.requires_grad_()
    weight.requires_grad_()
    generator = torch.Generator().manual_seed(1)
    found = function(unit(vector), weight, l_max, offsets=offsets if with_kernel else None)
    cotangent = torch.randn(found.shape, dtype=dtype, generator=generator)
    first = torch.autograd.grad((found * cotangent).sum(), [vector, weight], create_graph=True)
    product = sum((x * torch.randn(x.shape, dtype=dtype, generator=generator)).sum() for x in first)
    assert isinstance(product, Tensor)
    return [found, *first, *torch.autograd.grad(product, [vector, weight])]


@with_kernels
@pytest.mark.parametrize("function", [order, spectrum, products])
@pytest.mark.parametrize("l_max", [1, 2, 3, 9, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_kernel_equals_plain_operations_in_value_and_two_derivatives(
    function: Callable[..., Tensor], l_max: int, dtype: torch.dtype
) -> None:
    tolerance = 1e-11 if dtype == torch.float64 else 2e-4
    plain = derivatives(function, l_max, False, dtype)
    for found, expected in zip(derivatives(function, l_max, True, dtype), plain, strict=True):
        torch.testing.assert_close(found, expected, rtol=0.0, atol=tolerance * float(expected.detach().abs().max()))


def test_products_are_sums_over_pairs_of_bonds() -> None:
    vector, weight, _, center = bonds()
    direction, weight = unit(vector), torch.stack([weight, weight.flip(0) - 0.3, weight.square()], 1)
    found = products(direction, weight, 4)
    for atom in range(5):
        own = center == atom
        for pair, (one, other) in enumerate(zip(*PAIRS, strict=True)):
            for degree in range(5):
                legendre = np.polynomial.legendre.legval(direction[own] @ direction[own].T, [0.0] * degree + [1.0])
                has = direction[own].square().sum(1) > 0.5
                legendre = np.where(has[:, None] & has[None], legendre, float(degree == 0))
                expected = weight[own, one] @ torch.tensor(legendre) @ weight[own, other]
                torch.testing.assert_close(found[atom, pair, degree], expected, rtol=0, atol=1e-12)


@with_kernels
def test_the_number_of_threads_does_not_change_a_bit() -> None:
    vector, weight, offsets, _ = bonds(torch.float32)
    many = torch.cat([offsets[:1], *(offsets[1:] + i * len(vector) for i in range(40))])
    direction, weight = unit(vector).repeat(40, 1), weight.repeat(40)[:, None].repeat(1, 3)
    grad = torch.ones(200, 4, 7)
    same_bits_on_threads(
        lambda: [
            torch.ops.escaip.power_spectrum(direction, weight, many, *PAIRS, 6),
            *torch.ops.escaip.power_spectrum_backward(grad, direction, weight, many, *PAIRS),
        ]
    )


@with_kernels
@pytest.mark.parametrize("pairs", [(None, None), (torch.zeros(2).long(), torch.zeros(2).long())])
def test_operators_keep_the_contract_of_the_dispatcher(pairs: tuple[Any, Any]) -> None:
    vector, weight, offsets, _ = bonds(torch.float32)
    direction, weight = unit(vector).requires_grad_(), weight[:, None].requires_grad_()
    torch.library.opcheck(torch.ops.escaip.power_spectrum.default, (direction, weight, offsets, *pairs, 3))
    grad = torch.ones(5, 1 if pairs[0] is None else 2, 4, requires_grad=True)
    torch.library.opcheck(torch.ops.escaip.power_spectrum_backward.default, (grad, direction, weight, offsets, *pairs))


@with_kernels
@pytest.mark.bad_input
def test_a_third_derivative_is_refused_with_the_remedy() -> None:
    vector, weight, offsets, center = bonds()
    direction = unit(vector).requires_grad_()
    x = power_spectrum(direction, weight[:, None], center, 5, 3, offsets=offsets).sum()
    for _ in range(2):
        (x,) = torch.autograd.grad(x.square().sum(), direction, create_graph=True)
    with pytest.raises(ConfigError, match="a third was asked for"):
        torch.autograd.grad(x.sum(), direction)
