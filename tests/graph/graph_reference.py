"""Independent dense reference of the graph (numpy, float64, every image, every pair) and systems of every kind."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import torch

from escaip.types import GraphSettings

Edge = tuple[int, int, int, int, int]


def make_batch(*systems: tuple[np.ndarray, np.ndarray, np.ndarray]) -> SimpleNamespace:
    """What a PyG batch of (positions, cell, pbc) offers to the graph."""
    sizes = torch.tensor([len(positions) for positions, _, _ in systems])
    return SimpleNamespace(
        positions=torch.tensor(np.concatenate([s[0] for s in systems])),
        cell=torch.tensor(np.stack([s[1] for s in systems])),
        pbc=torch.tensor(np.stack([s[2] for s in systems])),
        batch=torch.repeat_interleave(torch.arange(len(systems)), sizes),
        ptr=torch.cat([sizes.new_zeros(1), sizes.cumsum(0)]),
    )


def random_system(rng: np.random.Generator, kind: str, cutoff: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A small system of one kind; densities keep the dense reference affordable."""
    pbc, cell = np.ones(3, bool), np.diag(rng.uniform(0.8, 1.8, 3) * cutoff)
    if kind == "mixed_pbc":
        pbc = rng.permutation([True, rng.random() < 0.5, False])
        if rng.random() < 0.5:
            cell[~pbc] = 0.0
    elif kind in ("skewed", "skewed_mixed"):
        cell = cell + np.tril(rng.uniform(-1.5, 1.5, (3, 3)) * cutoff, -1)
        cell = cell[rng.permutation(3)] @ random_rotation(rng)
        if kind == "skewed_mixed":
            pbc = rng.permutation([True, rng.random() < 0.5, False])
    elif kind == "tiny":
        while True:
            cell = rng.normal(size=(3, 3))
            cell *= (rng.uniform(8.0, 30.0) / abs(np.linalg.det(cell))) ** (1 / 3)
            if abs(np.linalg.det(cell)) > 0.2 * np.prod(np.linalg.norm(cell, axis=1)):
                break
    elif kind == "crystal":
        cubic = np.array([[0, 1, 1], [1, 0, 1], [1, 1, 0]]) / 2 if rng.random() < 0.5 else np.eye(3)
        cell = 3.0 * cubic
        repeat = tuple(int(x) for x in rng.integers(1, 3, 3))
        positions = np.array(list(itertools.product(*map(range, repeat)))) @ cell
        return positions, cell * np.array(repeat)[:, None], pbc
    elif kind == "molecule":
        pbc = np.zeros(3, bool)
        cell = np.zeros((3, 3)) if rng.random() < 0.5 else np.eye(3) * 2.0
        return rng.normal(size=(int(rng.integers(2, 14)), 3)) * cutoff / 2, cell, pbc
    elif kind == "isolated":
        pbc, cell = np.zeros(3, bool), np.zeros((3, 3))
        return rng.normal(size=(int(rng.integers(1, 4)), 3)) * 1000 * cutoff, cell, pbc
    elif kind == "single":
        pbc = rng.random(3) < 0.5
        return rng.normal(size=(1, 3)), cell * rng.choice([0.4, 1.0, 5.0]), pbc
    box = np.where(np.linalg.norm(cell, axis=1, keepdims=True) == 0, np.eye(3) * cutoff, cell)
    volume = abs(np.linalg.det(box)) / cutoff**3
    count = int(rng.integers(1, 4)) if kind == "tiny" else int(np.clip(volume * rng.uniform(3, 10), 2, 16))
    positions = rng.random((count, 3)) @ box
    if kind in ("unwrapped", "skewed_mixed"):
        positions = positions + rng.integers(-2, 3, (count, 3)) @ (box * pbc[:, None])
        positions = positions + rng.uniform(-100, 100, 3)
    return positions, cell, pbc


KINDS = (
    "cubic", "mixed_pbc", "skewed", "skewed_mixed", "tiny", "crystal", "molecule", "isolated", "single", "unwrapped",
)  # fmt: skip


