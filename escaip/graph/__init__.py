"""Topology and geometry of a batch: neighbor search, soft k-nearest neighbors, tokens, invariant features."""

from escaip.graph.build import attached_neighbors, build_graph
from escaip.graph.features import bond_orientational_order
from escaip.graph.geometry import compute_geometry, displacements, token_geometry
from escaip.graph.neighbors import neighbor_list
from escaip.graph.settings import search_cutoff
from escaip.graph.tight import tight_graph
from escaip.graph.tokens import TokenChunks, split_tokens

__all__ = [
    "TokenChunks",
    "attached_neighbors",
    "bond_orientational_order",
    "build_graph",
    "compute_geometry",
    "displacements",
    "neighbor_list",
    "search_cutoff",
    "split_tokens",
    "tight_graph",
    "token_geometry",
]
