"""Topology that is kept while atoms move, and made again exactly when it must be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from escaip.graph import neighbor_list
from escaip.types import Graph, NeighborList

T = TypeVar("T")
# Covers the rounding of the bounds themselves.
_ROUNDING = 1.0 + 1e-12


@dataclass(frozen=True)
class Place:
    """Where the atoms of one structure are, on the host: to decide there without waiting for a device.

    Attributes:
        positions: ``(N, 3)`` float64, Å.
        cell: ``(3, 3)`` float64, Å, rows are lattice vectors.
        pbc: ``(3,)`` bool.
    """

    positions: Tensor
    cell: Tensor
    pbc: Tensor

    @classmethod
    def of(cls, batch: Any) -> Place:
        """A copy of that of a batch of one structure."""
        return cls(*(x.clone() for x in (batch.positions.cpu(), batch.cell[0].cpu(), batch.pbc.reshape(3).cpu())))

    def moved(self, now: Place) -> tuple[float, Tensor | None] | None:
        """What has happened since: the largest displacement beyond a strain, and the strain.

        With the cell changed from ``h₀`` to ``h``, the strain is ``A = h₀⁻¹ h``; ``u_i = r_i − r⁰_i A``, less the mean.

        Returns:
            ``max|u|`` in Å and ``A (3, 3)``, None for that of the same cell; or None where there is no telling, for
            another structure for example.
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


class _Kept(Generic[T]):
    """Something made for a structure that holds for others near it.

    Attributes:
        num_builds: how often it was made so far.
    """

    def __init__(self) -> None:
        self.num_builds = 0
        self._kept: tuple[T, Place] | None = None

    def reset(self) -> None:
        """Forgets it."""
        self._kept = None

    def _get(self, place: Place, holds: Callable[[float, Tensor | None], bool], make: Callable[[], T]) -> T:
        if self._kept is not None:
            moved = self._kept[1].moved(place)
            # NaN compares false: it is made again, and says what is wrong.
            if moved is not None and holds(*moved):
                return self._kept[0]
        self._kept = (make(), place)
        self.num_builds += 1
        return self._kept[0]


class SkinnedNeighbors(_Kept[NeighborList]):
    """Pairs within ``cutoff + skin`` of one structure, reused as long as no pair within ``cutoff`` can be missing.

    With ``A`` and ``u`` of :meth:`Place.moved`, a pair at ``d`` was at ``d₀ = (d − (u_j − u_i)) A⁻¹``, so all pairs
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

    def get(self, batch: Any, place: Place | None = None) -> NeighborList | None:
        """Returns a list that is complete up to ``cutoff`` for a batch of one structure.

        None without a skin, where nothing is kept: whoever builds a graph then searches on the way.

        Args:
            batch: of one structure.
            place: its own, where it is at hand; it must not change afterwards.

        Raises:
            DataError: see :func:`escaip.graph.neighbor_list`.
        """
        if self.skin == 0.0:
            self.num_builds += 1
            return None
        return self._get(place or Place.of(batch), self._holds, lambda: neighbor_list(batch, self.cutoff + self.skin))

    def _holds(self, farthest: float, strain: Tensor | None) -> bool:
        shrinkage = 1.0 if strain is None else _norm(torch.linalg.inv(strain))
        return (self.cutoff + 2.0 * farthest) * shrinkage * _ROUNDING <= self.cutoff + self.skin


class SkinnedGraph(_Kept[Graph]):
    """The packed graph of one structure, reused as long as no distance has changed by more than ``skin``.

    With ``A`` and ``u`` of :meth:`Place.moved`, a pair at ``d₀`` is now at ``d = d₀ A + u_j − u_i``, so distances below
    ``reach`` have changed by at most ``reach · ‖A − 1‖₂ + 2 max|u|``, and those beyond have not come closer than that.
    Tokens that have left meanwhile count for nothing: reuse changes results by rounding alone.

    Args:
        build: makes the graph with so much slack.
        reach: Å up to which it looks.
        skin: Å.

    Attributes:
        num_builds: graphs made so far.
    """

    def __init__(self, build: Callable[[Any, NeighborList | None, float], Graph], reach: float, skin: float) -> None:
        super().__init__()
        self.skin = skin
        self._build, self._reach = build, reach

    def get(self, batch: Any, place: Place, neighbors: Callable[[], NeighborList | None]) -> Graph:
        """Returns a graph that is complete for a batch of one structure.

        Args:
            batch: of one structure.
            place: its own; it must not change afterwards.
            neighbors: complete up to ``reach``; None to search for them.

        Raises:
            DataError: see :func:`escaip.graph.build_graph`.
        """
        if self.skin == 0.0:  # nothing to keep
            self.num_builds += 1
            return self._build(batch, neighbors(), 0.0)
        return self._get(place, self._holds, lambda: self._build(batch, neighbors(), self.skin))

    def _holds(self, farthest: float, strain: Tensor | None) -> bool:
        stretch = 0.0 if strain is None else _norm(strain - torch.eye(3, dtype=torch.float64))
        return (self._reach * stretch + 2.0 * farthest) * _ROUNDING <= self.skin


def _norm(matrix: Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix, ord=2))
