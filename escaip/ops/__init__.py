"""Neighborhood attention behind one function (docs/attention.md)."""

from escaip.ops.dispatch import BackendInfo, available_backends, neighborhood_attention

__all__ = ["BackendInfo", "available_backends", "neighborhood_attention"]
