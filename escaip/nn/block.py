"""One EScAIP block: message, neighborhood attention, feed-forward (arXiv 2410.24169, section 4)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from escaip.graph import TokenChunks
from escaip.nn.density import DensityUpdate
from escaip.nn.embedding import EdgeAttributes
from escaip.nn.layers import (
    FeedForward,
    LinearOfParts,
    StochasticDepth,
    activate_ends,
    full_precision,
    make_activation,
    make_norm,
)
from escaip.ops import neighborhood_attention, sum_rows, take_rows
from escaip.types import AtomInputs, Tokens


class Message(nn.Module):
    """Joins edge attributes, edge features and the node features of both ends into one token."""

    def __init__(self, hidden_size: int, activation: str, norm: str, gate: bool, dropout: float) -> None:
        super().__init__()
        self.edge_hidden = nn.Linear(hidden_size, hidden_size)
        self.sender = nn.Linear(hidden_size, hidden_size, bias=False)
        self.receiver = nn.Linear(hidden_size, hidden_size)
        if gate:
            self.gate = nn.Linear(2 * hidden_size, hidden_size)
            self.candidate = nn.Linear(2 * hidden_size, hidden_size)
        else:
            self.mix = LinearOfParts(3 * hidden_size, hidden_size)
        self.is_gated = gate
        self.activation = make_activation(activation)
        self.dropout = nn.Dropout(dropout)
        self.norm = make_norm(norm, hidden_size)

    def ends(self, node: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the contributions of atoms as neighbors and as centers: ``(N, H)`` to two of ``(N, H)``."""
        return self.sender(node), self.receiver(node)

    def forward(self, edge: Tensor, attributes: Tensor, ends: tuple[Tensor, Tensor], tokens: Tokens) -> Tensor:
        """``(t, H)``, ``(t, H)`` and ``ends`` of all atoms to ``(t, H)``."""
        node_hidden = self.dropout(activate_ends(self.activation, None, ends, tokens))
        edge_hidden = self.dropout(self.activation(self.edge_hidden(edge)))
        if self.is_gated:
            joined = torch.cat([attributes, node_hidden], -1)
            gate = torch.sigmoid(self.gate(joined))
            message = gate * torch.tanh(self.candidate(joined)) + (1.0 - gate) * edge_hidden
        else:
            message = self.activation(self.mix(attributes, edge_hidden, node_hidden))
        return self.norm(message)


