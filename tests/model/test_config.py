"""Model settings: sizes, presets, and one clear line for each thing that cannot work."""

from __future__ import annotations

import json

import pytest

from escaip.errors import ConfigError
from escaip.models import EScAIP, EScAIPConfig

SIZES = {"300k": 3e5, "1m": 1e6, "5m": 5e6, "20m": 20e6, "45m": 45e6, "85m": 85e6}


@pytest.mark.parametrize("name", SIZES)
def test_presets_have_the_size_they_are_named_after(name: str) -> None:
    import torch

    with torch.device("meta"):
        model = EScAIP(EScAIPConfig.preset(name))
    parameters = sum(p.numel() for p in model.parameters())
    assert abs(parameters / SIZES[name] - 1) < 0.15


def test_round_trip_through_json() -> None:
    config = EScAIPConfig.preset("5m", cutoff=5.0, num_neighbors=None, angular_channels=None)
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
        ({"cutoff": -1.0}, "cutoff is -1.0"),
        ({"forces": "gradient"}, "choose conservative or direct"),
        ({"activation": "relu"}, "has a kink"),
        ({"activation": "swish9"}, "activation 'swish9' does not exist"),
        ({"norm": "batchnorm"}, "choose rmsnorm"),
        ({"num_neighbors": 0}, "null for a plain radius graph"),
        ({"dropout": 1.0}, r"must be in \[0, 1\)"),
        ({"attention_backend": "cudnn"}, "choose auto"),
        ({"boo_degrees": 11}, "at most 10"),
    ],
)
def test_settings_that_cannot_work_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EScAIPConfig.from_dict(values)
