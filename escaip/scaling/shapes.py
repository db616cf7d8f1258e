"""The sizes of graphs on which the cost of a model depends."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from escaip.errors import DataError, UsageError
from escaip.graph import build_graph
from escaip.types import Graph, GraphSettings


@dataclass(frozen=True)
class GraphShape:
    """The sizes of a batch on which its cost depends; means need not be whole.

    Attributes:
        num_atoms: ``N``.
        num_tokens: ``T``, kept directed edges and ``N`` self tokens.
        num_pairs: ``P = Σ_i T_i²`` over the ``T_i`` tokens of each atom.
    """

    num_atoms: float
    num_tokens: float
    num_pairs: float

    @classmethod
    def of_graph(cls, graph: Graph) -> GraphShape:
        """Of a graph without slack."""
        return cls(graph.num_atoms, graph.num_tokens, int(graph.offsets.diff().square().sum()))

    @classmethod
    def of_batch(cls, batch: Any, settings: GraphSettings) -> GraphShape:
        """Of the graph that a model with these settings builds of a batch."""
        return cls.of_graph(build_graph(batch, settings))

    @classmethod
    def of_counts(cls, num_atoms: float, num_edges: float) -> GraphShape:
        """Of atoms and kept directed edges alone, as if all atoms had equally many: pairs are underestimated.

        Raises:
            UsageError: no atoms, or a negative number of edges.
        """
        if not (num_atoms > 0 and num_edges >= 0):
            raise UsageError(
                f"{num_atoms:g} atoms with {num_edges:g} edges: give at least one atom and no fewer than 0"
            )
        tokens = num_atoms + num_edges
        return cls(num_atoms, tokens, tokens**2 / num_atoms)

    def times(self, factor: float) -> GraphShape:
        """Of so many such batches."""
        return GraphShape(*(factor * size for size in dataclasses.astuple(self)))


def mean_shape(structures: Iterable[Any], settings: GraphSettings) -> GraphShape:
    """Mean sizes of a sample of structures (:class:`escaip.data.AtomicData`), one graph at a time.

    Raises:
        DataError: no structure.
    """
    from escaip.data import collate

    sums, count = (0.0, 0.0, 0.0), 0
    for structure in structures:
        shape = GraphShape.of_batch(collate([structure]), settings)
        sums, count = (sums[0] + shape.num_atoms, sums[1] + shape.num_tokens, sums[2] + shape.num_pairs), count + 1
    if count == 0:
        raise DataError("the sample has no structure: give at least one to count edges in")
    return GraphShape(*sums).times(1.0 / count)
