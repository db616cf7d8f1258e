"""The libraries agree on every kind of system; the optional one is tested where it is installed."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch
from graph_reference import KINDS, make_batch, random_system

from escaip.graph.neighbors import Systems, search_nvalchemiops, search_pairs, search_vesin

INSTALLED = importlib.util.find_spec("nvalchemiops") is not None


def canonical(first: torch.Tensor, second: torch.Tensor, shift: torch.Tensor) -> set[tuple[int, ...]]:
    """Each pair as the smaller of its two directions; every pair must be there once."""
    rows = torch.cat([first[:, None], second[:, None], shift.to(torch.int64)], dim=1).tolist()
    pairs = {min((i, j, *s), (j, i, *(-x for x in s))) for i, j, *s in rows}
    assert len(pairs) == len(rows)
    return pairs


def arrays(*systems: tuple[np.ndarray, np.ndarray, np.ndarray]) -> tuple[torch.Tensor, ...]:
    s = Systems.read(make_batch(*systems))
    return s.positions, s.cell, s.pbc, s.index, s.ptr


@pytest.mark.skipif(not INSTALLED, reason="nvalchemiops is not installed")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_nvalchemiops_agrees_with_vesin(kind: str) -> None:
    rng = np.random.default_rng(KINDS.index(kind))
    for _ in range(10):
        batch = arrays(*(random_system(rng, kind, 4.0) for _ in range(3)))
        assert canonical(*search_nvalchemiops(*batch, 4.0)) == canonical(*search_vesin(*batch, 4.0))


def test_pairs_come_once_with_their_types() -> None:
    rng = np.random.default_rng(0)
    batch = arrays(*(random_system(rng, kind, 4.0) for kind in KINDS))
    first, second, shift = search_pairs(*batch, 4.0)
    assert len(canonical(first, second, shift)) > 100
    assert first.dtype == second.dtype == torch.int64
    assert shift.dtype == torch.int32
    assert torch.equal(batch[3][first], batch[3][second])


def test_two_atoms_whose_distance_ends_vesin() -> None:
    """Its cell list divides by zero there, so it is not asked about open structures of few atoms."""
    positions = np.array(
        [[2107.2154, -1318.7537, -1903.4989], [-3858.7256, -2016.9292, -1906.8478], [2107.0, -1317.0, -1904.0]]
    )
    batch = arrays((positions, np.zeros((3, 3)), np.zeros(3, bool)))
    assert canonical(*search_vesin(*batch, 3.5)) == {(0, 2, 0, 0, 0)}