def random_rotation(rng: np.random.Generator) -> np.ndarray:
    """A proper rotation matrix."""
    q, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    return q * np.linalg.det(q)


def all_edges(positions: np.ndarray, cell: np.ndarray, pbc: np.ndarray, cutoff: float) -> dict[Edge, float]:
    """Every (i, j, S) closer than the cutoff with its distance, from all images that could reach."""
    axes = [range(1)] * 3
    if pbc.any():
        reciprocal = np.linalg.pinv(cell[pbc])  # (3, periodic axes)
        fractional = positions @ reciprocal
        reach = np.ptp(fractional, axis=0) + cutoff * np.linalg.norm(reciprocal, axis=0)
        for axis, extent in zip(np.flatnonzero(pbc), reach, strict=True):
            axes[axis] = range(-int(extent) - 1, int(extent) + 2)
    images = np.array(list(itertools.product(*axes)))
    edges: dict[Edge, float] = {}
    for i in range(len(positions)):
        distance = np.linalg.norm(positions[None] + (images @ cell)[:, None] - positions[i], axis=2)  # (images, n)
        for image, j in zip(*np.nonzero(distance < cutoff), strict=True):
            shift = tuple(int(x) for x in images[image])
            if (int(j), *shift) != (i, 0, 0, 0):
                edges[(i, int(j), *shift)] = float(distance[image, j])
    return edges


def step(x: np.ndarray, name: str) -> np.ndarray:
    """The step of the ranks, as written in the papers."""
    if name == "sine":
        return np.where(x <= -np.pi, 0.0, np.where(x >= np.pi, 1.0, 0.5 + 0.5 * np.sin(x / 2)))
    y = np.clip(x / 4, -1 + 1e-6, 1 - 1e-6)
    with np.errstate(under="ignore"):
        a, b = np.exp(-2 / (y + 1)), np.exp(-2 / (1 - y))
    return a / (a + b)


def envelope_coordinates(
    positions: np.ndarray, cell: np.ndarray, pbc: np.ndarray, settings: GraphSettings
) -> tuple[dict[Edge, float], set[Edge]]:
    """``x`` of every ranked edge inside the cutoff, with ranks over all candidates up to far beyond the support.

    With truncated ranks beside them the edges that are tied where a list is cut: any of them may be ranked.
    """
    if settings.num_neighbors is None:
        return {e: d / settings.cutoff for e, d in all_edges(positions, cell, pbc, settings.cutoff).items()}, set()
    edges = all_edges(positions, cell, pbc, settings.cutoff + 4.5 * settings.rank_scale)
    limit = None if settings.rank_truncation is None else settings.num_neighbors + settings.rank_truncation
    rank: dict[Edge, float] = {}
    tied: set[Edge] = set()
    for i in range(len(positions)):
        own = sorted((e for e in edges if e[0] == i), key=lambda e: edges[e])
        distance = np.array([0.0, *(edges[e] for e in own)])
        if limit is not None and len(distance) > limit and distance[limit] - distance[limit - 1] < 1e-9:
            tied |= {e for e in own if abs(edges[e] - distance[limit]) < 1e-9}
        kept = distance[:limit]
        gap = kept[1:, None] - kept[None]
        if settings.soft:
            values = step(gap / settings.rank_scale, settings.rank_step)
        else:
            values = np.where(np.abs(gap) <= 1e-9 * kept[1:, None], 0.5, (gap > 0) * 1.0)
        rank.update(zip(own, values.sum(1), strict=limit is None))
    scale, k = settings.envelope_scale, settings.num_neighbors
    result = {}
    for here, d in edges.items():
        back = reversed_edge(here)
        if d < settings.cutoff and here in rank and back in rank:
            terms = np.array([rank[here] / k, rank[back] / k, d / settings.cutoff]) / scale
            result[here] = scale * np.logaddexp.reduce(terms)
    return result, tied | {reversed_edge(edge) for edge in tied}


def reversed_edge(edge: Edge) -> Edge:
    i, j, *shift = edge
    return (j, i, *(-x for x in shift))
