"""A candidate neighbor list that is kept while atoms move, and rebuilt exactly when it must be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from escaip.graph import neighbor_list
from escaip.types import NeighborList


@dataclass(frozen=True)
class _Built:
    """A list and what it was built for."""

    neighbors: NeighborList
    positions: Tensor
    cell: Tensor
    pbc: Tensor


class SkinnedNeighbors:
    """Pairs within ``cutoff + skin`` of one structure, reused as long as no pair within ``cutoff`` can be missing.

    With the cell changed from ``h₀`` to ``h``, let ``A = h₀⁻¹ h`` and ``u_i = r_i − r⁰_i A`` the displacements
    beyond that strain, without their mean. A pair at ``d`` was at ``d₀ = (d − (u_j − u_i)) A⁻¹``, so all pairs with
    ``|d| < cutoff`` are in the list when ``(cutoff + 2 max|u|) · ‖A⁻¹‖₂ ≤ cutoff + skin`` (Verlet's criterion for
    ``A = 1``). The bound is rigorous; reuse never changes a result.

    Args:
        cutoff: radius in Å up to which pairs are needed.
        skin: additional Å; 0 searches at every call.

    Attributes:
        num_builds: searches made so far.
    """

    def __init__(self, cutoff: float, skin: float) -> None:
        self.cutoff = cutoff
        self.skin = skin
        self.num_builds = 0
        self._built: _Built | None = None

    def reset(self) -> None:
        """Forgets the list."""
        self._built = None

    def get(self, batch: Any) -> NeighborList:
        """Returns a list that is complete up to ``cutoff`` for a batch of one structure.

        Raises:
            DataError: see :func:`escaip.graph.neighbor_list`.
        """
        if self._built is None or not self._holds(self._built, batch):
            self._built = _Built(
                neighbor_list(batch, self.cutoff + self.skin),
                batch.positions.clone(), batch.cell.clone(), batch.pbc.clone(),
            )  # fmt: skip
            self.num_builds += 1
        return self._built.neighbors

    def _holds(self, built: _Built, batch: Any) -> bool:
        if self.skin == 0.0 or len(built.positions) != len(batch.positions) or not torch.equal(built.pbc, batch.pbc):
            return False
        expected, shrinkage = built.positions, 1.0
        if bool(batch.pbc.any()) and not torch.equal(built.cell, batch.cell):
            if not bool(batch.pbc.all()):
                return False
            deformation = torch.linalg.solve(built.cell[0], batch.cell[0])
            shrinkage = float(torch.linalg.matrix_norm(torch.linalg.inv(deformation), ord=2))
            expected = built.positions @ deformation
        moved = batch.positions - expected
        moved = moved - moved.mean(dim=0)
        farthest = float(moved.square().sum(dim=1).max().sqrt())
        # The last factor covers the rounding of the bound itself. NaN compares false: build, and say what is wrong.
        return (self.cutoff + 2.0 * farthest) * shrinkage * (1.0 + 1e-12) <= self.cutoff + self.skin
