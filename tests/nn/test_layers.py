"""Layers against their formulas, written out."""

from __future__ import annotations

import pytest
import torch

from escaip.errors import DataError
from escaip.nn.embedding import AtomFeatures, EdgeAttributes, GaussianBasis, SystemEmbedding
from escaip.nn.layers import NORM_EPS, RMSNorm, StochasticDepth
from escaip.types import AtomInputs, Tokens


def test_gaussian_basis_formula() -> None:
    basis = GaussianBasis(13, 6.0, 2.0).double()
    distance = torch.tensor([0.0, 1.3, 6.0], dtype=torch.float64)
    spacing = 0.5
    expected = torch.stack(
        [torch.exp(-((distance - spacing * n) ** 2) / (2 * (2 * spacing) ** 2)) for n in range(13)], -1
    )
    torch.testing.assert_close(basis(distance), expected, rtol=1e-6, atol=1e-7)


def test_rms_norm_matches_torch_and_differentiates_twice() -> None:
    x = torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    norm = RMSNorm(8).double()
    expected = torch.nn.functional.rms_norm(x, (8,), norm.weight, NORM_EPS)
    torch.testing.assert_close(norm(x), expected)
    assert torch.autograd.gradgradcheck(norm, (x,))


def test_edge_attributes_equal_the_concatenated_linear_layer() -> None:
    """The split into per-atom and per-token parts is exact: one weight matrix over [distance, source, target]."""
    torch.manual_seed(1)
    layer = EdgeAttributes(GaussianBasis(7, 6.0, 2.0), "never", 8, 20, 4, 3, 5, 6, 8, "gelu", "rmsnorm", 0.0).double()
    numbers, order = torch.tensor([1, 6, 8]), torch.rand(3, 3, dtype=torch.float64)
    neighbor, center = torch.tensor([0, 1, 2, 1, 0]), torch.tensor([0, 0, 0, 1, 2])
    radial = torch.rand(5, 7, dtype=torch.float64)
    gelu = torch.nn.functional.gelu

    def raw(end: AtomFeatures) -> torch.Tensor:
        return torch.cat([gelu(end.order(order)), end.element(numbers)], -1)

    weight = torch.cat([layer.distance_project.weight, layer.source.project.weight, layer.target.project.weight], 1)
    joined = torch.cat(
        [gelu(layer.distance_embedding(radial)), raw(layer.source)[neighbor], raw(layer.target)[center]], 1
    )
    expected = layer.norm(gelu(joined @ weight.T + layer.target.project.bias))
    none = torch.empty(0)
    tokens = Tokens(0, none, none, center, neighbor, none, none, none)
    torch.testing.assert_close(layer(layer.distance.exact(radial), layer.ends(numbers, order), tokens), expected)


def test_stochastic_depth_drops_whole_systems_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    drop = StochasticDepth(0.25).train()
    first, atom = 2 * torch.arange(4000).repeat_interleave(2), torch.arange(8000)
    kept = drop(torch.ones(8000, 1), first, atom).view(4000, 2)
    assert (kept[:, 0] == kept[:, 1]).all()
    assert sorted(kept.unique().tolist()) == pytest.approx([0.0, 1 / 0.75])
    assert kept.mean().item() == pytest.approx(1.0, abs=0.05)
    rows = drop(torch.ones(4, 1), torch.tensor([0, 0, 2]), torch.tensor([0, 1, 1, 0]))
    assert (rows == rows[0]).all()
    assert (drop.eval()(torch.ones(8, 1), first[:8], atom[:8]) == 1).all()


def test_system_embedding_distinguishes_charges_and_spins() -> None:
    torch.manual_seed(0)
    embed = SystemEmbedding(4, charge=True, spin=True)
    token, zeros = torch.zeros(3, 4), torch.zeros(2, dtype=torch.int64)
    atoms, center = AtomInputs(zeros, torch.tensor([-1, 2]), torch.tensor([1, 2]), zeros), torch.tensor([0, 1, 1])
    out = embed(token, atoms, center)
    assert not torch.equal(out[0], out[1])
    assert torch.equal(out[1], out[2])
    unused = SystemEmbedding(4, charge=False, spin=False)
    assert unused(token, atoms, center) is token


@pytest.mark.bad_input
def test_charge_out_of_range_is_named() -> None:
    embed = SystemEmbedding(4, charge=True, spin=False)
    with pytest.raises(DataError, match="total charge outside"):
        embed.check(torch.tensor([99]), torch.tensor([1]))
