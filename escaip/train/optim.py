"""Parameter groups, the optimizer and the learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from escaip.errors import ConfigError
from escaip.train.lora import LowRankUpdate
from escaip.train.soap import SOAP

ADAM_BETAS = (0.9, 0.999)


def parameter_groups(
    module: nn.Module,
    weight_decay: float,
    learning_rate: float = 1.0,
    ratios: Mapping[str, float] | None = None,
    apart: Collection[str] = (),
) -> list[dict[str, Any]]:
    """Splits trainable parameters: weights of linear layers decay; biases, norms, embeddings and the rest do not.

    A parameter shared between modules counts once, and decays when any of them is linear.

    Args:
        module: owner of the parameters.
        weight_decay: decay of the weights of linear layers.
        learning_rate: learning rate of all parameters but those named in ``ratios``.
        ratios: by name of a parameter, the divisor of its learning rate and factor of its decay (``escaip.train.mup``).
        apart: names of parameters that have groups of their own, the last.
    """
    linear = {id(child.weight) for child in module.modules() if isinstance(child, nn.Linear)}
    groups: dict[tuple[bool, float, bool], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            ratio = 1.0 if ratios is None else ratios.get(name, 1.0)
            groups.setdefault((name in apart, ratio, id(parameter) not in linear), []).append(parameter)
    # Those of ratio 1 first: their learning rate is the one that is logged.
    ordered = sorted(groups, key=lambda key: (key[0], key[1] != 1.0, *key[1:]))
    return [
        {
            "params": groups[last, ratio, kept],
            "lr": learning_rate / ratio,
            "weight_decay": 0.0 if kept else weight_decay * ratio,
        }
        for last, ratio, kept in ordered
    ]


def make_optimizer(
    module: nn.Module,
    learning_rate: float,
    weight_decay: float,
    ratios: Mapping[str, float] | None = None,
    name: str = "adamw",
    low_rank: LowRankUpdate | None = None,
    apart: Collection[str] = (),
) -> torch.optim.Optimizer:
    """Returns the optimizer, with decay on linear weights only (arXiv 2410.24169).

    Args:
        module: owner of the parameters.
        learning_rate: learning rate of all parameters but those named in ``ratios``.
        weight_decay: decay of the weights of linear layers.
        ratios: as in ``parameter_groups``.
        name: ``adamw``, or ``soap``: Adam in the eigenbases of the gradients' second moments (arXiv 2409.11321),
            refreshed every ten steps; vectors by Adam. Its first step only gathers these moments.
        low_rank: factors in the place of weights, with their learning rate and decay.
        apart: as in ``parameter_groups``.

    Raises:
        ConfigError: no optimizer of this name.
    """
    groups = parameter_groups(module, weight_decay, learning_rate, ratios, apart)
    if low_rank is not None:
        for group in groups:
            group["params"] = low_rank.instead_of(group["params"])
    if name == "soap":
        return SOAP(groups, lr=learning_rate)
    if name != "adamw":
        raise ConfigError(f"model.optimizer: {name!r} is not one of adamw, soap")
    return AdamW(groups, lr=learning_rate, betas=ADAM_BETAS)


def warmup_cosine(total_steps: int, warmup_steps: int, final_fraction: float) -> Callable[[int], float]:
    """Returns the factor on the learning rate at each optimizer step.

    It rises linearly to 1 over ``warmup_steps`` (the first step already moves), then falls as a half cosine to
    ``final_fraction``, which the last step reaches and later ones keep.
    """

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        progress = min(1.0, (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps))
        return final_fraction + (1.0 - final_fraction) * 0.5 * (1.0 + math.cos(math.pi * progress))

    return factor


def make_schedule(
    optimizer: torch.optim.Optimizer, total_steps: float, warmup_fraction: float, final_fraction: float
) -> LambdaLR:
    """Returns warm-up and cosine over a run of ``total_steps`` optimizer steps.

    Raises:
        ConfigError: the length of the run is unknown.
    """
    if not math.isfinite(total_steps):
        raise ConfigError(
            "the learning rate needs the length of the run, and trainer.max_time does not give it: "
            "set trainer.max_steps (or trainer.max_epochs) beside it"
        )
    steps = int(total_steps)
    return LambdaLR(optimizer, warmup_cosine(steps, round(warmup_fraction * steps), final_fraction))
