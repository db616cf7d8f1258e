"""One EScAIP block: message, neighborhood attention, feed-forward (arXiv 2410.24169, section 4)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from escaip.nn.layers import FeedForward, StochasticDepth, make_activation, make_norm
from escaip.ops import neighborhood_attention, sum_rows, take_rows
from escaip.types import Geometry, Graph


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
            self.mix = nn.Linear(3 * hidden_size, hidden_size)
        self.is_gated = gate
        self.activation = make_activation(activation)
        self.dropout = nn.Dropout(dropout)
        self.norm = make_norm(norm, hidden_size)

    def forward(self, node: Tensor, edge: Tensor, attributes: Tensor, graph: Graph) -> Tensor:
        """``(N, H)``, ``(T, H)``, ``(T, H)`` to ``(T, H)``."""
        sender, receiver = self.sender(node), self.receiver(node)  # per atom, then gathered
        node_hidden = self.activation(take_rows(sender, graph.token_neighbor) + take_rows(receiver, graph.token_center))
        node_hidden = self.dropout(node_hidden)
        edge_hidden = self.dropout(self.activation(self.edge_hidden(edge)))
        if self.is_gated:
            joined = torch.cat([attributes, node_hidden], -1)
            gate = torch.sigmoid(self.gate(joined))
            message = gate * torch.tanh(self.candidate(joined)) + (1.0 - gate) * edge_hidden
        else:
            message = self.activation(self.mix(torch.cat([attributes, edge_hidden, node_hidden], -1)))
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
        self.angular_channels = angular_channels
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

    def forward(self, message: Tensor, graph: Graph, geometry: Geometry) -> tuple[Tensor, Tensor | None]:
        """``(T, H)`` to the node update ``(N, H)`` and the edge update ``(T, H)``, None where nothing reads it."""
        heads = (self.num_heads, -1)
        asking = message.index_select(0, graph.self_token) if self.self_queries_only else message
        attended = neighborhood_attention(
            self.query(asking).unflatten(-1, heads),
            self.key(message).unflatten(-1, heads),
            self.value(message).unflatten(-1, heads),
            geometry.log_envelope,
            geometry.direction,
            graph.offsets,
            self.angular_channels,
            self.scale,
            self.backend,
            self_queries_only=self.self_queries_only,
            dropout=self.dropout if self.training else 0.0,
        )
        edge = self.project(attended.flatten(-2))
        if self.self_queries_only:
            return edge, None
        if self.aggregation_weight is None:
            return edge.index_select(0, graph.self_token), edge
        return self._aggregate(edge, self.aggregation_weight, graph, geometry), edge

    def _aggregate(self, edge: Tensor, weight: Tensor, graph: Graph, geometry: Geometry) -> Tensor:
        """Softmax-weighted mean of the tokens of each atom, per head."""
        per_head = edge.unflatten(-1, (self.num_heads, -1))  # (T, h, d)
        logits = nn.functional.leaky_relu((per_head * weight).sum(-1), 0.2) + geometry.log_envelope.unsqueeze(-1)
        center = graph.token_center
        largest = logits.detach().new_full((graph.num_atoms, self.num_heads), -torch.inf)
        largest = largest.scatter_reduce(0, center.unsqueeze(-1).expand_as(logits), logits.detach(), "amax")
        exponential = (logits - largest[center]).exp()
        total = sum_rows(exponential, center, graph.num_atoms)
        share = (exponential / take_rows(total, center)).unsqueeze(-1)
        return sum_rows(share * per_head, center, graph.num_atoms).flatten(1)


class Block(nn.Module):
    """Pre-norm residual block over node features ``(N, H)`` and edge features ``(T, H)``."""

    def __init__(
        self,
        attributes: nn.Module,
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
    ) -> None:
        super().__init__()
        self.attributes = attributes
        self.message = message
        self.attention = attention
        self.norm_node = make_norm(norm, hidden_size)
        self.norm_edge = make_norm(norm, hidden_size)
        self.norm_node_ffn = make_norm(norm, hidden_size)
        self.node_ffn = FeedForward(hidden_size, multiplier, activation, node_dropout)
        self.needs_edges = needs_edges
        if needs_edges:
            self.norm_edge_ffn = make_norm(norm, hidden_size)
            self.edge_ffn = FeedForward(hidden_size, multiplier, activation, edge_dropout)
        self.drop_path = StochasticDepth(stochastic_depth)

    def forward(
        self,
        node: Tensor,
        edge: Tensor,
        radial: Tensor,
        atomic_numbers: Tensor,
        orientational_order: Tensor,
        graph: Graph,
        geometry: Geometry,
        system: Tensor,
        num_systems: int,
    ) -> tuple[Tensor, Tensor]:
        """Returns the updated ``(N, H)`` and ``(T, H)``; edges unchanged where nothing reads them."""
        attributes = self.attributes(
            radial, atomic_numbers, orientational_order, graph.token_neighbor, graph.token_center
        )
        message = self.message(self.norm_node(node), self.norm_edge(edge), attributes, graph)
        node_update, edge_update = self.attention(message, graph, geometry)
        node = node + self.drop_path(node_update, system, num_systems)
        node = node + self.drop_path(self.node_ffn(self.norm_node_ffn(node)), system, num_systems)
        if self.needs_edges and edge_update is not None:
            token_system = system[graph.token_center]
            edge = edge + self.drop_path(edge_update, token_system, num_systems)
            edge = edge + self.drop_path(self.edge_ffn(self.norm_edge_ffn(edge)), token_system, num_systems)
        return node, edge
