"""Topology and geometry of a batch: neighbor search, soft k-nearest neighbors, tokens."""

from escaip.graph.geometry import compute_geometry, displacements, token_geometry
from escaip.graph.neighbors import neighbor_list
from escaip.graph.tokens import TokenChunks, attached_neighbors, build_graph, prune_graph, search_cutoff

__all__ = [
    "TokenChunks",
    "attached_neighbors",
    "build_graph",
    "compute_geometry",
    "displacements",
    "neighbor_list",
    "prune_graph",
    "search_cutoff",
    "token_geometry",
]
