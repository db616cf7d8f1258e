"""Fused GPU kernels of attention with two derivatives, in Triton (docs/concepts/attention.md).

``escaip.ops.triton.launch`` has the three functions of the backend and imports Triton; this module does not.
"""

from __future__ import annotations

import importlib

import torch

__all__ = ["availability"]


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
