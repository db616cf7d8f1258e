"""Readouts of each depth, the energy and direct-force heads, and the registry of further heads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from escaip.errors import ConfigError
from escaip.nn.layers import FeedForward, full_precision, make_activation, make_norm
from escaip.ops import sum_rows
from escaip.types import TARGETS

HeadBuilder = Callable[[int], nn.Module]
B = TypeVar("B", bound=HeadBuilder)
HEADS: dict[str, HeadBuilder] = {}
"""Heads beside energy and forces, by the name of their target (``escaip.types.TARGETS``)."""


def register_head(name: str) -> Callable[[B], B]:
    """Returns a decorator that adds a builder of heads to ``HEADS`` (docs/extend/head.md).

    A builder takes the number of node features ``H`` and returns a module from ``(N, H)`` to the ``(N, ...)`` per-atom
    values of the target, in its unit; for a target of the structure, these are contributions to its sum.

    Raises:
        ConfigError: another builder has that name.
    """

    def register(builder: B) -> B:
        if HEADS.setdefault(name, builder) is not builder:
            raise ConfigError(f"head {name!r} is registered already: choose another name")
        return builder

    return register


def check_heads(names: Sequence[str]) -> None:
    """Raises ConfigError for a head without a builder or a target, or one that is named twice."""
    for name in names:
        if name not in HEADS:
            raise ConfigError(f"head {name!r} is not registered: import the module that registers it before loading")
        if name not in TARGETS:
            raise ConfigError(f"head {name!r} has no target: register one with escaip.types.register_target")
    if len(set(names)) < len(names):
        raise ConfigError(f"heads {', '.join(names)}: each may be named once")


def make_heads(names: Sequence[str], hidden_size: int) -> nn.ModuleDict:
    """Builds the heads of these names on ``H`` node features; see ``check_heads`` for errors."""
    check_heads(names)
    return nn.ModuleDict({name: HEADS[name](hidden_size) for name in names})


class Readout(nn.Module):
    """``x + FFN(norm(x))``, one per depth."""

    def __init__(self, hidden_size: int, multiplier: int, activation: str, norm: str, dropout: float) -> None:
        super().__init__()
        self.norm = make_norm(norm, hidden_size)
        self.ffn = FeedForward(hidden_size, multiplier, activation, dropout)

    def forward(self, x: Tensor) -> Tensor:
        """``(R, H)`` to ``(R, H)``."""
        return x + self.ffn(self.norm(x))


class ReadoutProjection(nn.Module):
    """All ``L + 1`` readouts concatenated, projected to ``H``, normed."""

    def __init__(self, num_readouts: int, hidden_size: int, activation: str, norm: str) -> None:
        super().__init__()
        self.linear = nn.Linear(num_readouts * hidden_size, hidden_size)
        self.activation = make_activation(activation)
        self.norm = make_norm(norm, hidden_size)

    def forward(self, readouts: list[Tensor]) -> Tensor:
        """``L + 1`` tensors ``(R, H)`` to ``(R, H)``."""
        return self.norm(self.activation(self.linear(torch.cat(readouts, -1))))


class OutputMLP(nn.Module):
    """Feed-forward network and a last linear map without bias to ``num_outputs``."""

    def __init__(self, hidden_size: int, num_outputs: int, multiplier: int, activation: str, dropout: float) -> None:
        super().__init__()
        self.ffn = FeedForward(hidden_size, multiplier, activation, dropout)
        self.output = nn.Linear(hidden_size, num_outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``(R, H)`` to ``(R, num_outputs)``."""
        return self.output(self.ffn(x))


class HeadPerSet(nn.ModuleList):
    """Heads of one kind, one for each data set; an atom takes the output of that of its set.

    All heads are evaluated: one is less than a hundredth of a conservative model, and weights gathered for each atom
    would be larger than its features. The outputs of the others have gradients of zero, so each is as if it were alone.
    """

    def forward(self, dataset: Tensor, *features: Tensor) -> Tensor:
        """Set of each atom ``(N,)``, and the arguments of a head, to the output of a head, ``(N, ...)``."""
        output, *others = [head(*features) for head in self]
        for number, other in enumerate(others, 1):
            output = torch.where((dataset == number).view(-1, *[1] * (other.dim() - 1)), other, output)
        return output


def per_set(heads: Sequence[nn.Module]) -> nn.Module:
    """Joins heads of one kind, one for each data set; a single one is for all and stays as it is."""
    return heads[0] if len(heads) == 1 else HeadPerSet(heads)


def read_head(head: nn.Module, dataset: Tensor, *features: Tensor) -> Tensor:
    """Evaluates what ``per_set`` returned; see ``HeadPerSet``."""
    output: Tensor = head(dataset, *features) if isinstance(head, HeadPerSet) else head(*features)
    return output


class EnergyHead(nn.Module):
    """Per-atom energy from node features."""

    def __init__(
        self, hidden_size: int, multiplier: int, activation: str, norm: str, dropout: float, use_norm: bool
    ) -> None:
        super().__init__()
        self.norm = make_norm(norm, hidden_size) if use_norm else nn.Identity()
        self.mlp = OutputMLP(hidden_size, 1, multiplier, activation, dropout)

    def forward(self, node: Tensor) -> Tensor:
        """``(N, H)`` to ``(N,)``, in units of the potential's scale."""
        return self.mlp(self.norm(node)).squeeze(-1)


class DirectForceHead(nn.Module):
    """Forces read from edges: ``(Σ_j w_j MLP₃(edge_ij) ⊙ n_ij) · MLP₁(node_i)``.

    Not rotation-equivariant: the product with the direction is taken component by component
    (arXiv 2410.24169). ``w_j`` is the envelope, so that forces are continuous when a neighbor
    enters or leaves; 1 with ``uniform`` weights, as published.
    """

    def __init__(
        self,
        hidden_size: int,
        multiplier: int,
        activation: str,
        norm: str,
        vector_dropout: float,
        scalar_dropout: float,
        uniform: bool,
    ) -> None:
        super().__init__()
        self.norm_node = make_norm(norm, hidden_size)
        self.norm_edge = make_norm(norm, hidden_size)
        self.vector = OutputMLP(hidden_size, 3, multiplier, activation, vector_dropout)
        self.magnitude = OutputMLP(hidden_size, 1, multiplier, activation, scalar_dropout)
        self.uniform = uniform

    def forward(self, node: Tensor, edge: Tensor, direction: Tensor, log_envelope: Tensor, center: Tensor) -> Tensor:
        """``(N, H)``, ``(T, H)``, ``(T, 3)``, ``(T,)``, ``(T,)`` to forces ``(N, 3)``."""
        vectors = self.vector(self.norm_edge(edge)) * direction  # (T, 3)
        if not self.uniform:
            vectors = vectors * log_envelope.exp().unsqueeze(-1)
        summed = sum_rows(vectors, center, node.shape[0])
        with full_precision(node):
            return summed * self.magnitude(self.norm_node(node))
