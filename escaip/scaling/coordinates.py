"""Does the size of what a model computes depend on its width after some steps of training?

The coordinate check of Yang et al. (arXiv 2203.03466, appendix D.1): with maximal-update parametrisation features and
outputs move by the same amount at every width; with the usual one wide models move further, until they diverge.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from escaip.errors import ConfigError
from escaip.models import EScAIPConfig
from escaip.potential import Potential
from escaip.train.losses import LossSettings, loss_sums
from escaip.train.mup import fan_in_ratios, scale_outputs
from escaip.train.optim import make_optimizer


@dataclass(frozen=True)
class CoordinateCheck:
    """What moved by how much.

    Attributes:
        widths: ``hidden_size`` of each model.
        changes: by coordinate, ``(steps, widths)``: root mean square of what it has moved by since the start, means
            over seeds. ``block 0`` and on are node features, ``energy`` and ``forces`` what the potential returns.
    """

    widths: tuple[int, ...]
    changes: dict[str, np.ndarray]

    def slopes(self, step: int = -1) -> dict[str, float]:
        """``d log(change) / d log(width)`` of each coordinate after a step: 0 is flat, 1 is as wide as it moves."""
        logs = np.log(self.widths)
        return {name: float(np.polyfit(logs, np.log(values[step]), 1)[0]) for name, values in self.changes.items()}


def check_coordinates(
    config: EScAIPConfig,
    batch: Any,
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
        widths: of the models; multiples of the size of a head.
        base_width: of the parametrisation; None for the usual one.
        steps: of the optimizer.
        learning_rate: at the base width; constant.
        losses: default that of training.
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
            model = _train(sized, batch, base_width, steps, learning_rate, losses or LossSettings(), seed)
            for name, values in model.items():
                table = found.setdefault(name, np.zeros((steps, len(widths))))
                table[:, column] += np.array(values) / len(seeds)
    return CoordinateCheck(tuple(widths), found)


def _train(
    config: EScAIPConfig, batch: Any, base_width: int | None, steps: int, rate: float, losses: LossSettings, seed: int
) -> dict[str, list[float]]:
    torch.manual_seed(seed)
    potential = Potential(config)
    ratios: dict[str, float] = {}
    if base_width is not None:
        ratios = {f"model.{name}": ratio for name, ratio in fan_in_ratios(config, base_width).items()}
        scale_outputs(potential.model, config, base_width)
    optimizer = make_optimizer(potential, rate, 0.0, ratios)
    seen: dict[str, Tensor] = {}
    for depth, block in enumerate(potential.model.get_submodule("blocks").children()):
        block.register_forward_hook(_keep(seen, f"block {depth}"))
    moved: dict[str, list[float]] = {}
    start: dict[str, Tensor] = {}
    for step in range(steps + 1):
        prediction = potential(batch, compute_forces=True, compute_stress=False, create_graph=True)
        now = {**seen, "energy": prediction.energy.detach(), "forces": prediction.forces.detach()}
        if step == 0:
            start = {name: value.clone() for name, value in now.items()}
        for name, value in now.items():
            if step:
                moved.setdefault(name, []).append(float((value - start[name]).double().square().mean().sqrt()))
        terms = loss_sums(prediction, batch, losses)
        optimizer.zero_grad()
        terms.total(losses, terms.counts).backward()
        optimizer.step()
    return moved


def _keep(seen: dict[str, Tensor], name: str) -> Any:
    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        seen[name] = output[0].detach()

    return hook
