"""Two stages of a training: direct forces, which take no derivative of the energy, then conservative ones.

The weights that both kinds of forces share, nearly all, are the same tensors in both stages (arXiv 2502.12147).
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from escaip.errors import ConfigError
from escaip.models import ModelConfig, kind_of
from escaip.potential import Potential


class ForceStages:
    """Gives a potential direct forces for its first stage, and takes them away.

    Args:
        potential: with conservative forces; changed in place.
        share: of the steps of a training that the first stage has; 0 for none.

    Raises:
        ConfigError: a share outside [0, 1), forces are direct already, or the model has no direct ones.

    Attributes:
        alone: names of the parameters of the potential that conservative forces do without.
    """

    def __init__(self, potential: Potential, share: float) -> None:
        self.potential, self.share, self._conservative = potential, share, potential.config
        self.alone: set[str] = set()
        if share:
            shared = {name for name, _ in potential.named_parameters()}
            self._change(_direct(potential.config, share))
            self.alone = {name for name, _ in potential.named_parameters()} - shared

    @property
    def is_first(self) -> bool:
        """Whether forces are direct for now."""
        return self.share > 0.0 and self.potential.config != self._conservative

    def end(self) -> list[Tensor]:
        """Ends the first stage, and returns the parameters that go."""
        gone: list[Tensor] = [self.potential.get_parameter(name) for name in self.alone]
        self._change(self._conservative)
        return gone

    def _change(self, config: ModelConfig) -> None:
        """Builds the model of other settings on the same parameters; further ones are fresh."""
        potential, model = self.potential, self.potential.model
        other = kind_of(config).model(config).to(potential.device, potential.dtype).train(model.training)
        other.load_state_dict(model.state_dict(keep_vars=True), strict=False, assign=True)
        potential.model, potential.config = other, config
        potential.evaluator = copy.deepcopy(potential.evaluator)  # without compiled code


def _direct(config: ModelConfig, share: float) -> ModelConfig:
    settings = config.to_dict()
    if not 0.0 < share < 1.0:
        raise ConfigError(f"model.direct_share is {share}: it must be in [0, 1)")
    if not config.is_conservative:
        raise ConfigError("model.direct_share is for conservative forces, and these are direct: leave it out")
    if "forces" not in settings:
        raise ConfigError(
            f"model.direct_share needs direct forces, which {kind_of(config).name} does not have: leave it out"
        )
    return type(config).from_dict({**settings, "forces": "direct"})


def forget(optimizer: torch.optim.Optimizer, schedule: LambdaLR, model: torch.nn.Module) -> None:
    """Drops the groups of parameters that a model no longer has, with their state, from optimizer and schedule."""
    kept = {id(parameter) for parameter in model.parameters()}
    for index in reversed(range(len(optimizer.param_groups))):
        parameters = optimizer.param_groups[index]["params"]
        if not kept.intersection(map(id, parameters)):
            for entries in (optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas):
                entries.pop(index)
            for parameter in parameters:
                optimizer.state.pop(parameter, None)
