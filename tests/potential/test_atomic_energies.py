"""Atomic energies and scale of a potential that is trained on several data sets."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import make_potential

from escaip.data import Statistics
from escaip.errors import ConfigError


def statistics(force_rms: float, num_structures: int, **changes: Any) -> Statistics:
    values = {"label_counts": {"energy": num_structures, "forces": num_structures}, **changes}
    return Statistics(
        {1: -1.0, 8: -2.0 * force_rms}, force_rms, 0.1, (1, 8), num_structures, 3 * num_structures, **values
    )


SETS = {"first": statistics(1.0, 30), "second": statistics(2.0, 10), "energies": statistics(9.0, 10, label_counts={})}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [1.75**0.5] * 3),  # by structures
        ({"shares": {"first": 1.0, "second": 3.0, "energies": 4.0}}, [3.25**0.5] * 3),
        ({"scale": "per_set"}, [1.0, 2.0, 1.0]),
    ],
)
def test_the_scale_is_the_force_rms_of_the_mixture(options: dict[str, Any], expected: list[float]) -> None:
    potential = make_potential()
    potential.set_statistics(SETS, **options)
    assert potential.datasets == tuple(SETS)
    assert potential.scale.tolist() == pytest.approx(expected)
    assert potential.element_references[:, 8].tolist() == [-2.0, -4.0, -18.0]
    assert torch.isnan(potential.element_references[:, 6]).all()


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("sets", "scale", "message"),
    [(SETS, "mean", "'mean' is not shared or per_set"), (statistics(0.0, 3), "shared", "all its forces are zero")],
)
def test_what_has_no_scale(sets: Any, scale: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_potential().set_statistics(sets, scale=scale)
