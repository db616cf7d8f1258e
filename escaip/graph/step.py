"""The step between two ranks: 0 where a neighbor is surely farther, 1 where it is surely nearer."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from escaip.errors import ConfigError

SUPPORT = {"sine": math.pi, "bump": 4.0}
# The bump's exponent reaches ±800 here: its value is exactly 0 or 1 and its derivatives exactly 0 in float64.
_BUMP_EDGE = 0.9975


def step_support(name: str) -> float:
    """Returns ``|x|`` beyond which the step is constant.

    Raises:
        ConfigError: no such step.
    """
    if name not in SUPPORT:
        raise ConfigError(f"rank_step {name!r} does not exist: choose {' or '.join(SUPPORT)}")
    return SUPPORT[name]


def rank_step(x: Tensor, name: str) -> Tensor:
    """Computes the step of ``x``, any shape, without unit; derivatives are exactly 0 outside of its support.

    ``"sine"``: ``½ + ½ sin(x/2)`` for ``|x| < π`` (EScAIP, arXiv 2410.24169), continuous with its first
    derivative. ``"bump"``: ``e^{−2/(y+1)} / (e^{−2/(y+1)} + e^{−2/(1−y)})`` with ``y = x/4`` for ``|x| < 4``
    (AllScAIP, arXiv 2603.06567), evaluated as ``sigmoid(4y / (1 − y²))``; every derivative is continuous.

    Raises:
        ConfigError: no such step.
    """
    support = step_support(name)
    if name == "sine":
        return 0.5 + 0.5 * torch.sin(0.5 * x.clamp(-support, support))
    y = (x / support).clamp(-_BUMP_EDGE, _BUMP_EDGE)
    return torch.sigmoid(4.0 * y / (1.0 - y * y))
