"""What defines an EScAIP model: one flat, frozen, checked set of plain values."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

from escaip.errors import ConfigError
from escaip.models.protocol import ModelConfig, check_fading_ranks
from escaip.nn.heads import check_heads
from escaip.nn.layers import NORMS, SMOOTH_ACTIVATIONS, make_activation
from escaip.ops.backends import check_backend
from escaip.ops.harmonics import MAX_DEGREE
from escaip.types import GraphSettings


@dataclass(frozen=True)
class EScAIPConfig(ModelConfig):
    """Every number that defines an EScAIP (arXiv 2410.24169); see docs/concepts/model.md.

    Attributes:
        hidden_size: ``H``, features per token and atom.
        num_layers: ``L``, blocks.
        num_heads: ``h``; divides ``hidden_size``.
        angular_channels: channels of each head per angular degree ``l = 0 .. 4``, summing to
            ``hidden_size / num_heads``; None for attention without bond angles.
        angular_values: multiply the values by angles too, see ``escaip.ops.neighborhood_attention``.
        attention_scale: ``"head"`` for ``1/√d``, ``"expanded"`` for one over the root of the
            expanded width ``Σ_l (2l+1) c_l`` rounded up to a multiple of 8, as published.
        attention_backend: ``"auto"`` or a name from ``escaip.ops.available_backends()``.
        cutoff, num_neighbors, soft, rank_scale, envelope_scale, rank_step, rank_truncation, periodic: the graph, see
            ``GraphSettings``; lengths in Å.
        forces: ``"conservative"`` (−∂E/∂r) or ``"direct"`` (a head of its own, not equivariant).
        num_radial: Gaussians on ``[0, cutoff]``.
        radial_width: width of a Gaussian in spacings.
        distance_size: width of the distance embedding.
        distance_table: whether the distance embeddings are read from a spline table instead of evaluated for every
            token: ``"always"``, ``"inference"`` (in evaluation mode) or ``"never"``.
        distance_knots: intervals of the table on ``[0, cutoff]``; its error falls with their sixth power.
        element_size: width of each element embedding.
        boo_degrees: bond-orientational order for ``l = 0 .. boo_degrees − 1``; 1 is without it, as l = 0 is 1 always.
        boo_size: width of its embedding.
        boo_weighting: ``"envelope"`` (smooth) or ``"uniform"`` (as published: the energy jumps when
            a neighbor enters or leaves).
        boo_floor: ``ε`` in the root of the orientational order, which symmetry takes to zero: features of a perfect
            crystal change over displacements of some ``√ε`` of a bond. Published weights have 1e-6.
        density_radial: Gaussians of the density invariants (``escaip.nn.density``), 0 for none: sums over neighbors as
            features of atoms, and an energy linear in them that is solved for before training and in its course.
        density_degree: their highest ``l``.
        density_channels: their channels, one for each element in training.
        node_density: channels of the densities of neighbors (``escaip.nn.density.DensityUpdate``) that update atoms at
            the input and in every block; 0 for none.
        node_density_degree: its highest ``l``.
        force_weighting: ``"envelope"`` or ``"uniform"`` sum over edges in the direct-force head.
        ffn_multiplier, readout_multiplier, output_multiplier: hidden width of the feed-forward
            networks in blocks, readouts and heads, in units of ``hidden_size``.
        edge_ffn: whether blocks have a feed-forward network on edges, beside that on nodes.
        message_gate: gated message instead of the linear one.
        aggregation: ``"self"`` reads a node from its self token, ``"graph_attention"`` from an
            attention-weighted mean of its tokens.
        activation, norm: by name, see ``escaip.nn.layers``.
        energy_norm: norm before the energy head.
        num_energy_heads: heads of energy and direct forces on one trunk: 1 for all data sets, or one for each set of a
            mixture, in the order of ``PotentialMetadata.datasets``.
        charge, spin: condition on total charge and on spin multiplicity.
        dropout, attention_dropout, node_dropout, edge_dropout, scalar_dropout, vector_dropout,
        stochastic_depth: probabilities, in training only.
        heads: names of heads beside energy and forces, see ``escaip.nn.heads.HEADS``.

    Raises:
        ConfigError: a value is out of range or does not fit another.
    """

    hidden_size: int = 128
    num_layers: int = 4
    num_heads: int = 4
    angular_channels: tuple[int, ...] | None = (10, 5, 2, 5, 10)
    angular_values: bool = False
    attention_scale: str = "head"
    attention_backend: str = "auto"
    cutoff: float = 6.0
    num_neighbors: int | None = 30
    soft: bool = True
    rank_scale: float = 0.2
    envelope_scale: float = 0.1
    rank_step: str = "sine"
    rank_truncation: int | None = None
    periodic: bool = True
    forces: str = "conservative"
    num_radial: int = 600
    radial_width: float = 2.0
    distance_size: int = 512
    distance_table: str = "never"
    distance_knots: int = 4096
    element_size: int = 128
    boo_degrees: int = 10
    boo_size: int = 64
    boo_weighting: str = "envelope"
    boo_floor: float = 1e-4
    density_radial: int = 0
    density_degree: int = 4
    density_channels: int = 2
    node_density: int = 0
    node_density_degree: int = 4
    force_weighting: str = "envelope"
    ffn_multiplier: int = 2
    readout_multiplier: int = 2
    output_multiplier: int = 2
    edge_ffn: bool = True
    message_gate: bool = False
    aggregation: str = "self"
    activation: str = "gelu"
    norm: str = "rmsnorm"
    energy_norm: bool = True
    num_energy_heads: int = 1
    charge: bool = False
    spin: bool = False
    dropout: float = 0.0
    attention_dropout: float = 0.0
    node_dropout: float = 0.0
    edge_dropout: float = 0.0
    scalar_dropout: float = 0.0
    vector_dropout: float = 0.0
    stochastic_depth: float = 0.0
    heads: tuple[str, ...] = ()

    def check_graph_skin(self, skin: float) -> None:
        """Raises ConfigError where neighbors enter or leave with a weight, so that a graph cannot be kept."""
        forces_fade = self.is_conservative or self.force_weighting == "envelope"
        check_fading_ranks(self.graph, skin, forces_fade and self.boo_weighting == "envelope")

    def __post_init__(self) -> None:
        if self.angular_channels is not None:
            object.__setattr__(self, "angular_channels", tuple(self.angular_channels))
        object.__setattr__(self, "heads", tuple(self.heads))
        self._check_sizes()
        self._check_choices()

    @functools.cached_property
    def graph(self) -> GraphSettings:
        """The settings that decide which neighbors an atom attends to."""
        names = [field.name for field in dataclasses.fields(GraphSettings)]
        return GraphSettings(**{name: getattr(self, name) for name in names})

    @property
    def is_conservative(self) -> bool:
        """Forces are the negative gradient of the energy."""
        return self.forces == "conservative"

    @property
    def order_features(self) -> int:
        """Features of an atom from its neighbors alone: bond-orientational order and density invariants."""
        pairs = self.density_channels * (self.density_channels + 1) // 2
        return self.boo_degrees + self.density_radial * (self.density_channels + pairs * (self.density_degree + 1))

    @property
    def kept_per_token(self) -> int:
        """Numbers that automatic differentiation keeps for a token: 15 to 16 for a feature of a block, measured."""
        return 16 * self.num_layers * self.hidden_size

    def used_per_token(self, differentiate: bool) -> int:
        """Returns, from above, how many numbers a token takes at once (benchmarks/kept.py)."""
        density = self.density_channels * self.density_radial * (self.density_degree + 1) ** 2
        if self.node_density:
            density += (self.num_layers + 1) * (self.node_density + (self.node_density_degree + 1) ** 2)
        return (
            self.kept_per_token + 16 * self.hidden_size + 4 * density
            if differentiate
            else (12 + 5 * self.num_layers) * self.hidden_size + 2 * density
        )

    def at_width(self, hidden_size: int) -> EScAIPConfig:
        """Returns the same model at another width: heads of the same size, as many as fit.

        Raises:
            ConfigError: the width is not a multiple of the size of a head.
        """
        head = self.hidden_size // self.num_heads
        if hidden_size < 1 or hidden_size % head:
            raise ConfigError(
                f"a width of {hidden_size} is not a multiple of the size of a head, {head} (hidden_size "
                f"{self.hidden_size} / num_heads {self.num_heads}): change one of them"
            )
        return dataclasses.replace(self, hidden_size=hidden_size, num_heads=hidden_size // head)

    @property
    def scale(self) -> float:
        """Factor on the attention products."""
        if self.attention_scale == "head" or self.angular_channels is None:
            return (self.hidden_size // self.num_heads) ** -0.5
        expanded = sum((2 * degree + 1) * count for degree, count in enumerate(self.angular_channels))
        return (8 * -(-expanded // 8)) ** -0.5

    def _check_sizes(self) -> None:
        sizes = ("hidden_size", "num_layers", "num_heads", "distance_size", "element_size", "boo_degrees", "boo_size",
                 "density_channels", "ffn_multiplier", "readout_multiplier", "output_multiplier",
                 "num_energy_heads")  # fmt: skip
        for name, least in {**dict.fromkeys(sizes, 1), "num_radial": 2, "distance_knots": 8}.items():
            if getattr(self, name) < least:
                raise ConfigError(f"model setting {name} is {getattr(self, name)}: it must be at least {least}")
        for name in ("cutoff", "rank_scale", "envelope_scale", "radial_width", "boo_floor"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"model setting {name} is {getattr(self, name)}: it must be above 0")
        if self.density_radial < 0 or self.density_radial == 1:
            raise ConfigError(
                f"model setting density_radial is {self.density_radial}: it must be 0 for none, or above 1"
            )
        if not 0 <= self.density_degree <= MAX_DEGREE:
            raise ConfigError(f"model setting density_degree is {self.density_degree}: it must be in 0 .. {MAX_DEGREE}")
        if self.node_density < 0:
            raise ConfigError(f"model setting node_density is {self.node_density}: it must be 0 for none, or above")
        if not 1 <= self.node_density_degree <= MAX_DEGREE:
            raise ConfigError(
                f"model setting node_density_degree is {self.node_density_degree}: it must be in 1 .. {MAX_DEGREE}"
            )
        if self.boo_degrees > 10:
            raise ConfigError(f"model setting boo_degrees is {self.boo_degrees}: it must be at most 10")
        if self.num_neighbors is not None and self.num_neighbors < 1:
            raise ConfigError("model setting num_neighbors must be at least 1, or null for a plain radius graph")
        if self.rank_truncation is not None and not (self.soft and self.num_neighbors and self.rank_truncation >= 0):
            raise ConfigError(
                f"model setting rank_truncation is {self.rank_truncation}: it must be null, or at least 0 with soft "
                "ranks and num_neighbors"
            )
        if self.hidden_size % self.num_heads:
            raise ConfigError(
                f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}: change one of them"
            )
        head = self.hidden_size // self.num_heads
        if self.angular_channels is not None and sum(self.angular_channels) != head:
            raise ConfigError(
                f"angular_channels {list(self.angular_channels)} sum to {sum(self.angular_channels)}: they must sum to "
                f"hidden_size / num_heads = {head}"
            )
        if self.angular_values and self.angular_channels is None:
            raise ConfigError(
                "model setting angular_values needs angular_channels: give channels of each degree, or set it to false"
            )
        for name in ("dropout", "attention_dropout", "node_dropout", "edge_dropout", "scalar_dropout",
                     "vector_dropout", "stochastic_depth"):  # fmt: skip
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ConfigError(f"model setting {name} is {getattr(self, name)}: it must be in [0, 1)")

    def _check_choices(self) -> None:
        choices = {
            "forces": ("conservative", "direct"),
            "attention_scale": ("head", "expanded"),
            "boo_weighting": ("envelope", "uniform"),
            "force_weighting": ("envelope", "uniform"),
            "aggregation": ("self", "graph_attention"),
            "rank_step": ("sine", "bump"),
            "distance_table": ("always", "inference", "never"),
            "norm": NORMS,
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(f"model setting {name} is {getattr(self, name)!r}: choose {' or '.join(allowed)}")
        make_activation(self.activation)
        check_backend(self.attention_backend)
        check_heads(self.heads)
        if self.density_radial and not self.is_conservative:
            raise ConfigError("density_radial is for conservative forces: set it to 0 for direct ones")
        if self.is_conservative and self.activation not in SMOOTH_ACTIVATIONS:
            raise ConfigError(
                f"activation {self.activation!r} has a kink, so conservative forces would jump: choose "
                f"{', '.join(SMOOTH_ACTIVATIONS)}, or forces: direct"
            )


# Sizes by number of parameters of the conservative model. The larger ones have the published angular groups.
_PUBLISHED_CHANNELS = (20, 10, 4, 10, 20)
# Few wide Gaussians and low degrees: what training did not show stays close to what it did. Angles reach the values,
# densities of neighbors the nodes. A network on edges costs a tenth of a step and gains nothing.
_SMOOTH: dict[str, Any] = {
    "num_radial": 10, "radial_width": 1.0, "boo_degrees": 5, "distance_table": "always", "distance_knots": 256,
    "angular_values": True, "node_density": 16, "edge_ffn": False,
}  # fmt: skip
PRESETS: dict[str, dict[str, Any]] = {
    "300k": {
        "hidden_size": 64, "num_layers": 2, "num_heads": 4, "angular_channels": (5, 3, 1, 3, 4), "num_neighbors": 20,
        "distance_size": 64, "element_size": 64, "boo_size": 32, **_SMOOTH,
    },
    "1m": {
        "hidden_size": 96, "num_layers": 3, "num_heads": 4, "angular_channels": (8, 4, 2, 4, 6),
        "distance_size": 64, **_SMOOTH,
    },
    "5m": {
        "hidden_size": 192, "num_layers": 5, "num_heads": 6, "angular_channels": (10, 5, 2, 5, 10), **_SMOOTH,
    },
    "20m": {
        "hidden_size": 384, "num_layers": 5, "num_heads": 6, "angular_channels": _PUBLISHED_CHANNELS, **_SMOOTH,
    },
    "45m": {
        "hidden_size": 512, "num_layers": 7, "num_heads": 8, "angular_channels": _PUBLISHED_CHANNELS,
        "distance_size": 1024, "element_size": 256, **_SMOOTH,
    },
    "85m": {
        "hidden_size": 640, "num_layers": 9, "num_heads": 10, "angular_channels": _PUBLISHED_CHANNELS, **_SMOOTH,
    },
}  # fmt: skip
EScAIPConfig.PRESETS = PRESETS
