"""Layers, settings and options of the models: formulas, what each option changes, and how a fresh model starts."""

from __future__ import annotations

import copy
import json
from typing import Any

import ase.build
import pytest
import tiny
import torch
from tiny import batch_of

from escaip.data import AtomicData, collate
from escaip.errors import ConfigError, DataError
from escaip.models import EScAIP, EScAIPConfig
from escaip.nn.embedding import AtomFeatures, EdgeAttributes, GaussianBasis, SystemEmbedding
from escaip.nn.init import valence_electrons
from escaip.nn.layers import NORM_EPS, RMSNorm, StochasticDepth
from escaip.potential import Potential
from escaip.types import AtomInputs, Tokens


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
    atoms, center = (
        AtomInputs(zeros, torch.tensor([-1, 2]), torch.tensor([1, 2]), zeros, zeros),
        torch.tensor([0, 1, 1]),
    )
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


SIZES = {"300k": 3e5, "1m": 1e6, "5m": 5e6, "20m": 20e6, "45m": 45e6, "85m": 85e6}


@pytest.mark.parametrize("name", SIZES)
def test_presets_have_the_size_they_are_named_after(name: str) -> None:
    import torch

    with torch.device("meta"):
        model = EScAIP(EScAIPConfig.preset(name))
    parameters = sum(p.numel() for p in model.parameters())
    assert abs(parameters / SIZES[name] - 1) < 0.15


def test_round_trip_through_json() -> None:
    config = EScAIPConfig.preset("5m", cutoff=5.0, num_neighbors=None, angular_channels=None, angular_values=False)
    assert EScAIPConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_expanded_scale_is_one_over_the_root_of_the_padded_width() -> None:
    config = EScAIPConfig(hidden_size=64, num_heads=1, angular_channels=(20, 10, 4, 10, 20), attention_scale="expanded")
    assert config.scale == pytest.approx(320**-0.5)
    small = EScAIPConfig(hidden_size=8, num_heads=1, angular_channels=(3, 2, 1, 1, 1), attention_scale="expanded")
    assert small.scale == pytest.approx(32**-0.5)  # 30 padded to 32


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hiden_size": 64}, "did you mean 'hidden_size'"),
        ({"preset": "2m"}, "choose 300k, 1m, 5m"),
        ({"hidden_size": 100, "num_heads": 3, "angular_channels": None}, "not a multiple of num_heads"),
        ({"angular_channels": (1, 2, 3)}, "must sum to"),
        ({"angular_channels": None, "angular_values": True}, "needs angular_channels"),
        ({"cutoff": -1.0}, "cutoff is -1.0"),
        ({"forces": "gradient"}, "choose conservative or direct"),
        ({"activation": "relu"}, "has a kink"),
        ({"activation": "swish9"}, "activation 'swish9' does not exist"),
        ({"norm": "batchnorm"}, "choose rmsnorm"),
        ({"num_neighbors": 0}, "null for a plain radius graph"),
        ({"dropout": 1.0}, r"must be in \[0, 1\)"),
        ({"attention_backend": "cudnn"}, "choose auto"),
        ({"boo_degrees": 11}, "at most 10"),
        ({"density_radial": 1}, "density_radial is 1"),
        ({"node_density": -1}, "must be 0 for none, or above"),
        ({"node_density_degree": 0}, r"must be in 1 \.\. 16"),
        ({"density_degree": 17}, "density_degree is 17"),
        ({"density_channels": 0}, "density_channels is 0"),
        ({"density_radial": 4, "forces": "direct"}, "density_radial is for conservative forces"),
    ],
)
def test_settings_that_cannot_work_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EScAIPConfig.from_dict(values)


@pytest.fixture(params=[(10, 1.0), (128, 2.0), (600, 2.0)], ids=lambda value: f"{value[0]}x{value[1]}")
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
        atoms = attributes.source(torch.arange(1, 90), torch.rand(89, model.config.boo_degrees)).std(0).mean()
    assert float(distance / atoms) == pytest.approx(1.0, abs=0.4)


