"""EScAIP: attention over packed neighborhoods (arXiv 2410.24169), the whole forward on one screen."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from escaip.graph import TokenChunks
from escaip.models.config import EScAIPConfig
from escaip.models.protocol import MAX_ATOMIC_NUMBER, Model, register_model
from escaip.nn.block import Block, Message, NeighborhoodAttention
from escaip.nn.density import DensityInvariants, DensityUpdate
from escaip.nn.embedding import EdgeAttributes, GaussianBasis, OrientationalOrder, SystemEmbedding
from escaip.nn.heads import (
    DirectForceHead,
    EnergyHead,
    HeadPerSet,
    Readout,
    ReadoutProjection,
    make_heads,
    per_set,
    read_head,
)
from escaip.nn.init import initialize
from escaip.nn.layers import FeedForward, make_norm
from escaip.ops import take_rows
from escaip.types import AtomInputs, ModelOutput, Tokens

__all__ = ["EScAIP", "EScAIPConfig"]

_USUAL_NEIGHBORS = 32  # within a cutoff, where a model has no number of them


@register_model("EScAIP", EScAIPConfig)
class EScAIP(Model):
    """The published architecture on packed tokens: ``N`` atoms, ``T`` tokens, ``B`` systems, ``H`` features.

    Args:
        config: every number that defines the model.
    """

    config: EScAIPConfig

    def __init__(self, config: EScAIPConfig) -> None:
        super().__init__(config)
        c = config
        basis = GaussianBasis(c.num_radial, c.cutoff, c.radial_width)
        self.orientational_order = OrientationalOrder(c.boo_degrees, c.boo_weighting == "uniform", c.boo_floor)
        self.density = _density(c) if c.density_radial else None
        self.system_embedding = SystemEmbedding(c.hidden_size, c.charge, c.spin)
        self.attributes = _attributes(c, basis)
        self.input_ffn = FeedForward(c.hidden_size, 1, c.activation, c.dropout)
        self.norm_node = make_norm(c.norm, c.hidden_size)
        self.norm_edge = make_norm(c.norm, c.hidden_size)
        self.input_density = _density_update(c)
        self.blocks = nn.ModuleList(_block(c, basis, layer) for layer in range(c.num_layers))

        readout = (c.hidden_size, c.readout_multiplier, c.activation, c.norm, c.dropout)
        projection = (c.num_layers + 1, c.hidden_size, c.activation, c.norm)
        self.node_readouts = nn.ModuleList(Readout(*readout) for _ in range(c.num_layers + 1))
        self.node_projection = ReadoutProjection(*projection)
        head = (c.hidden_size, c.output_multiplier, c.activation, c.norm)
        sets = range(c.num_energy_heads)
        self.energy_head = per_set([EnergyHead(*head, c.scalar_dropout, c.energy_norm) for _ in sets])
        if not c.is_conservative:
            self.edge_readouts = nn.ModuleList(Readout(*readout) for _ in range(c.num_layers + 1))
            self.edge_projection = ReadoutProjection(*projection)
            of_edges = (*head, c.vector_dropout, c.scalar_dropout, c.force_weighting == "uniform")
            self.force_head = per_set([DirectForceHead(*of_edges) for _ in sets])
        initialize(self, c.radial_width)
        self.heads = make_heads(c.heads, c.hidden_size)

    def forward(self, atoms: AtomInputs, tokens: TokenChunks) -> ModelOutput:
        """Computes per-atom energies, direct forces where the model has them, and the outputs of further heads.

        Args:
            atoms: elements, systems and data sets of the ``N`` atoms.
            tokens: of all atoms. Per-token features are held chunk by chunk, ``(t, H)`` each.
        """
        order = torch.cat(tokens.map(self.orientational_order))  # (N, boo_degrees)
        distance = tokens.map(self.attributes.distance.encode)  # of each chunk, the same for all depths
        linear: Tensor | None = None
        if self.density is not None:
            density = torch.cat(tokens.map(partial(self.density, atoms=atoms)))  # (N, F)
            linear = self.density.energies(density, atoms.atomic_numbers)
            order = torch.cat([order, self.density.standardized(density, atoms.atomic_numbers)], -1)
        node, edge = self._embed(atoms, order, distance, tokens)  # (N, H), (t, H) of each chunk
        nodes, edges = [node], [edge]
        for block in self.blocks:
            node, edge = block(node, edge, atoms, order, distance, tokens)
            nodes.append(node)
            if not self.config.is_conservative:
                edges.append(edge)

        node = self.node_projection([read(x) for read, x in zip(self.node_readouts, nodes, strict=True)])  # (N, H)
        energy = read_head(self.energy_head, atoms.dataset, node)  # (N,)
        energy = energy if linear is None else energy + linear
        forces = None if self.config.is_conservative else self._forces(atoms, node, edges, tokens)  # (N, 3)
        return ModelOutput(energy, forces, {name: head(node) for name, head in self.heads.items()})

    def _embed(
        self, atoms: AtomInputs, order: Tensor, distance: Sequence[Tensor], tokens: TokenChunks
    ) -> tuple[Tensor, Sequence[Tensor]]:
        """Returns the first features of all atoms, ``(N, H)``, and of the tokens of each chunk, ``(t, H)``."""
        embed_distance = self.attributes.distance.function()
        ends = self.attributes.ends(atoms.atomic_numbers, order)  # two of (N, H)

        def embed(chunk: Tokens, distance: Tensor) -> tuple[Tensor, Tensor]:
            token = self.attributes(embed_distance(distance), ends, chunk)
            token = self.system_embedding(token, atoms, chunk.center)
            token = token + self.input_ffn(token)
            node, edge = self.norm_node(take_rows(token, chunk.self_token)), self.norm_edge(token)
            return node if self.input_density is None else node + self.input_density(edge, chunk), edge

        nodes, edges = zip(*tokens.map(embed, distance), strict=True)
        return torch.cat(nodes), edges

    def _forces(
        self, atoms: AtomInputs, node: Tensor, edges: Sequence[Sequence[Tensor]], tokens: TokenChunks
    ) -> Tensor:
        """Returns direct forces ``(N, 3)`` from the features of all depths."""

        def read_forces(chunk: Tokens, *depths: Tensor) -> Tensor:
            edge = self.edge_projection([read(x) for read, x in zip(self.edge_readouts, depths, strict=True)])  # (t, H)
            geometry = (chunk.direction, chunk.log_envelope, chunk.center - chunk.first)
            dataset = chunk.of_atoms(atoms.dataset)
            return read_head(self.force_head, dataset, chunk.of_atoms(node), edge, *geometry)

        return torch.cat(tokens.map(read_forces, *edges))

    def check_systems(self, charge: Tensor, spin_multiplicity: Tensor) -> None:
        """Raises DataError for a charge or multiplicity ``(B,)`` out of range, where the model is conditioned on it."""
        self.system_embedding.check(charge, spin_multiplicity)

    def parts(self) -> dict[str, list[nn.Module]]:
        """Returns ``embedding``, ``blocks.0`` and so on, ``readouts`` and ``heads``."""
        named = dict(self.named_children())
        parts = {f"blocks.{depth}": [block] for depth, block in enumerate(self.blocks)}
        readouts = ("node_readouts", "node_projection", "edge_readouts", "edge_projection")
        heads = ("energy_head", "force_head", "heads")
        for part, names in (("readouts", readouts), ("heads", heads)):
            parts[part] = [named.pop(name) for name in names if name in named]
        named.pop("blocks")
        return {"embedding": list(named.values()), **parts}

    def take_heads(self, chosen: Sequence[int]) -> None:
        """Replaces the heads of energy and direct forces by copies of some; see ``Model``."""
        for name in ("energy_head", "force_head"):
            head = getattr(self, name, None)
            if head is not None:
                heads = list(head) if isinstance(head, HeadPerSet) else [head]
                setattr(self, name, per_set([copy.deepcopy(heads[number]) for number in chosen]))
        self.config = dataclasses.replace(self.config, num_energy_heads=len(chosen))


def _attributes(c: EScAIPConfig, basis: GaussianBasis) -> EdgeAttributes:
    return EdgeAttributes(
        basis, c.distance_table, c.distance_knots, MAX_ATOMIC_NUMBER + 1, c.element_size, c.order_features, c.boo_size,
        c.distance_size, c.hidden_size, c.activation, c.norm, c.dropout,
    )  # fmt: skip


def _block(c: EScAIPConfig, basis: GaussianBasis, layer: int) -> Block:
    # The last block's edges are read by direct-force models only.
    needs_edges = layer < c.num_layers - 1 or not c.is_conservative
    return Block(
        _attributes(c, basis),
        Message(c.hidden_size, c.activation, c.norm, c.message_gate, c.dropout),
        NeighborhoodAttention(
            c.hidden_size, c.num_heads, c.angular_channels, c.angular_values, c.scale, c.aggregation,
            c.attention_dropout, c.attention_backend, needs_edges,
        ),
        c.hidden_size, c.ffn_multiplier, c.activation, c.norm, c.node_dropout, c.edge_dropout,
        c.stochastic_depth, needs_edges, c.edge_ffn, _density_update(c),
    )  # fmt: skip


def _density(c: EScAIPConfig) -> DensityInvariants:
    return DensityInvariants(c.density_radial, c.density_degree, c.density_channels, c.cutoff, MAX_ATOMIC_NUMBER + 1)


def _density_update(c: EScAIPConfig) -> DensityUpdate | None:
    if not c.node_density:
        return None
    return DensityUpdate(c.hidden_size, c.node_density, c.node_density_degree, c.num_neighbors or _USUAL_NEIGHBORS)
