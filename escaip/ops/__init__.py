"""Operators on packed tokens: attention within neighborhoods and among all atoms (docs/concepts), rows by index,
splines, bond-orientational order.
"""

from escaip.ops.attention import neighborhood_attention, node_attention
from escaip.ops.backends import BackendInfo, available_backends
from escaip.ops.harmonics import bond_orientational_order
from escaip.ops.rows import sum_rows, take_rows

__all__ = [
    "BackendInfo",
    "available_backends",
    "bond_orientational_order",
    "neighborhood_attention",
    "node_attention",
    "sum_rows",
    "take_rows",
]
