"""A fresh model sees the geometry, starts near zero, and its direct forces can grow."""

from __future__ import annotations

import pytest
import torch

from escaip import EScAIPConfig
from escaip.models import EScAIP
from escaip.nn.embedding import EdgeAttributes, GaussianBasis


@pytest.fixture(params=[(32, 1.0), (128, 2.0), (600, 2.0)], ids=lambda value: f"{value[0]}x{value[1]}")
def model(request: pytest.FixtureRequest) -> EScAIP:
    """A fresh one with direct forces, and so every kind of layer."""
    torch.manual_seed(0)
    num_radial, width = request.param
    return EScAIP(EScAIPConfig.preset("1m", num_radial=num_radial, radial_width=width, forces="direct"))


def test_the_distance_has_as_large_a_share_of_a_fresh_token_as_the_elements(model: EScAIP) -> None:
    attributes = model.attributes
    assert isinstance(attributes, EdgeAttributes)
    with torch.no_grad():
        radial = model.attributes.distance.basis(torch.linspace(0.5, 5.5, 400))
        embedded = attributes.distance_embedding(radial)
        assert embedded.std().item() == pytest.approx(1.0, abs=0.1)
        distance = attributes.distance_project(attributes.activation(embedded)).std(0).mean()
        atoms = attributes.source(torch.arange(1, 90), torch.rand(89, 10)).std(0).mean()
    assert float(distance / atoms) == pytest.approx(1.0, abs=0.4)


def test_squares_of_the_gaussians_sum_to_root_pi_times_their_width() -> None:
    for width in (1.0, 2.0):
        squares = GaussianBasis(64, 6.0, width)(torch.linspace(1.0, 5.0, 50)).square().sum(-1)
        torch.testing.assert_close(squares, torch.full((50,), torch.pi**0.5 * width), rtol=1e-3, atol=0.0)


def test_outputs_start_near_zero_and_the_magnitude_of_direct_forces_near_one(model: EScAIP) -> None:
    features = torch.randn(200, model.config.hidden_size)
    with torch.no_grad():
        energies = model.energy_head(features)
        vectors = model.force_head.vector(features)
        magnitudes = model.force_head.magnitude(features)
    for outputs in (energies, vectors):
        assert outputs.std().item() == pytest.approx(0.06, rel=0.5)
    assert magnitudes.mean().item() == pytest.approx(1.0, abs=0.1)
    assert magnitudes.std().item() < 0.3


def test_biases_start_at_zero(model: EScAIP) -> None:
    biases = [value for name, value in model.named_parameters() if name.endswith(".bias") and "magnitude" not in name]
    assert biases
    assert all(not bias.any() for bias in biases)
