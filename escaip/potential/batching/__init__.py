"""Many structures at once: packed by what they cost, in the order given, within memory."""

from __future__ import annotations

from escaip.potential.batching.cost import CPU_TOKENS, bytes_per_token, estimate_tokens, token_budget
from escaip.potential.batching.stream import StructurePrediction, is_out_of_memory, iter_predict, predict_pairs
from escaip.potential.batching.structures import join_structures

__all__ = [
    "CPU_TOKENS",
    "StructurePrediction",
    "bytes_per_token",
    "estimate_tokens",
    "is_out_of_memory",
    "iter_predict",
    "join_structures",
    "predict_pairs",
    "token_budget",
]
