"""Low-rank fine-tuning: weights of linear layers move by products of two thin matrices (Hu et al., arXiv 2106.09685).

``W = W₀ + (α/r) B A`` with ``A`` ``(r, n)`` random and ``B`` ``(m, r)`` zero at the start. With the gradient ``G`` of
the loss in ``W``, that in ``B`` is ``(α/r) G Aᵀ`` and that in ``A`` is ``(α/r) Bᵀ G``. So the model keeps its weights
in one piece and is evaluated, compiled, averaged and saved as any other, while the optimizer sees the factors alone. An
adapter inside the forward would compute the same numbers, from the same ``G``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from escaip.errors import ConfigError
from escaip.models import Model

ALPHA = 16.0
"""``α``: for some hundred inputs, Adam then moves a weight about as far in a step as without factors."""


def adapted_weights(model: Model, rank: int) -> dict[str, Tensor]:
    """Returns, by name, the weights ``(m, n)`` of linear layers that two factors of a rank stand for.

    These are the weights that learn, outside of the heads, and that have more numbers than their factors; none for
    rank 0.

    Raises:
        ConfigError: there are none of a rank above 0.
    """
    heads = {module for part in model.parts().get("heads", []) for module in part.modules()}
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    learning = {
        name: module.weight for name, module in linear.items() if module not in heads and module.weight.requires_grad
    }
    found = {name: weight for name, weight in learning.items() if 0 < rank * sum(weight.shape) < weight.numel()}
    if rank and not found and learning:
        raise ConfigError(f"model.lora is {rank}, and factors of no weight have fewer numbers than it: lower it")
    if rank and not found:
        raise ConfigError(f"model.lora is {rank}, but no linear weight outside of the heads learns: leave it out")
    return found


class LowRankUpdate:
    """The factors of a model's linear weights.

    Args:
        model: on its device and in its dtype, with the weights ``W₀``.
        rank: ``r``.
        seed: of ``A``; the same in all processes.
        state: of ``state_dict``, to continue with.

    Raises:
        ConfigError: no weight to adapt.
    """

    def __init__(self, model: Model, rank: int, seed: int, state: dict[str, dict[str, Tensor]] | None = None) -> None:
        self.scale = ALPHA / rank
        self.weights = adapted_weights(model, rank)
        generator = torch.Generator().manual_seed(seed)
        self.base, self.down, self.up = dict[str, Tensor](), dict[str, Tensor](), dict[str, Tensor]()
        for name, weight in self.weights.items():
            rows, columns = weight.shape
            self.base[name] = weight.detach().clone()
            self.down[name] = (torch.randn(rank, columns, generator=generator) / math.sqrt(columns)).to(weight)
            self.up[name] = weight.new_zeros(rows, rank)
            if state is not None:
                for part, own in self.state_dict().items():
                    own[name].copy_(state[part][name])

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Returns ``W₀``, ``A`` and ``B`` of each weight."""
        return {"base": self.base, "down": self.down, "up": self.up}

    def instead_of(self, parameters: Iterable[Tensor]) -> list[Tensor]:
        """Returns parameters for an optimizer, with the factors in the place of the weights."""
        pairs = {id(weight): [self.down[name], self.up[name]] for name, weight in self.weights.items()}
        return [one for parameter in parameters for one in pairs.get(id(parameter), [parameter])]

    @torch.no_grad()
    def take_gradients(self) -> None:
        """Gives the factors the gradients that follow from those of the weights, which are forgotten."""
        for name, weight in self.weights.items():
            if weight.grad is not None:
                gradient, weight.grad = self.scale * weight.grad, None
                self.down[name].grad = self.up[name].T @ gradient
                self.up[name].grad = gradient @ self.down[name].T

    @torch.no_grad()
    def apply(self) -> None:
        """Sets the weights from the factors, in place."""
        for name, weight in self.weights.items():
            weight.copy_(torch.addmm(self.base[name], self.up[name], self.down[name], alpha=self.scale))
