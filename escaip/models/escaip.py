"""EScAIP: attention over packed neighborhoods (arXiv 2410.24169), the whole forward on one screen."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from escaip.models.config import MAX_ATOMIC_NUMBER, EScAIPConfig
from escaip.nn.block import Block, Message, NeighborhoodAttention, Run
from escaip.nn.embedding import (
    Curve,
    DistanceCurves,
    EdgeAttributes,
    GaussianBasis,
    OrientationalOrder,
    SystemEmbedding,
)
from escaip.nn.heads import DirectForceHead, EnergyHead, Readout, ReadoutProjection
from escaip.nn.init import initialize
from escaip.nn.layers import FeedForward, make_norm
from escaip.ops import take_rows
from escaip.types import AtomInputs, ModelOutput, Tokens

__all__ = ["EScAIP", "EScAIPConfig"]


def call(function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a function: how parts are run when everything is kept for the derivative."""
    return function(*arguments)


class EScAIP(nn.Module):
    """The published architecture on packed tokens: ``N`` atoms, ``T`` tokens, ``B`` systems, ``H`` features.

    Args:
        config: every number that defines the model.
    """

    def __init__(self, config: EScAIPConfig) -> None:
        super().__init__()
        self.config = c = config
        self.distances = DistanceCurves(
            GaussianBasis(c.num_radial, c.cutoff, c.radial_width), c.distance_knots, c.cutoff
        )
        self.orientational_order = OrientationalOrder(c.boo_degrees, c.boo_weighting == "uniform", c.boo_floor)
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
        self._kept_tables: tuple[list[tuple[int, int]], list[Tensor], list[Tensor]] | None = None

    def forward(
        self,
        atoms: AtomInputs,
        parts: Sequence[Tokens],
        tables: Sequence[Tensor] | None = None,
        run: Run = call,
    ) -> ModelOutput:
        """Computes per-atom energies, and direct forces where the model has them.

        Args:
            atoms: elements and systems of the ``N`` atoms.
            parts: their tokens, in runs of ``t`` tokens that are processed one after the other.
            tables: of :meth:`distance_tables`; None to evaluate the distance embeddings exactly.
            run: calls a function; a checkpointing one keeps what goes in and computes the rest again.
        """
        order = torch.cat([run(self.orientational_order, part) for part in parts])  # (N, boo_degrees)
        encoded = [self.distances.encode(part.distance, tables is not None) for part in parts]
        curves = self._curves(tables)
        ends = self.attributes.ends(atoms.atomic_numbers, order)  # two of (N, H)

        done = [run(self._embed, part, x, atoms, ends, curves[0]) for part, x in zip(parts, encoded, strict=True)]
        node, edge = torch.cat([node for node, _ in done]), [edge for _, edge in done]  # (N, H), (t, H) each
        nodes, edges = [node], [edge]
        for block, curve in zip(self.blocks, curves[1:], strict=True):
            node, edge = block(node, edge, atoms, order, parts, encoded, curve, run)
            nodes.append(node)
            edges.append(edge if not self.config.is_conservative else [])

        node = self.node_projection([read(x) for read, x in zip(self.node_readouts, nodes, strict=True)])  # (N, H)
        energy = self.energy_head(node)  # (N,)
        if self.config.is_conservative:
            return ModelOutput(energy)
        forces = [run(self._forces, part, node, *depths) for part, *depths in zip(parts, *edges, strict=True)]
        return ModelOutput(energy, torch.cat(forces))  # (N,), (N, 3)

    def _embed(
        self, part: Tokens, distance: Tensor, atoms: AtomInputs, ends: tuple[Tensor, Tensor], curve: Curve
    ) -> tuple[Tensor, Tensor]:
        """First features of a part's atoms ``(n, H)`` and tokens ``(t, H)``."""
        token = self.attributes(curve(distance), ends, part)
        token = self.system_embedding(token, atoms, part.center)
        token = token + self.input_ffn(token)
        return self.norm_node(take_rows(token, part.self_token)), self.norm_edge(token)

    def _forces(self, part: Tokens, node: Tensor, *edges: Tensor) -> Tensor:
        """Direct forces of a part's atoms ``(n, 3)``."""
        edge = self.edge_projection([read(x) for read, x in zip(self.edge_readouts, edges, strict=True)])  # (t, H)
        center = part.center - part.first
        return self.force_head(part.of_atoms(node), edge, part.direction, part.log_envelope, center)

    def tables(self, learning: bool) -> list[Tensor] | None:
        """Spline tables of the distance embeddings of the input layer and of each block, ``(K + 5, H)`` each.

        Args:
            learning: the weights need gradients; otherwise tables are kept until a weight changes.

        Returns:
            None where the model evaluates them exactly.
        """
        kind = self.config.distance_table
        if kind == "never" or (learning and kind == "inference"):
            return None
        layers = self._all_attributes
        if learning:
            return [self.distances.table(layer.curve) for layer in layers]
        # Assignment changes the address of a weight, and any operation in place its version. Weights that a table was
        # made of are held, so that no other can take their address.
        weights = [weight.detach() for layer in layers for weight in layer.curve_weights]
        state = [(weight.data_ptr(), weight._version) for weight in weights]
        if self._kept_tables is None or self._kept_tables[0] != state:
            with torch.no_grad():
                self._kept_tables = (state, weights, [self.distances.table(layer.curve) for layer in layers])
        return self._kept_tables[2]

    def train(self, mode: bool = True) -> EScAIP:
        """As any module's; tables are forgotten."""
        self._kept_tables = None
        return super().train(mode)

    @property
    def _all_attributes(self) -> list[EdgeAttributes]:
        return [self.attributes, *(cast(Block, block).attributes for block in self.blocks)]

    def _curves(self, tables: Sequence[Tensor] | None) -> list[Curve]:
        """For each depth what turns encoded distances into a part of its edge attributes, ``(t, H)``."""
        layers = self._all_attributes
        return [
            partial(self.distances, curve=layer.curve, table=table)
            for layer, table in zip(layers, tables or itertools.repeat(None, len(layers)), strict=True)
        ]

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
