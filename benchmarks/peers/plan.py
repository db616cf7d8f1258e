"""Who is measured, and which of them are compared with each other."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

SUITES = ("inference", "training", "cost")
GROUPS = ("published", "others")  # whose processes are alive at the same time, REFERENCE in each
REFERENCE = "escaip 1m"
WEIGHTS = "@weights/"  # stands before the name of a folder in which a worker leaves weights for another


@dataclass(frozen=True)
class Variant:
    """One row of the tables.

    Attributes:
        name: in the tables.
        peer: whose environment and adapter it needs.
        options: of the adapter.
        suites: that it takes part in.
    """

    name: str
    peer: str
    options: dict[str, Any] = field(default_factory=dict)
    suites: tuple[str, ...] = ("inference",)

    @property
    def group(self) -> str:
        """Of GROUPS; relations are between members of one, or with REFERENCE."""
        return "published" if self.peer == "fairchem" or "weights" in self.options else "others"


@dataclass(frozen=True)
class Relation:
    """One line per case: how many times as fast ``ours`` is as ``theirs``.

    Attributes:
        same_function: both have the same weights, so their energies are compared too.
    """

    ours: str
    theirs: str
    same_function: bool = False


_TRAINED = ("inference", "training")
_CONSERVATIVE = {"architecture": "escaip", "direct": False, "export": f"{WEIGHTS}conservative"}
_DIRECT = {"architecture": "escaip", "direct": True, "export": f"{WEIGHTS}direct"}
_OURS = {"weights": f"{WEIGHTS}conservative"}
_OURS_DIRECT = {"weights": f"{WEIGHTS}direct"}
_SMALLER = {"preset": "1m", "hidden_size": 64, "angular_channels": [5, 3, 1, 3, 4]}  # about as many as CHGNet has

_BEFORE = {  # the preset before angles reached values and nodes
    "preset": "1m", "num_radial": 32, "radial_width": 2.0, "boo_degrees": 10, "angular_values": False,
    "node_density": 0, "edge_ffn": True,
}  # fmt: skip

# fairchem's come first: they leave the weights that escaip's at the published size take.
VARIANTS: tuple[Variant, ...] = (
    Variant("fairchem EScAIP", "fairchem", _CONSERVATIVE, SUITES),
    Variant("fairchem EScAIP direct", "fairchem", _DIRECT),
    Variant("fairchem EScAIP direct, compiled", "fairchem",
            {"architecture": "escaip", "direct": True, "compiled": True}),
    Variant("fairchem AllScAIP", "fairchem", {"architecture": "allscaip", "direct": False}),
    Variant("fairchem AllScAIP direct", "fairchem", {"architecture": "allscaip", "direct": True}),
    Variant("escaip published size", "escaip", _OURS, SUITES),
    Variant("escaip published size, compiled", "escaip", {**_OURS, "compiled": True}, _TRAINED),
    Variant("escaip published size, table", "escaip", {**_OURS, "distance_table": "inference"}, ("inference", "cost")),
    Variant("escaip published size, table, compiled", "escaip",
            {**_OURS, "distance_table": "inference", "compiled": True}),
    Variant("escaip published size, table in training", "escaip", {**_OURS, "distance_table": "always"}, ("training",)),
    Variant("escaip published size, table in training, compiled", "escaip",
            {**_OURS, "distance_table": "always", "compiled": True}, ("training",)),
    Variant("escaip published size direct", "escaip", _OURS_DIRECT),
    Variant("escaip published size direct, compiled", "escaip", {**_OURS_DIRECT, "compiled": True}),
    Variant("escaip published size direct, table", "escaip", {**_OURS_DIRECT, "distance_table": "inference"}),
    Variant("escaip published size direct, table, compiled", "escaip",
            {**_OURS_DIRECT, "distance_table": "inference", "compiled": True}),
    Variant("escaip 300k", "escaip", {"preset": "300k"}),
    Variant("escaip 300k, compiled", "escaip", {"preset": "300k", "compiled": True}),
    Variant("escaip 0.45 M", "escaip", _SMALLER),
    Variant("escaip 0.45 M, compiled", "escaip", {**_SMALLER, "compiled": True}),
    Variant("escaip 1m", "escaip", {"preset": "1m"}, SUITES),
    Variant("escaip 1m, compiled", "escaip", {"preset": "1m", "compiled": True}, SUITES),
    Variant("escaip 1m, without angles", "escaip", _BEFORE, _TRAINED),
    Variant("escaip 1m, without angles, compiled", "escaip", {**_BEFORE, "compiled": True}, _TRAINED),
    Variant("escaip 5m", "escaip", {"preset": "5m"}, _TRAINED),
    Variant("escaip 5m, compiled", "escaip", {"preset": "5m", "compiled": True}, _TRAINED),
    Variant("escaip 20m, compiled", "escaip", {"preset": "20m", "compiled": True}),
    Variant("MACE medium, 8 elements", "mace", {"size": "medium-few"}),
    Variant("MACE-MP-0 small", "mace", {"size": "mp-small"}, _TRAINED),
    Variant("MACE-MP-0 medium", "mace", {"size": "mp-medium"}, _TRAINED),
    Variant("MACE-MP-0 small, compiled", "mace", {"size": "mp-small", "compiled": True}),
    Variant("MACE-OFF23 small", "mace", {"size": "off-small"}, _TRAINED),
    Variant("MACE-OFF23 medium", "mace", {"size": "off-medium"}, _TRAINED),
    Variant("NequIP small", "nequip", {"size": "small"}),
    Variant("NequIP small, compiled", "nequip", {"size": "small", "compiled": True}),
    Variant("NequIP medium", "nequip", {"size": "medium"}),
    Variant("NequIP medium, compiled", "nequip", {"size": "medium", "compiled": True}),
    Variant("ORB v3 20", "orb", {"neighbors": 20}),
    Variant("ORB v3 20, compiled", "orb", {"neighbors": 20, "compiled": True}),
    Variant("ORB v3 120, compiled", "orb", {"neighbors": 120, "compiled": True}),
    Variant("CHGNet 0.3.0", "chgnet"),
)  # fmt: skip

RELATIONS: tuple[Relation, ...] = (
    Relation("escaip published size", "fairchem EScAIP", same_function=True),
    Relation("escaip published size, compiled", "fairchem EScAIP", same_function=True),
    Relation("escaip published size, table, compiled", "fairchem EScAIP", same_function=True),
    Relation("escaip published size, table in training", "fairchem EScAIP", same_function=True),
    Relation("escaip published size, table in training, compiled", "fairchem EScAIP", same_function=True),
    Relation("escaip published size direct", "fairchem EScAIP direct", same_function=True),
    Relation("escaip published size direct, table", "fairchem EScAIP direct", same_function=True),
    Relation("escaip published size direct, table, compiled", "fairchem EScAIP direct", same_function=True),
    Relation("escaip published size direct, table, compiled", "fairchem EScAIP direct, compiled"),
    Relation("escaip published size, table, compiled", "fairchem AllScAIP"),
    Relation("escaip 1m", "MACE-MP-0 small"),
    Relation("escaip 1m, compiled", "MACE-MP-0 small"),
    Relation("escaip 1m, compiled", "MACE-MP-0 medium"),
    Relation("escaip 1m", "escaip 1m, without angles"),
    Relation("escaip 1m, compiled", "escaip 1m, without angles, compiled"),
    Relation("escaip 1m, compiled", "NequIP small, compiled"),
    # About as many parameters each:
    Relation("escaip 0.45 M, compiled", "CHGNet 0.3.0"),
    Relation("escaip 300k, compiled", "NequIP small, compiled"),
    Relation("escaip 0.45 M, compiled", "NequIP small, compiled"),
    Relation("escaip 1m, compiled", "NequIP medium, compiled"),
    Relation("escaip 1m, compiled", "MACE medium, 8 elements"),
    Relation("escaip 5m, compiled", "MACE-MP-0 small"),
    Relation("escaip 5m, compiled", "MACE-MP-0 medium"),
    Relation("escaip 20m, compiled", "ORB v3 20, compiled"),
)


def chosen(peers: list[str], suites: list[str], names: list[str] | None = None) -> list[Variant]:
    """The variants of some peers that take part in some suites, in the order of the plan."""
    return [
        variant
        for variant in VARIANTS
        if variant.peer in peers and set(variant.suites) & set(suites) and (names is None or variant.name in names)
    ]


def grouped(variants: list[Variant]) -> dict[str, list[Variant]]:
    """The variants of each group that has any, and REFERENCE with them where it is among the variants at all."""
    reference = [variant for variant in variants if variant.name == REFERENCE]
    found = {}
    for group in GROUPS:
        members = [variant for variant in variants if variant.group == group]
        if members:
            found[group] = members + [variant for variant in reference if variant not in members]
    return found


def exporter(weights: str) -> str:
    """The variant that leaves the weights of this name."""
    return next(v.name for v in VARIANTS if v.options.get("export") == weights)
