"""Readouts of each depth, and the energy and direct-force heads."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from escaip.nn.layers import FeedForward, full_precision, make_activation, make_norm
from escaip.ops import sum_rows


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
