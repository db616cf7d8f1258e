"""The tensors that pass between floors, with every shape and unit.

Symbols: ``N`` atoms, ``B`` systems, ``E`` candidate edges, ``T`` tokens (``N`` self
tokens plus the neighbors kept), ``X`` extra candidates, ``P`` rank pairs. Lengths in Å,
energies in eV, forces in eV/Å, stress in eV/Å³ (positive in tension, as in ASE).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from escaip.errors import ConfigError

MAX_CHARGE = 20
"""Largest total charge, of either sign, that a potential knows: far beyond any molecule in the data sets."""

T_ = TypeVar("T_", bound="_Movable")


@dataclass(frozen=True)
class Target:
    """A quantity that structures carry as a label and that models predict.

    Structures, stores, losses, metrics, reports and calculators iterate over ``TARGETS``, so that a target that is
    registered there is read, trained on, reported and served without further code (docs/extend/head.md).

    Attributes:
        name: of the label in a structure, of the prediction and of the calculator's property.
        per_atom: whether there is one value for each atom, or one for each structure.
        shape: of one value; ``()`` for a number.
        unit: of labels and predictions, after conversion at the door: ``"eV"``, ``"eV/Å"``.
        reported_unit: unit of errors in tables.
        reported_factor: what an error in ``unit`` is multiplied by to be in ``reported_unit``.
        extensive: whether errors are divided by the number of atoms.
        needs_cell: whether only periodic structures have it.
    """

    name: str
    per_atom: bool
    shape: tuple[int, ...]
    unit: str
    reported_unit: str
    reported_factor: float = 1.0
    extensive: bool = False
    needs_cell: bool = False


TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target("energy", False, (), "eV", "meV/atom", 1e3, extensive=True),
        Target("forces", True, (3,), "eV/Å", "meV/Å", 1e3),
        Target("stress", False, (3, 3), "eV/Å³", "meV/Å³", 1e3, needs_cell=True),
    )
}
"""Every target by name; the first three are always there."""


def register_target(target: Target) -> Target:
    """Adds a target to ``TARGETS`` and returns it.

    Raises:
        ConfigError: another target has that name, or the name is no identifier.
    """
    if not target.name.isidentifier():
        raise ConfigError(f"target name {target.name!r} is no identifier: use letters, digits and underscores")
    if TARGETS.setdefault(target.name, target) != target:
        raise ConfigError(f"target {target.name!r} is registered already with another definition: choose another name")
    return target


class StructureBatch(Protocol):
    """A batch of ``B`` structures with ``N`` atoms, as ``escaip.data.collate`` returns it; missing labels are NaN.

    Attributes:
        positions: ``(N, 3)`` float64 Å.
        cell: ``(B, 3, 3)`` float64 Å, rows are lattice vectors.
        pbc: ``(B, 3)`` bool.
        atomic_numbers: ``(N,)`` int64.
        batch: ``(N,)`` int64, index of the structure of each atom.
        ptr: ``(B + 1,)`` int64, first atom of each structure.
        charge: ``(B,)`` int64, total charge in e.
        spin_multiplicity: ``(B,)`` int64.
        dataset: ``(B,)`` int64, index of the data set, −1 unstated.
        energy: ``(B,)`` float64 eV.
        forces: ``(N, 3)`` float64 eV/Å.
        stress: ``(B, 3, 3)`` float64 eV/Å³.
        fixed: ``(N,)`` bool, atoms held by a constraint.
        structure_id: ``B`` names.
    """

    positions: Tensor
    cell: Tensor
    pbc: Tensor
    atomic_numbers: Tensor
    batch: Tensor
    ptr: Tensor
    charge: Tensor
    spin_multiplicity: Tensor
    dataset: Tensor
    energy: Tensor
    forces: Tensor
    stress: Tensor
    fixed: Tensor
    structure_id: list[str]


class _Movable:
    """Frozen dataclass whose tensors move together."""

    def to(self: T_, device: torch.device | str, non_blocking: bool = False) -> T_:
        """Returns a copy with every tensor on ``device``; dtypes are kept."""
        moved: dict[str, Any] = {}
        for entry in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, entry.name)
            moved[entry.name] = value.to(device, non_blocking=non_blocking) if isinstance(value, Tensor) else value
        return type(self)(**moved)


@dataclass(frozen=True)
class GraphSettings:
    """What decides which neighbors an atom attends to (docs/concepts/graph.md).

    Attributes:
        cutoff: radius ``r_c`` in Å beyond which nothing interacts.
        num_neighbors: ``k`` of the k-nearest-neighbor envelope; None for a plain radius graph.
        soft: soft (differentiable) ranks; False counts neighbors, with half a rank for ties.
        rank_scale: ``s`` in Å, the distance over which two neighbors swap rank.
        envelope_scale: ``tau`` of the log-sum-exp that joins ranks and distance.
        rank_step: ``"sine"`` (EScAIP) or ``"bump"`` (AllScAIP), the step between two ranks.
        rank_truncation: None for exact ranks; else only the ``num_neighbors + rank_truncation`` nearest, the atom
            itself included, are ranked, and farther ones are no neighbors. 20 as published, for imported weights.
        periodic: False for models that know no periodicity: structures with a periodic axis are refused.
    """

    cutoff: float = 6.0
    num_neighbors: int | None = 30
    soft: bool = True
    rank_scale: float = 0.2
    envelope_scale: float = 0.1
    rank_step: str = "sine"
    rank_truncation: int | None = None
    periodic: bool = True


@dataclass(frozen=True)
class NeighborList(_Movable):
    """All directed pairs closer than ``cutoff``: topology only, no gradient.

    Attributes:
        center: ``(E,)`` int64, index of the central atom in the batch.
        neighbor: ``(E,)`` int64, index of the neighboring atom in the batch.
        shift: ``(E, 3)`` int64, cell translations; the neighbor sits at
            ``positions[neighbor] + shift @ cell``, for the positions as given (not wrapped).
        cutoff: radius in Å up to which the list is complete.
    """

    center: Tensor
    neighbor: Tensor
    shift: Tensor
    cutoff: float


@dataclass(frozen=True)
class TokenLayout(_Movable):
    """Which rows of a batch belong to which atom: indices only, no gradient.

    Tokens of atom ``i`` are ``offsets[i] : offsets[i + 1]``; the first is its self token, the others its neighbors by
    increasing distance. Candidates that are no token but still influence a rank follow as ``X`` extra rows of
    ``center`` and ``neighbor``.

    Attributes:
        offsets: ``(N + 1,)`` int64.
        center: ``(T + X,)`` int64.
        neighbor: ``(T + X,)`` int64; of a self token, the atom itself.
        reverse: ``(T,)`` int64, token of the same edge seen from the other end; of a self token,
            itself. An involution.
        self_token: ``(N,)`` int64, equal to ``offsets[:-1]``.
        rank_base: ``(T,)`` float64, rank contributed by candidates that are surely nearer (all of the
            rank when ranks are hard); 0 for self tokens.
        rank_token: ``(P,)`` int64 in ``[0, T)``, token whose rank a pair adds to.
        rank_other: ``(P,)`` int64 in ``[0, T + X)``, the candidate it is compared with.
    """

    offsets: Tensor
    center: Tensor
    neighbor: Tensor
    reverse: Tensor
    self_token: Tensor
    rank_base: Tensor
    rank_token: Tensor
    rank_other: Tensor

    @property
    def num_atoms(self) -> int:
        """Number of atoms ``N``."""
        return self.offsets.shape[0] - 1

    @property
    def num_tokens(self) -> int:
        """Number of tokens ``T``."""
        return self.reverse.shape[0]

    @property
    def token_center(self) -> Tensor:
        """``(T,)`` central atom of each token."""
        return self.center[: self.num_tokens]

    @property
    def token_neighbor(self) -> Tensor:
        """``(T,)`` neighboring atom of each token."""
        return self.neighbor[: self.num_tokens]


@dataclass(frozen=True)
class Graph(TokenLayout):
    """The token layout of a batch, and where the neighbors are (design: tokens, not padding).

    Attributes:
        shift: ``(T + X, 3)`` int64, cell translations of the rows.
        max_neighborhood: longest run of tokens (at least 1 when there are atoms).
    """

    shift: Tensor
    max_neighborhood: int


@dataclass(frozen=True)
class Geometry(_Movable):
    """Differentiable geometry of the tokens: pure functions of positions, cell and strain.

    Attributes:
        displacement: ``(T, 3)`` Å, ``r_j + S·cell − r_i``; zero for self tokens.
        distance: ``(T,)`` Å; zero for self tokens.
        direction: ``(T, 3)`` unit vectors; zero for self tokens.
        log_envelope: ``(T,)`` ``−x²/(1 − x²)``; 0 for self tokens, −inf where ``x ≥ 1``.
    """

    displacement: Tensor
    distance: Tensor
    direction: Tensor
    log_envelope: Tensor


@dataclass(frozen=True)
class Tokens(_Movable):
    """The tokens of ``n`` consecutive atoms, layout and geometry: what a block reads at once.

    Attributes:
        first: index of the first of these atoms in the batch.
        offsets: ``(n + 1,)`` int64, from 0.
        self_token: ``(n,)`` int64, equal to ``offsets[:-1]``.
        center: ``(t,)`` int64, atom in the batch.
        neighbor: ``(t,)`` int64, atom in the batch.
        distance: ``(t,)`` Å.
        direction: ``(t, 3)``.
        log_envelope: ``(t,)``.
    """

    first: int
    offsets: Tensor
    self_token: Tensor
    center: Tensor
    neighbor: Tensor
    distance: Tensor
    direction: Tensor
    log_envelope: Tensor

    @property
    def num_atoms(self) -> int:
        """Number of atoms ``n``."""
        return self.self_token.shape[0]

    def of_atoms(self, x: Tensor) -> Tensor:
        """The rows of these atoms among those of all: ``(N, ...)`` to ``(n, ...)``."""
        return x.narrow(0, self.first, self.num_atoms)


@dataclass(frozen=True)
class AtomInputs(_Movable):
    """What a model knows of each atom besides where it is.

    Attributes:
        atomic_numbers: ``(N,)`` int64.
        charge: ``(N,)`` int64, total charge of the atom's system.
        spin_multiplicity: ``(N,)`` int64, of the atom's system.
        first_of_system: ``(N,)`` int64, index of the first atom of the atom's system.
        dataset: ``(N,)`` int64, index of the data set of the atom's system, for models with an energy head for each; 0
            for others.
    """

    atomic_numbers: Tensor
    charge: Tensor
    spin_multiplicity: Tensor
    first_of_system: Tensor
    dataset: Tensor

    @classmethod
    def of_batch(cls, batch: StructureBatch, dataset: Tensor | None = None) -> AtomInputs:
        """Reads a batch of structures, of the data sets ``(B,)``."""
        first = batch.ptr[:-1][batch.batch]
        charge, spin = batch.charge[batch.batch], batch.spin_multiplicity[batch.batch]
        head = torch.zeros_like(first) if dataset is None else dataset[batch.batch]
        return cls(batch.atomic_numbers, charge, spin, first, head)


@dataclass(frozen=True)
class ModelOutput:
    """What an architecture computes, before references, scale and derivatives.

    Attributes:
        energy: ``(N,)`` per-atom energy in units of the potential's scale.
        forces: ``(N, 3)`` direct forces in the same unit per Å, or None (conservative models).
        properties: for each further head ``(N, ...)`` per-atom values in the unit of the target of that name.
    """

    energy: Tensor
    forces: Tensor | None = None
    properties: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Prediction:
    """What a ``Potential`` returns.

    Attributes:
        energy: ``(B,)`` eV, float64.
        forces: ``(N, 3)`` eV/Å, or None when they were not asked for.
        stress: ``(B, 3, 3)`` eV/Å³, positive in tension, or None when not asked for; NaN for
            a system whose cell has no volume.
        atomic_energies: ``(N,)`` eV, float64, references included; sums to ``energy``.
        atomic_virials: ``(N, 3, 3)`` eV, float64, see ``escaip.potential.derivatives.virials_of``; sums to
            ``V · stress``. None when not asked for.
        properties: for each further head of the model ``(N, ...)`` or ``(B, ...)`` values, as ``TARGETS`` says of
            the target of that name; in its unit.
    """

    energy: Tensor
    forces: Tensor | None
    stress: Tensor | None
    atomic_energies: Tensor
    atomic_virials: Tensor | None = None
    properties: dict[str, Tensor] = field(default_factory=dict)

    def of_target(self, name: str) -> Tensor | None:
        """Returns the values of a target, or None where they are missing."""
        found: Tensor | None = self.properties.get(name, getattr(self, name, None))
        return found
