"""Which weights decay, learning rates at every step and width, first weights, and the check of coordinates."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from coordinates import check_coordinates
from training_stand_ins import TINY, labelled_molecules

from escaip import EScAIPConfig, Potential
from escaip.data.structure import AtomicData, collate
from escaip.errors import ConfigError
from escaip.train import PotentialModule
from escaip.train.mup import fan_in_ratios, scale_outputs
from escaip.train.optim import make_optimizer, make_schedule, parameter_groups, warmup_cosine
from escaip.train.soap import SOAP

WIDE = {**TINY, "hidden_size": 64, "num_heads": 8, "num_layers": 2}


def test_only_linear_weights_decay() -> None:
    potential = Potential(EScAIPConfig.from_dict({**TINY, "norm": "layernorm"}))
    decayed, kept = parameter_groups(potential, 0.1)
    names = {id(parameter): name for name, parameter in potential.named_parameters()}
    linear = {name + ".weight" for name, module in potential.named_modules() if isinstance(module, torch.nn.Linear)}
    assert {names[id(p)] for p in decayed["params"]} == linear
    rest = {names[id(p)] for p in kept["params"]}
    assert rest == set(names.values()) - linear
    assert any("norm" in name for name in rest)
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)

    layer = torch.nn.Linear(2, 2)
    layer.weight.requires_grad_(False)
    (group,) = parameter_groups(layer, 0.1)
    assert (group["params"], group["weight_decay"]) == ([layer.bias], 0.0)


def test_optimizers_by_name() -> None:
    layer = torch.nn.Linear(3, 2)
    assert isinstance(make_optimizer(layer, 0.1, 0.0, name="soap"), SOAP)
    assert isinstance(make_optimizer(layer, 0.1, 0.0), torch.optim.AdamW)
    with pytest.raises(ConfigError, match="'sgd' is not one of adamw, soap"):
        make_optimizer(layer, 0.1, 0.0, name="sgd")


def test_warm_up_then_cosine_to_the_last_step() -> None:
    factor = warmup_cosine(total_steps=101, warmup_steps=10, final_fraction=0.01)
    values = [factor(step) for step in range(101)]
    assert values[0] == pytest.approx(1 / 11)
    assert all(b - a == pytest.approx(1 / 11) for a, b in itertools.pairwise(values[:11]))
    assert values[10] == 1.0
    assert all(a > b for a, b in itertools.pairwise(values[10:]))
    assert [values[55], values[100], factor(1000)] == pytest.approx([0.505, 0.01, 0.01])
    assert warmup_cosine(1, 0, 0.01)(0) == 1.0


@pytest.mark.bad_input
def test_an_endless_run_has_no_schedule() -> None:
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    with pytest.raises(ConfigError, match=r"set trainer\.max_steps"):
        make_schedule(optimizer, math.inf, 0.1, 0.01)


def test_rates_and_decay_at_another_width() -> None:
    config = EScAIPConfig.from_dict(WIDE)
    ratios = fan_in_ratios(config, 16)
    assert set(ratios.values()) == {4.0}
    assert not any("attributes" in name for name in ratios)  # as many elements and distances at any width
    assert fan_in_ratios(config, 64) == {}

    potential = Potential(config)
    names = {id(parameter): name for name, parameter in potential.model.named_parameters()}
    optimizer = torch.optim.AdamW(parameter_groups(potential.model, 0.1, 0.01, ratios))
    groups = optimizer.param_groups
    found = {names[id(p)]: (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert set(found) == set(names.values())
    assert found["blocks.0.attention.query.weight"] == pytest.approx((0.0025, 0.4))
    assert found["blocks.0.attention.query.bias"] == (0.01, 0.0)
    assert found["attributes.source.project.weight"] == (0.01, 0.1)
    assert found["attributes.source.element.weight"] == (0.01, 0.0)
    assert groups[0]["lr"] == 0.01  # logged as the learning rate
    schedule = make_schedule(optimizer, 10, 0.2, 0.1)
    for _ in range(10):
        rates = {group["lr"] for group in groups}
        assert max(rates) == pytest.approx(4 * min(rates))
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize("forces", ["conservative", "direct"])
def test_only_outputs_start_smaller(forces: str) -> None:
    config = EScAIPConfig.from_dict({**WIDE, "forces": forces})
    torch.manual_seed(0)
    fresh = Potential(config).model
    torch.manual_seed(0)
    scaled = Potential(config).model
    scale_outputs(scaled, config, 16)
    changed = {n for n, p in scaled.named_parameters() if not torch.equal(p, fresh.get_parameter(n))}
    densities = {"input_density", *(f"blocks.{depth}.density" for depth in range(config.num_layers))}
    outputs = {"energy_head.mlp.output.weight", *(f"{name}.weight.weight" for name in densities)}
    outputs |= {"force_head.vector.output.weight"} if forces == "direct" else set()
    assert changed == outputs
    for name in outputs:
        assert torch.allclose(2.0 * scaled.get_parameter(name), fresh.get_parameter(name))


def test_the_base_width_in_a_training() -> None:
    """Nothing changes at the base width; others start from scaled outputs; a width without whole heads is refused."""
    modules = {}
    for width in (None, 64, 16):
        torch.manual_seed(0)
        modules[width] = PotentialModule(WIDE, base_width=width)
    outputs = "potential.model.energy_head.mlp.output.weight"
    assert all(torch.equal(p, modules[None].get_parameter(n)) for n, p in modules[64].named_parameters())
    assert torch.allclose(2.0 * modules[16].get_parameter(outputs), modules[None].get_parameter(outputs))
    with pytest.raises(ConfigError, match="width of 20 is not a multiple of the size of a head, 8"):
        PotentialModule(WIDE, base_width=20)


@pytest.fixture(scope="module")
def batch() -> Any:
    structures = labelled_molecules(4)
    batch = collate([AtomicData.from_ase(atoms) for atoms in structures])
    batch.energy = batch.energy - batch.energy.mean()
    return batch


@pytest.mark.parametrize("forces", ["conservative", "direct"])
def test_flat_in_width_with_a_base_width_alone(batch: Any, forces: str) -> None:
    config = EScAIPConfig.from_dict({**TINY, "num_layers": 2, "forces": forces})
    options: dict[str, Any] = {"steps": 3, "learning_rate": 3e-3, "seeds": (0, 1)}
    flat = check_coordinates(config, batch, (32, 64, 128), base_width=32, **options).slopes()
    usual = check_coordinates(config, batch, (32, 64, 128), base_width=None, **options).slopes()
    assert set(flat) == {"block 0", "block 1", "energy", "forces"}
    for block in ("block 0", "block 1"):
        assert abs(flat[block]) < 0.25
        assert usual[block] > 0.4
    assert flat["energy"] < 0.4


@pytest.mark.bad_input
def test_one_width_is_not_compared(batch: Any) -> None:
    with pytest.raises(ConfigError, match="give two or more"):
        check_coordinates(EScAIPConfig.from_dict(TINY), batch, (32,), base_width=32)
