"""Where the atoms of a batch are, and whether that can be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from escaip.errors import DataError

# Squared sine of the flattest allowed angle between the periodic axes.
_MIN_RELATIVE_GRAM = 1e-12
_MAX_IMAGES = 10_000_000


@dataclass(frozen=True)
class Systems:
    """Where the atoms of a batch are; ``N`` atoms, ``B`` systems.

    Attributes:
        positions: ``(N, 3)`` float64, Å.
        cell: ``(B, 3, 3)`` float64, Å, rows are lattice vectors.
        pbc: ``(B, 3)`` bool.
        index: ``(N,)`` int64, system of each atom.
        ptr: ``(B + 1,)`` int64, first atom of each system.
    """

    positions: Tensor
    cell: Tensor
    pbc: Tensor
    index: Tensor
    ptr: Tensor

    @classmethod
    def read(cls, batch: Any) -> Systems:
        """Reads ``positions, cell, pbc, batch, ptr`` unchecked; a structure without ``batch`` is one system."""
        positions = batch.positions.detach().to(torch.float64)
        cell = batch.cell.detach().to(torch.float64).reshape(-1, 3, 3)
        pbc = batch.pbc.reshape(-1, 3)
        index, ptr = getattr(batch, "batch", None), getattr(batch, "ptr", None)
        if index is None or ptr is None:
            index = positions.new_zeros(len(positions), dtype=torch.int64)
            ptr = index.new_tensor([0, len(positions)])
        return cls(positions, cell, pbc, index, ptr)

    def check(self) -> None:
        """Refuses what has no neighbors.

        Raises:
            DataError: a NaN or infinite position, or a cell without volume along its periodic axes.
        """
        if not bool(torch.isfinite(self.positions).all()):
            atom = int((~torch.isfinite(self.positions).all(dim=1)).nonzero()[0])
            raise DataError(
                f"system {int(self.index[atom])}, atom {atom - int(self.ptr[self.index[atom]])}: position is NaN or "
                "infinite: remove the structure or repair its coordinates"
            )
        if not bool(self.pbc.any()):
            return
        gram = self._gram()
        size = gram.diagonal(dim1=1, dim2=2).prod(dim=1)
        flat = ~(torch.linalg.det(gram) > _MIN_RELATIVE_GRAM * size)
        if bool(flat.any()):
            raise DataError(
                f"system {int(flat.nonzero()[0])}: its cell has no volume along its periodic axes: set pbc to False "
                "where the cell does not repeat, or give the full cell"
            )

    def _gram(self) -> Tensor:
        """``(B, 3, 3)`` Å²: Gram matrix of the periodic axes, completed by unit axes normal to them."""
        periodic = self.pbc.to(torch.float64)
        rows = self.cell * periodic[:, :, None]
        return rows @ rows.transpose(1, 2) + torch.diag_embed(1.0 - periodic)

    def check_images(self, cutoff: float) -> None:
        """Refuses cells so thin that a search up to ``cutoff`` Å cannot end.

        Raises:
            DataError: more than ten million images of the cell within reach.
        """
        if not bool(self.pbc.any()):
            return
        inverse_height = torch.linalg.inv(self._gram()).diagonal(dim1=1, dim2=2).clamp(min=0.0).sqrt()
        images = (1.0 + 2.0 * cutoff * inverse_height * self.pbc).prod(dim=1)
        if bool((images > _MAX_IMAGES).any()):
            system = int((images > _MAX_IMAGES).nonzero()[0])
            raise DataError(
                f"system {system}: its cell is so thin that {images[system]:.0e} images lie within {cutoff:g} Å: "
                "check the units of the cell"
            )
