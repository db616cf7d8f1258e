"""Learning rates and first weights of models of another width."""

from __future__ import annotations

import pytest
import torch
from training_stand_ins import TINY

from escaip import EScAIPConfig, Potential
from escaip.errors import ConfigError
from escaip.train import PotentialModule
from escaip.train.mup import fan_in_ratios, scale_outputs
from escaip.train.optim import make_schedule, parameter_groups

WIDE = {**TINY, "hidden_size": 64, "num_heads": 8, "num_layers": 2}


def test_heads_become_more_and_not_larger() -> None:
    config = EScAIPConfig.from_dict(WIDE)
    assert (config.at_width(16).hidden_size, config.at_width(16).num_heads) == (16, 2)
    assert config.at_width(64) == config


@pytest.mark.bad_input
@pytest.mark.parametrize("width", [0, 20])
def test_a_width_without_whole_heads(width: int) -> None:
    with pytest.raises(ConfigError, match=rf"width of {width} is not a multiple of the size of a head, 8"):
        PotentialModule(WIDE, base_width=width)


def test_ratios_are_those_of_the_inputs() -> None:
    ratios = fan_in_ratios(EScAIPConfig.from_dict(WIDE), 16)
    assert set(ratios.values()) == {4.0}
    hidden = {"blocks.0.attention.query.weight", "blocks.1.message.mix.weight", "node_projection.linear.weight"}
    assert hidden | {"energy_head.mlp.output.weight"} <= set(ratios)
    # Their inputs are elements and distances, as many at any width.
    assert not any("attributes" in name for name in ratios)
    assert fan_in_ratios(EScAIPConfig.from_dict(WIDE), 64) == {}


def test_rates_and_decay_of_groups() -> None:
    module = PotentialModule(WIDE, learning_rate=0.01, weight_decay=0.1, base_width=16)
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    groups = parameter_groups(module, 0.1, 0.01, module._ratios)
    found = {names[id(p)]: (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert set(found) == set(names.values())
    assert found["potential.model.blocks.0.attention.query.weight"] == pytest.approx((0.0025, 0.4))
    assert found["potential.model.blocks.0.attention.query.bias"] == (0.01, 0.0)
    assert found["potential.model.attributes.source.project.weight"] == (0.01, 0.1)
    assert found["potential.model.attributes.source.element.weight"] == (0.01, 0.0)
    assert groups[0]["lr"] == 0.01  # what is logged


def test_the_schedule_keeps_the_ratios() -> None:
    module = PotentialModule(WIDE, learning_rate=0.01, base_width=16)
    optimizer = torch.optim.AdamW(parameter_groups(module, 0.1, 0.01, module._ratios))
    schedule = make_schedule(optimizer, 10, 0.2, 0.1)
    for _ in range(10):
        rates = {group["lr"] for group in optimizer.param_groups}
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
    outputs = {"energy_head.mlp.output.weight"} | ({"force_head.vector.output.weight"} if forces == "direct" else set())
    assert changed == outputs
    for name in outputs:
        assert torch.allclose(2.0 * scaled.get_parameter(name), fresh.get_parameter(name))


def test_at_the_base_width_nothing_changes() -> None:
    torch.manual_seed(0)
    plain = PotentialModule(WIDE)
    torch.manual_seed(0)
    module = PotentialModule(WIDE, base_width=64)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), module.parameters(), strict=True))
    sizes = [[len(g["params"]) for g in parameter_groups(m, 0.1, 0.01, m._ratios)] for m in (plain, module)]
    assert sizes[0] == sizes[1]