def test_elements_begin_as_their_neighbors_in_the_periodic_table(model: EScAIP) -> None:
    for module in (one for one in model.modules() if isinstance(one, AtomFeatures)):
        fluorine, chlorine, iron = module.element.weight[[9, 17, 26]]
        assert (fluorine - chlorine).norm() < 0.7 * min((fluorine - iron).norm(), (chlorine - iron).norm())
        assert module.element.weight.std().item() == pytest.approx(1.0, abs=0.15)
        assert module.element.weight.unique(dim=0).shape[0] > 118


def test_valence_electrons_are_those_of_the_periodic_table() -> None:
    table = valence_electrons(119)
    period, s, p, d, f = range(5)
    zinc, gallium, krypton, rubidium, cerium = table[[30, 31, 36, 37, 58]]
    assert torch.equal(zinc[[period, s, d]], krypton[[period, s, d]])  # full, and of one period
    assert zinc[p] < gallium[p] < krypton[p] == table[:, p].max()
    assert rubidium[period] > krypton[period]
    assert rubidium[d] == table[:, d].min()
    assert cerium[f] > table[56, f] == table[:, f].min()
    torch.testing.assert_close(table.std(0), torch.ones(5))


def test_ions_begin_almost_as_the_neutral_molecule() -> None:
    weight = EScAIP(EScAIPConfig.preset("300k", charge=True)).system_embedding.charge.weight
    assert 0.05 < weight.std() < 0.15


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


OPTIONS = [
    {},
    {"soft": False},
    {"num_neighbors": None},
    {"rank_step": "bump"},
    {"message_gate": True},
    {"aggregation": "graph_attention"},
    {"norm": "layernorm"},
    {"norm": "skip"},
    {"activation": "silu"},
    {"angular_channels": None},
    {"angular_values": True},
    {"node_density": 3},
    {"edge_ffn": False},
    {"attention_scale": "expanded"},
    {"boo_weighting": "uniform"},
    {"charge": True, "spin": True},
    {"energy_norm": False},
    {"num_energy_heads": 2},
    {"attention_backend": "reference"},
]


def make_potential(**overrides: Any) -> Potential:
    return tiny.make_potential(**{"dtype": torch.float32, "num_layers": 2, **overrides})


@pytest.mark.parametrize("forces", ["conservative", "direct"])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: ",".join(map(str, o)) or "default")
def test_every_option_trains_on_energy_and_forces(options: dict[str, object], forces: str) -> None:
    potential = make_potential(**{**options, "forces": forces}).train()
    prediction = potential(batch_of(), compute_stress=forces == "conservative")
    assert prediction.energy.dtype == torch.float64
    assert prediction.forces.shape == (14, 3)
    loss = prediction.energy.sum() + prediction.forces.square().sum()
    if prediction.stress is not None:
        assert torch.isnan(prediction.stress[0]).all()  # the molecule has no cell
        loss = loss + prediction.stress[1].square().sum()
    loss.backward()
    missing = [name for name, p in potential.named_parameters() if p.grad is None]
    assert not missing  # a head owns no parameter it never uses
    assert all(torch.isfinite(p.grad).all() for p in potential.parameters())


@pytest.mark.parametrize("name", ["dropout", "attention_dropout", "node_dropout", "edge_dropout",
                                  "scalar_dropout", "stochastic_depth", "vector_dropout"])  # fmt: skip
def test_regularisation_acts_in_training_only(name: str) -> None:
    potential = make_potential(**{"forces": "direct", name: 0.5})
    plain = make_potential(forces="direct")
    plain.load_state_dict(potential.state_dict())
    batch = batch_of()
    assert torch.equal(potential.eval()(batch).energy, plain.eval()(batch).energy)
    trained = [potential.train()(batch) for _ in range(6)]
    drawn = {(*x.energy.tolist(), *x.forces.flatten().tolist()) for x in trained}
    assert len(drawn) > 1


