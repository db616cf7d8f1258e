"""Operators as kernels in C++ that compiled code calls without Python."""

from __future__ import annotations

import ctypes
import functools

import torch

from escaip.ops.native.build import compiled, library

_TRIED = (2, 13)  # torch from which on the interface that the kernels are written against was seen to work
# Of each source what the kernels call, in the order of `Kernels` of operators.cpp.
_CALLED = (
    ("spline", "escaip_spline_values"),
    ("spline", "escaip_spline_products"),
    ("orientation", "escaip_orientation_value"),
    ("orientation", "escaip_orientation_backward"),
    ("attention", "escaip_forward"),
    ("attention", "escaip_backward"),
)


@functools.cache
def register_operators() -> bool:
    """Puts C++ in the place of Python for what predictions call on the CPU: attention, splines, sums over rows, ...

    Results are the same. Compiles for some seconds where the user's cache does not have them.

    Returns:
        Whether they are used; not for an older torch, or where no compiler works.
    """
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    sources = [*{source for source, _ in _CALLED}, "operators"]
    if version < _TRIED or not all(compiled(scalar, source) for scalar in ("float", "double") for source in sources):
        return False
    tables = [_table(scalar) for scalar in ("float", "double")]
    return int(library("float", "operators").escaip_register(*map(ctypes.byref, tables))) == 0


def _table(scalar: str) -> ctypes.Array[ctypes.c_void_p]:
    addresses = [ctypes.cast(getattr(library(scalar, source), name), ctypes.c_void_p) for source, name in _CALLED]
    return (ctypes.c_void_p * len(_CALLED))(*addresses)
