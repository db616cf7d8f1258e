"""Fused GPU kernels of attention with two derivatives, in Triton (docs/concepts/attention.md).

``forward``, ``backward`` and ``double_backward`` import Triton when first asked for.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch

__all__ = ["availability", "backward", "double_backward", "forward"]


def availability() -> str | None:
    """Why the kernels are not usable here and what would help, in one line; None where they are."""
    try:
        triton = importlib.import_module("triton")
    except ImportError:
        return "needs Triton: pip install 'escaip[cuda]'"
    if not hasattr(triton, "constexpr_function"):
        return f"needs Triton 3.5 or newer, which PyTorch 2.9 brings, not {triton.__version__}"
    if torch.cuda.is_available() or triton.knobs.runtime.interpret:
        return None
    return "needs a CUDA device, and none is usable here"


def __getattr__(name: str) -> Any:
    if name in ("backward", "double_backward", "forward"):
        return getattr(importlib.import_module("escaip.ops.triton.launch"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