@pytest.mark.parametrize(
    "change",
    [{"soft": False}, {"num_neighbors": None}, {"rank_step": "bump"}, {"attention_scale": "expanded"},
     {"angular_values": True}, {"boo_weighting": "uniform"}, {"boo_floor": 1e-2}, {"activation": "silu"}],
)  # fmt: skip
def test_options_without_parameters_change_the_function(change: dict[str, object]) -> None:
    # 3 neighbors, so that ranks matter.
    one = make_potential(num_neighbors=3).eval()
    other = make_potential(**{"num_neighbors": 3, **change}).eval()
    other.load_state_dict(one.state_dict())
    batch = batch_of()
    assert (one(batch).energy - other(batch).energy).abs().max() > 1e-6


@pytest.mark.parametrize("angular_values", [False, True])
def test_skipping_unread_edges_of_the_last_block_is_exact(angular_values: bool) -> None:
    """The conservative model computes N rows there; the direct one, with the same weights, all T."""
    direct = make_potential(forces="direct", angular_values=angular_values).double().eval()
    conservative = make_potential(angular_values=angular_values).double().eval()
    names = set(conservative.state_dict())
    conservative.load_state_dict({k: v for k, v in direct.state_dict().items() if k in names})
    batch = batch_of()
    torch.testing.assert_close(conservative(batch).energy, direct(batch).energy, rtol=1e-12, atol=1e-12)


def test_charge_and_spin_matter_only_when_asked_for() -> None:
    neutral, charged = ase.build.molecule("CH3OH"), ase.build.molecule("CH3OH")
    charged.info.update(charge=1, spin_multiplicity=2)
    batch = collate([AtomicData.from_ase(neutral), AtomicData.from_ase(charged)])
    aware = make_potential(charge=True, spin=True).eval()(batch).energy
    assert (aware[0] - aware[1]).abs() > 1e-5
    batch.charge[:] = 0
    plain = make_potential().eval()(batch).energy
    assert plain[0] == pytest.approx(plain[1].item(), rel=1e-6)


@pytest.mark.parametrize("forces", ["conservative", "direct"])
def test_a_head_among_several_is_as_if_it_were_alone(forces: str) -> None:
    """To the last bit, beside structures of other sets."""
    structures = [ase.build.molecule(name) for name in ("CH3OH", "CH4", "H2O")]
    potential, batch, sets = make_potential(forces=forces, num_energy_heads=3), batch_of(*structures), (2, 0, 1)
    batch.dataset = torch.tensor(sets)
    found, energies = potential(batch), []
    for place, number in enumerate(sets):
        alone = copy.deepcopy(potential)
        alone.model.take_heads([number])
        alone.config = alone.model.config
        assert alone.datasets == ()
        plain = make_potential(forces=forces)
        plain.load_state_dict(alone.state_dict())  # names and shapes of a model with one head
        expected, own = plain(batch), batch.batch == place
        assert torch.equal(found.energy[place], expected.energy[place])
        assert torch.equal(found.forces[own], expected.forces[own])
        energies.append(round(expected.energy[0].item(), 4))
    assert len(set(energies)) == 3


def test_forward_does_not_change_its_batch() -> None:
    batch = batch_of()
    before = batch.clone()
    make_potential().eval()(batch, compute_stress=True)
    assert set(batch.keys()) == set(before.keys())
    for key in ("positions", "cell", "atomic_numbers", "pbc"):
        assert torch.equal(batch[key], before[key])
        assert not batch[key].requires_grad


def test_construction_touches_no_global_state() -> None:
    before = (torch.get_default_dtype(), torch.get_float32_matmul_precision())
    EScAIP(EScAIPConfig.preset("300k"))
    assert (torch.get_default_dtype(), torch.get_float32_matmul_precision()) == before
