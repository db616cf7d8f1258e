"""The coordinate check of Yang et al. (arXiv:2203.03466, appendix D.1).

With maximal-update parametrisation features and outputs move by the same amount at every width; with the standard one
those of wide models move further, until training diverges.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from escaip.errors import ConfigError
from escaip.models import EScAIPConfig
from escaip.potential import Potential
from escaip.train.losses import LossSettings, loss_sums
from escaip.train.mup import fan_in_ratios, scale_outputs
from escaip.train.optim import make_optimizer
from escaip.types import StructureBatch


@dataclass(frozen=True)
class CoordinateCheck:
    """Changes since the start of training.

    Attributes:
        widths: ``hidden_size`` of each model.
        changes: coordinate to the root mean square of its change ``(steps, widths)``, means over seeds. ``block 0`` and
            on are node features, ``energy`` and ``forces`` the predictions.
    """

    widths: tuple[int, ...]
    changes: dict[str, np.ndarray]

    def slopes(self, step: int = -1) -> dict[str, float]:
        """Returns ``d log(change) / d log(width)`` of each coordinate after a step; 0: independent of the width."""
        logs = np.log(self.widths)
        return {name: float(np.polyfit(logs, np.log(values[step]), 1)[0]) for name, values in self.changes.items()}


def check_coordinates(
    config: EScAIPConfig,
    batch: StructureBatch,
    widths: Sequence[int] = (64, 128, 256, 512),
    *,
    base_width: int | None,
    steps: int = 4,
    learning_rate: float = 1e-3,
    losses: LossSettings | None = None,
    seeds: Sequence[int] = (0, 1, 2),
) -> CoordinateCheck:
    """Trains fresh models of several widths on one batch for some steps of AdamW.

    Args:
        config: the model at any width.
        batch: labelled structures.
        widths: multiples of the size of a head.
        base_width: of the parametrisation; None for the standard one.
        steps: number of steps.
        learning_rate: at the base width; constant.
        losses: default those of training.
        seeds: of the initial weights.

    Raises:
        ConfigError: fewer than two widths, or one that is no multiple of the size of a head.
    """
    if len(widths) < 2:
        raise ConfigError("a coordinate check compares widths: give two or more")
    found: dict[str, np.ndarray] = {}
    for column, width in enumerate(widths):
        sized = config.at_width(width)
        for seed in seeds:
            moved = _train(sized, batch, base_width, steps, learning_rate, losses or LossSettings(), seed)
            for name, values in moved.items():
                found.setdefault(name, np.zeros((steps, len(widths))))[:, column] += np.array(values) / len(seeds)
    return CoordinateCheck(tuple(widths), found)


def _train(
    config: EScAIPConfig, batch: StructureBatch, base_width: int | None, steps: int, rate: float,
    losses: LossSettings, seed: int,
) -> dict[str, list[float]]:  # fmt: skip
    torch.manual_seed(seed)
    potential = Potential(config)
    ratios: dict[str, float] = {}
    if base_width is not None:
        ratios = {f"model.{name}": ratio for name, ratio in fan_in_ratios(config, base_width).items()}
        scale_outputs(potential.model, config, base_width)
    optimizer = make_optimizer(potential, rate, 0.0, ratios)
    now: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], tuple[Tensor, ...]], None]:
        return lambda module, inputs, output: now.update({name: output[0].detach()})

    for depth, block in enumerate(potential.model.get_submodule("blocks").children()):
        block.register_forward_hook(keep(f"block {depth}"))
    moved: dict[str, list[float]] = {}
    start: dict[str, Tensor] = {}
    for step in range(steps + 1):
        prediction = potential(batch, compute_forces=True, compute_stress=False, create_graph=True)
        now.update(energy=prediction.energy.detach(), forces=prediction.forces.detach())
        if step == 0:
            start = {name: value.clone() for name, value in now.items()}
        else:
            for name, value in now.items():
                moved.setdefault(name, []).append(float((value - start[name]).double().square().mean().sqrt()))
        terms = loss_sums(prediction, batch, losses)
        optimizer.zero_grad()
        terms.total(losses, terms.counts).backward()
        optimizer.step()
    return moved
