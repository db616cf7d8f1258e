"""Neighborhood attention and node attention, each behind one function (docs/attention.md)."""

from escaip.ops.backends import BackendInfo, available_backends
from escaip.ops.dispatch import neighborhood_attention, node_attention

__all__ = ["BackendInfo", "available_backends", "neighborhood_attention", "node_attention"]
