"""Neighborhood attention and node attention, each behind one function (docs/attention.md); rows by index."""

from escaip.ops.backends import BackendInfo, available_backends
from escaip.ops.dispatch import neighborhood_attention, node_attention
from escaip.ops.rows import sum_rows, take_rows

__all__ = [
    "BackendInfo",
    "available_backends",
    "neighborhood_attention",
    "node_attention",
    "sum_rows",
    "take_rows",
]
