"""Operators as kernels in C++ that compiled code calls without Python."""

from __future__ import annotations

import ctypes
import functools

import torch

from escaip.ops.native.build import compiled, is_kept, library

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
_ITSELF = ("float", "operators")


@functools.cache
def register_operators(scalar: str, compiling: bool = True) -> bool:
    """Puts C++ in the place of Python for what predictions call on the CPU: attention, splines, sums over rows, ...

    Results are the same.

    Args:
        scalar: ``"float"`` or ``"double"``: what is computed in.
        compiling: compile what the user's cache does not have; otherwise everything stays as it is then.

    Returns:
        Whether they are used; not for an older torch, or where no compiler works.
    """
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    needed = [_ITSELF, *((scalar, source) for source in sorted({source for source, _ in _CALLED}))]
    if version < _TRIED or not (compiling or all(is_kept(*one) for one in needed)):
        return False
    if not all(compiled(*one) for one in needed) or not _registered():
        return False
    addresses = [ctypes.cast(getattr(library(scalar, source), name), ctypes.c_void_p) for source, name in _CALLED]
    table = (ctypes.c_void_p * len(_CALLED))(*addresses)
    getattr(library(*_ITSELF), f"escaip_serve_{scalar}")(ctypes.byref(table))
    return True


@functools.cache
def _registered() -> bool:
    return int(library(*_ITSELF).escaip_register()) == 0
