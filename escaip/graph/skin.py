"""Neighbor lists and graphs that are kept while atoms move, and rebuilt when they could be incomplete."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from escaip.graph.neighbors import neighbor_list
from escaip.types import Graph, NeighborList, StructureBatch

T = TypeVar("T")
# Covers the rounding of the bounds themselves.
_ROUNDING = 1.0 + 1e-12


@dataclass(frozen=True)
class Snapshot:
    """Positions and cell of one structure on the host, compared there without waiting for a device.

    Attributes:
        positions: ``(N, 3)`` float64, Å.
        cell: ``(3, 3)`` float64, Å, rows are lattice vectors.
        pbc: ``(3,)`` bool.
    """

    positions: Tensor
    cell: Tensor
    pbc: Tensor

    @classmethod
    def of(cls, batch: StructureBatch) -> Snapshot:
        """Copies those of a batch of one structure."""
        return cls(*(x.clone() for x in (batch.positions.cpu(), batch.cell[0].cpu(), batch.pbc.reshape(3).cpu())))

    def moved(self, now: Snapshot) -> tuple[float, Tensor | None] | None:
        """Returns the largest displacement beyond a strain since this snapshot, and the strain.

        With the cell changed from ``h₀`` to ``h``, the strain is ``A = h₀⁻¹ h``; ``u_i = r_i − r⁰_i A``, less the mean.

        Returns:
            ``max|u|`` in Å and ``A (3, 3)``, which is None for the same cell; or None for another structure, or a
            change of the cell of a structure that is periodic along some axes only.
        """
        if len(self.positions) != len(now.positions) or not torch.equal(self.pbc, now.pbc):
            return None
        strain, expected = None, self.positions
        if bool(now.pbc.any()) and not torch.equal(self.cell, now.cell):
            if not bool(now.pbc.all()):
                return None
            strain = torch.linalg.solve(self.cell, now.cell)
            expected = self.positions @ strain
        moved = now.positions - expected
        return float((moved - moved.mean(dim=0)).square().sum(dim=1).max().sqrt()), strain


class _Cache(Generic[T]):
    """A value made for one structure that stays valid for others near it.

    Attributes:
        num_builds: how often it was made so far.
    """

    def __init__(self) -> None:
        self.num_builds = 0
        self._kept: tuple[T, Snapshot] | None = None

    def reset(self) -> None:
        """Forgets the value."""
        self._kept = None

    def _get(self, snapshot: Snapshot, holds: Callable[[float, Tensor | None], bool], make: Callable[[], T]) -> T:
        if self._kept is not None:
            moved = self._kept[1].moved(snapshot)
            # NaN compares false, so the value is made again, which raises an error that names the atom.
            if moved is not None and holds(*moved):
                return self._kept[0]
        self._kept = (make(), snapshot)
        self.num_builds += 1
        return self._kept[0]


class VerletList(_Cache[NeighborList]):
    """Pairs within ``cutoff + skin`` of one structure, reused while no pair within ``cutoff`` can be missing.

    With ``A`` and ``u`` of ``Snapshot.moved``, a pair at ``d`` was at ``d₀ = (d − (u_j − u_i)) A⁻¹``, so all pairs
    with ``|d| < cutoff`` are in the list when ``(cutoff + 2 max|u|) · ‖A⁻¹‖₂ ≤ cutoff + skin`` (Verlet's criterion for
    ``A = 1``). The bound is rigorous; reuse never changes a result.

    Args:
        cutoff: radius in Å up to which pairs are needed.
        skin: additional Å; 0 searches at every call.

    Attributes:
        num_builds: searches made so far.
    """

    def __init__(self, cutoff: float, skin: float) -> None:
        super().__init__()
        self.cutoff = cutoff
        self.skin = skin

    def get(self, batch: StructureBatch, snapshot: Snapshot | None = None) -> NeighborList | None:
        """Returns a list that is complete up to ``cutoff`` for a batch of one structure, None without a skin.

        Args:
            batch: of one structure.
            snapshot: of the batch, where it is at hand; it must not change afterwards.

        Raises:
            DataError: see ``escaip.graph.neighbor_list``.
        """
        if self.skin == 0.0:
            self.num_builds += 1
            return None
        return self._get(
            snapshot or Snapshot.of(batch), self._holds, lambda: neighbor_list(batch, self.cutoff + self.skin)
        )

    def _holds(self, farthest: float, strain: Tensor | None) -> bool:
        shrinkage = 1.0 if strain is None else _norm(torch.linalg.inv(strain))
        return (self.cutoff + 2.0 * farthest) * shrinkage * _ROUNDING <= self.cutoff + self.skin


class GraphCache(_Cache[Graph]):
    """The packed graph of one structure, reused while no distance has changed by more than ``skin``.

    With ``A`` and ``u`` of ``Snapshot.moved``, a pair at ``d₀`` is now at ``d = d₀ A + u_j − u_i``, so distances
    below ``reach`` have changed by at most ``reach · ‖A − 1‖₂ + 2 max|u|``; those beyond have not come closer.
    Tokens that have left meanwhile have zero weight, so reuse changes results by rounding only.

    Args:
        build: makes the graph of a batch from a neighbor list and a skin.
        reach: Å up to which neighbors matter.
        skin: Å.

    Attributes:
        num_builds: graphs made so far.
    """

    def __init__(
        self, build: Callable[[StructureBatch, NeighborList | None, float], Graph], reach: float, skin: float
    ) -> None:
        super().__init__()
        self.skin = skin
        self._build, self._reach = build, reach

    def get(self, batch: StructureBatch, snapshot: Snapshot, neighbors: Callable[[], NeighborList | None]) -> Graph:
        """Returns a graph that is complete for a batch of one structure.

        Args:
            batch: of one structure.
            snapshot: of the batch; it must not change afterwards.
            neighbors: returns a list that is complete up to ``reach``, None to search.

        Raises:
            DataError: see ``escaip.graph.build_graph``.
        """
        if self.skin == 0.0:
            self.num_builds += 1
            return self._build(batch, neighbors(), 0.0)
        return self._get(snapshot, self._holds, lambda: self._build(batch, neighbors(), self.skin))

    def _holds(self, farthest: float, strain: Tensor | None) -> bool:
        stretch = 0.0 if strain is None else _norm(strain - torch.eye(3, dtype=torch.float64))
        return (self._reach * stretch + 2.0 * farthest) * _ROUNDING <= self.skin


def _norm(matrix: Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix, ord=2))
