"""EScAIP: attention over packed neighborhoods (arXiv 2410.24169), the whole forward on one screen."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from escaip.config import MAX_ATOMIC_NUMBER, EScAIPConfig
from escaip.graph import bond_orientational_order
from escaip.nn.block import Block, Message, NeighborhoodAttention
from escaip.nn.embedding import EdgeAttributes, GaussianBasis, SystemEmbedding
from escaip.nn.heads import DirectForceHead, EnergyHead, Readout, ReadoutProjection
from escaip.nn.initialization import initialize
from escaip.nn.layers import FeedForward, make_norm
from escaip.types import Geometry, Graph, ModelOutput

__all__ = ["EScAIP", "EScAIPConfig"]


class EScAIP(nn.Module):
    """The published architecture on packed tokens: ``N`` atoms, ``T`` tokens, ``B`` systems, ``H`` features.

    Args:
        config: every number that defines the model.
    """

    def __init__(self, config: EScAIPConfig) -> None:
        super().__init__()
        self.config = c = config
        self.basis = GaussianBasis(c.num_radial, c.cutoff, c.radial_width)
        self.system_embedding = SystemEmbedding(c.hidden_size, c.charge, c.spin)
        self.attributes = self._attributes()
        self.input_ffn = FeedForward(c.hidden_size, 1, c.activation, c.dropout)
        self.norm_node = make_norm(c.norm, c.hidden_size)
        self.norm_edge = make_norm(c.norm, c.hidden_size)
        self.blocks = nn.ModuleList(self._block(layer) for layer in range(c.num_layers))

        readout = (c.hidden_size, c.readout_multiplier, c.activation, c.norm, c.dropout)
        projection = (c.num_layers + 1, c.hidden_size, c.activation, c.norm)
        self.node_readouts = nn.ModuleList(Readout(*readout) for _ in range(c.num_layers + 1))
        self.node_projection = ReadoutProjection(*projection)
        head = (c.hidden_size, c.output_multiplier, c.activation, c.norm)
        self.energy_head = EnergyHead(*head, c.scalar_dropout, c.energy_norm)
        if not c.is_conservative:
            self.edge_readouts = nn.ModuleList(Readout(*readout) for _ in range(c.num_layers + 1))
            self.edge_projection = ReadoutProjection(*projection)
            self.force_head = DirectForceHead(*head, c.vector_dropout, c.scalar_dropout, c.force_weighting == "uniform")
        initialize(self, c.radial_width)

    def forward(
        self,
        atomic_numbers: Tensor,
        graph: Graph,
        geometry: Geometry,
        system: Tensor,
        charge: Tensor,
        spin_multiplicity: Tensor,
    ) -> ModelOutput:
        """Computes per-atom energies, and direct forces where the model has them.

        Args:
            atomic_numbers: ``(N,)`` int64.
            graph: token layout.
            geometry: differentiable geometry of the tokens, in the model's dtype.
            system: ``(N,)`` int64, system of each atom.
            charge: ``(B,)`` int64, total charge; read only by models conditioned on it.
            spin_multiplicity: ``(B,)`` int64; likewise.
        """
        center, neighbor, num_systems = graph.token_center, graph.token_neighbor, charge.numel()
        order = self._orientational_order(geometry, center, graph.num_atoms)  # (N, boo_degrees)
        radial = self.basis(geometry.distance)  # (T, num_radial)

        token = self.attributes(radial, atomic_numbers, order, neighbor, center)  # (T, H)
        token = self.system_embedding(token, charge, spin_multiplicity, system[center])
        token = token + self.input_ffn(token)
        node, edge = self.norm_node(token.index_select(0, graph.self_token)), self.norm_edge(token)  # (N, H), (T, H)

        nodes, edges = [node], [edge]
        for block in self.blocks:
            node, edge = block(node, edge, radial, atomic_numbers, order, graph, geometry, system, num_systems)
            nodes.append(node)
            edges.append(edge)

        node = self.node_projection([read(x) for read, x in zip(self.node_readouts, nodes, strict=True)])  # (N, H)
        energy = self.energy_head(node)  # (N,)
        if self.config.is_conservative:
            return ModelOutput(energy)
        edge = self.edge_projection([read(x) for read, x in zip(self.edge_readouts, edges, strict=True)])  # (T, H)
        return ModelOutput(energy, self.force_head(node, edge, geometry.direction, geometry.log_envelope, center))

    def _orientational_order(self, geometry: Geometry, center: Tensor, num_atoms: int) -> Tensor:
        """``(N, boo_degrees)``: smooth by the envelope's weights, or ``uniform`` and clamped as published."""
        l_max = self.config.boo_degrees - 1
        if self.config.boo_weighting == "uniform":
            weight, floor = torch.ones_like(geometry.distance), "clamp"
        else:
            weight, floor = geometry.log_envelope.exp(), "smooth"
        return bond_orientational_order(geometry.direction, weight, center, num_atoms, l_max, floor=floor)

    def _attributes(self) -> EdgeAttributes:
        c = self.config
        return EdgeAttributes(
            MAX_ATOMIC_NUMBER + 1, c.element_size, c.boo_degrees, c.boo_size, c.num_radial, c.distance_size,
            c.hidden_size, c.activation, c.norm, c.dropout,
        )  # fmt: skip

    def _block(self, layer: int) -> Block:
        c = self.config
        # The last block's edges are read by direct-force models only.
        needs_edges = layer < c.num_layers - 1 or not c.is_conservative
        return Block(
            self._attributes(),
            Message(c.hidden_size, c.activation, c.norm, c.message_gate, c.dropout),
            NeighborhoodAttention(
                c.hidden_size, c.num_heads, c.angular_channels, c.scale, c.aggregation, c.attention_dropout,
                c.attention_backend, needs_edges,
            ),
            c.hidden_size, c.ffn_multiplier, c.activation, c.norm, c.node_dropout, c.edge_dropout,
            c.stochastic_depth, needs_edges,
        )  # fmt: skip
