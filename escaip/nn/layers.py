"""Norms, activations, feed-forward networks and regularisation shared by every block."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from escaip.errors import ConfigError
from escaip.ops.layers import add_rows, gelu, gelu_of_rows, rms_norm
from escaip.types import Tokens

# Machine epsilon of float32, the floor of the published norms, in every precision.
NORM_EPS = 1.1920928955078125e-07


class GELU(nn.Module):
    """``x Φ(x)``; in evaluation mode, where one derivative is taken, PyTorch's own, which has one."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape."""
        return gelu(x) if self.training else nn.functional.gelu(x)


_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "gelu": GELU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "softplus": nn.Softplus,
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
}
SMOOTH_ACTIVATIONS = ("gelu", "silu", "tanh", "softplus")
NORMS = ("rmsnorm", "layernorm", "skip")


class PreciseTables(nn.Module):
    """A module whose own buffers move to a device with it, but are never cast; those of its parts are."""

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        kept = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, table in kept.items():
            setattr(self, name, table.to(getattr(self, name).device))
        return self


def make_activation(name: str) -> nn.Module:
    """Returns the activation called ``name``; ConfigError when there is none."""
    if name not in _ACTIVATIONS:
        raise ConfigError(f"activation {name!r} does not exist: choose {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]()


def activate_ends(activation: nn.Module, base: Tensor | None, ends: tuple[Tensor, Tensor], tokens: Tokens) -> Tensor:
    """Activates the sum of both ends of each token, ``(N, H)`` of all atoms, and of ``base``, ``(t, H)`` or None."""
    rows = (ends[0], tokens.neighbor, ends[1], tokens.center)
    if isinstance(activation, GELU) and activation.training:
        return gelu_of_rows(base, *rows)
    found: Tensor = activation(add_rows(base, *rows))
    return found


class RMSNorm(nn.Module):
    """Root-mean-square norm with a weight (``escaip.ops.layers.rms_norm``)."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        """``(..., H)`` to ``(..., H)`` in the dtype of the input, computed in float32 or more."""
        return rms_norm(x, self.weight, NORM_EPS)


def full_precision(like: Tensor) -> torch.autocast:
    """Turns autocast off for rows of atoms, which cost little beside rows of tokens."""
    return torch.autocast(like.device.type, enabled=False)


def make_norm(name: str, hidden_size: int) -> nn.Module:
    """Returns the norm called ``name`` over the last dimension; ConfigError when there is none."""
    if name == "rmsnorm":
        return RMSNorm(hidden_size)
    if name == "layernorm":
        return nn.LayerNorm(hidden_size)
    if name == "skip":
        return nn.Identity()
    raise ConfigError(f"norm {name!r} does not exist: choose {', '.join(NORMS)}")


class LinearOfParts(nn.Linear):
    """A linear layer of equal parts side by side, which are never joined in memory."""

    def forward(self, *parts: Tensor) -> Tensor:
        """Each ``(t, H)``, together the inputs, to ``(t, out_features)``."""
        output: Tensor = self.bias
        for part, weight in zip(parts, self.weight.chunk(len(parts), 1), strict=True):
            output = torch.addmm(output, part, weight.T)
        return output


class FeedForward(nn.Module):
    """``H → multiplier·H → H`` with one activation."""

    def __init__(self, hidden_size: int, multiplier: int, activation: str, dropout: float) -> None:
        super().__init__()
        self.expand = nn.Linear(hidden_size, multiplier * hidden_size)
        self.activation = make_activation(activation)
        self.contract = nn.Linear(multiplier * hidden_size, hidden_size)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., H)`` to ``(..., H)``."""
        return self.dropout(self.contract(self.activation(self.expand(x))))


class StochasticDepth(nn.Module):
    """Drops a residual branch for whole systems with a probability (arXiv 1603.09382), in training only."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, branch: Tensor, first_of_system: Tensor, atom: Tensor) -> Tensor:
        """Scales rows by 0 or ``1/(1−p)``.

        Args:
            branch: ``(R, H)``.
            first_of_system: ``(N,)`` int64, index of the first atom of each atom's system, which stands for the system.
            atom: ``(R,)`` int64, the atom to which each row belongs.
        """
        if self.probability == 0.0 or not self.training:
            return branch
        keep = torch.rand(first_of_system.shape[0], device=branch.device) >= self.probability
        factor = keep.to(branch.dtype) / (1.0 - self.probability)
        return branch * factor[first_of_system[atom]].unsqueeze(-1)