class NeighborhoodAttention(nn.Module):
    """Multi-head attention among the tokens of each atom, and its aggregation to the node.

    ``aggregation="self"`` reads the node from its self token; ``"graph_attention"`` from a weighted
    mean over the tokens (GATv2, arXiv 2105.14491), with the envelope in its weights.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        angular_channels: tuple[int, ...] | None,
        angular_values: bool,
        scale: float,
        aggregation: str,
        dropout: float,
        backend: str,
        needs_edges: bool,
    ) -> None:
        super().__init__()
        self.query = nn.Linear(hidden_size, hidden_size)
        self.key = nn.Linear(hidden_size, hidden_size)
        self.value = nn.Linear(hidden_size, hidden_size)
        self.project = nn.Linear(hidden_size, hidden_size)
        self.num_heads = num_heads
        self.angular_channels, self.angular_values = angular_channels, angular_values
        self.scale = scale
        self.dropout = dropout
        self.backend = backend
        self.self_queries_only = not needs_edges and aggregation == "self"
        self.aggregation_weight: nn.Parameter | None = None
        if aggregation == "graph_attention":
            bound = math.sqrt(6.0 / (num_heads + hidden_size // num_heads))
            self.aggregation_weight = nn.Parameter(
                torch.empty(num_heads, hidden_size // num_heads).uniform_(-bound, bound)
            )

    def forward(self, message: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor | None]:
        """``(t, H)`` to the node update ``(n, H)`` and the edge update ``(t, H)``, None where nothing reads it."""
        heads = (self.num_heads, -1)
        asking = take_rows(message, tokens.self_token) if self.self_queries_only else message
        attended = neighborhood_attention(
            self.query(asking).unflatten(-1, heads),
            self.key(message).unflatten(-1, heads),
            self.value(message).unflatten(-1, heads),
            tokens.log_envelope,
            tokens.direction,
            tokens.offsets,
            self.angular_channels,
            self.scale,
            self.backend,
            self_queries_only=self.self_queries_only,
            dropout=self.dropout if self.training else 0.0,
            angular_values=self.angular_values,
        )
        edge = self.project(attended.flatten(-2))
        if self.self_queries_only:
            return edge, None
        if self.aggregation_weight is None:
            return take_rows(edge, tokens.self_token), edge
        return self._aggregate(edge, self.aggregation_weight, tokens), edge

    def _aggregate(self, edge: Tensor, weight: Tensor, tokens: Tokens) -> Tensor:
        """Softmax-weighted mean of the tokens of each atom, per head."""
        per_head = edge.unflatten(-1, (self.num_heads, -1))  # (t, h, d)
        logits = nn.functional.leaky_relu((per_head * weight).sum(-1), 0.2) + tokens.log_envelope.unsqueeze(-1)
        center = tokens.center - tokens.first
        largest = logits.detach().new_full((tokens.num_atoms, self.num_heads), -torch.inf)
        largest = largest.scatter_reduce(0, center.unsqueeze(-1).expand_as(logits), logits.detach(), "amax")
        exponential = (logits - largest[center]).exp()
        total = sum_rows(exponential, center, tokens.num_atoms)
        share = (exponential / take_rows(total, center)).unsqueeze(-1)
        return sum_rows(share * per_head, center, tokens.num_atoms).flatten(1)


class Block(nn.Module):
    """Pre-norm residual block over node features ``(N, H)`` and edge features ``(T, H)``."""

    def __init__(
        self,
        attributes: EdgeAttributes,
        message: Message,
        attention: NeighborhoodAttention,
        hidden_size: int,
        multiplier: int,
        activation: str,
        norm: str,
        node_dropout: float,
        edge_dropout: float,
        stochastic_depth: float,
        needs_edges: bool,
        edge_ffn: bool = True,
        density: DensityUpdate | None = None,
    ) -> None:
        super().__init__()
        self.attributes = attributes
        self.message = message
        self.attention = attention
        self.density = density
        self.norm_node = make_norm(norm, hidden_size)
        self.norm_edge = make_norm(norm, hidden_size)
        self.norm_node_ffn = make_norm(norm, hidden_size)
        self.node_ffn = FeedForward(hidden_size, multiplier, activation, node_dropout)
        self.needs_edges = needs_edges
        self.has_edge_ffn = needs_edges and edge_ffn
        if self.has_edge_ffn:
            self.norm_edge_ffn = make_norm(norm, hidden_size)
            self.edge_ffn = FeedForward(hidden_size, multiplier, activation, edge_dropout)
        self.drop_path = StochasticDepth(stochastic_depth)

    def forward(
        self,
        node: Tensor,
        edge: Sequence[Tensor],
        atoms: AtomInputs,
        order: Tensor,
        distance: Sequence[Tensor],
        tokens: TokenChunks,
    ) -> tuple[Tensor, Sequence[Tensor]]:
        """Updates all atoms and tokens.

        Args:
            node: ``(N, H)``.
            edge: ``(t, H)`` for each chunk of tokens.
            atoms: all of them.
            order: ``(N, boo_degrees)``, bond-orientational order.
            distance: of each chunk, encoded (``encode``).
            tokens: of all atoms.

        Returns:
            The updated ``(N, H)`` and ``(t, H)`` of each chunk; edges unchanged where nothing reads them.
        """
        embed_distance = self.attributes.distance.function()
        attribute_ends = self.attributes.ends(atoms.atomic_numbers, order)  # per atom, gathered for tokens below
        message_ends = self.message.ends(self.norm_node(node))

        def update(chunk: Tokens, edge: Tensor, distance: Tensor) -> tuple[Tensor, Tensor]:
            system, center = atoms.first_of_system, chunk.center
            here = center.index_select(0, chunk.self_token)
            attributes = self.attributes(embed_distance(distance), attribute_ends, chunk)  # (t, H)
            message = self.message(self.norm_edge(edge), attributes, message_ends, chunk)
            node_update, edge_update = self.attention(message, chunk)
            if self.density is not None:
                node_update = node_update + self.density(message, chunk)
            moved = chunk.of_atoms(node) + self.drop_path(node_update, system, here)
            with full_precision(moved):
                moved = moved + self.drop_path(self.node_ffn(self.norm_node_ffn(moved)), system, here)
            if self.needs_edges and edge_update is not None:
                edge = edge + self.drop_path(edge_update, system, center)
                if self.has_edge_ffn:
                    edge = edge + self.drop_path(self.edge_ffn(self.norm_edge_ffn(edge)), system, center)
            return moved, edge

        nodes, edges = zip(*tokens.map(update, edge, distance), strict=True)
        return torch.cat(nodes), edges
