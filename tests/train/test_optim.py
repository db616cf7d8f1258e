"""Which weights decay, and the learning rate at every step."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from training_stand_ins import TINY

from escaip import EScAIPConfig, Potential
from escaip.errors import ConfigError
from escaip.train.optim import make_schedule, parameter_groups, warmup_cosine


def test_only_linear_weights_decay() -> None:
    potential = Potential(EScAIPConfig.from_dict({**TINY, "norm": "layernorm"}))
    decayed, kept = parameter_groups(potential, 0.1)
    names = {id(parameter): name for name, parameter in potential.named_parameters()}
    linear = {name + ".weight" for name, module in potential.named_modules() if isinstance(module, torch.nn.Linear)}
    assert {names[id(p)] for p in decayed["params"]} == linear
    rest = {names[id(p)] for p in kept["params"]}
    assert rest == set(names.values()) - linear
    assert any("norm" in name for name in rest)
    assert any(isinstance(module, torch.nn.Embedding) for module in potential.modules())
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    assert all(p.ndim == 2 for p in decayed["params"])


def test_frozen_weights_are_left_out() -> None:
    layer = torch.nn.Linear(2, 2)
    layer.weight.requires_grad_(False)
    (group,) = parameter_groups(layer, 0.1)
    assert group["params"] == [layer.bias]
    assert group["weight_decay"] == 0.0


def test_warm_up_then_cosine_to_the_last_step() -> None:
    factor = warmup_cosine(total_steps=101, warmup_steps=10, final_fraction=0.01)
    values = [factor(step) for step in range(101)]
    assert values[0] == pytest.approx(1 / 11)
    assert all(b - a == pytest.approx(1 / 11) for a, b in itertools.pairwise(values[:11]))
    assert values[10] == 1.0
    assert all(a > b for a, b in itertools.pairwise(values[10:]))
    assert values[55] == pytest.approx(0.505)
    assert values[100] == pytest.approx(0.01)
    assert factor(1000) == pytest.approx(0.01)


def test_a_single_step_has_a_rate() -> None:
    assert warmup_cosine(1, 0, 0.01)(0) == 1.0


@pytest.mark.bad_input
def test_an_endless_run_has_no_schedule() -> None:
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    with pytest.raises(ConfigError, match=r"set trainer\.max_steps"):
        make_schedule(optimizer, math.inf, 0.1, 0.01)
