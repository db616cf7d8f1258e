"""Neighborhood attention by ``torch.nn.functional.scaled_dot_product_attention``: one derivative.

Neighborhoods are padded to the longest, angles and key bias are further channels (:mod:`escaip.ops.expanded`), and
padding is keys of a bias that leaves them without influence, so that there is no mask: a mask shuts out the flash
kernels, must have the dtype of the queries in the memory-efficient kernel, and its gradient would be the size of all
logits. Which kernel runs is PyTorch's choice:

* With angles queries and keys are wider than values (64 channels become 320). On CUDA the memory-efficient kernel takes
  that, in float32, bfloat16 and float16; flash kernels want equal widths of at most 256, cuDNN 128 or 256.
* Without angles the values are padded to the width of the keys, and flash kernels serve too, on the CPU as well.
* Otherwise (float64 on CUDA, angles on the CPU) it is PyTorch's own composition, which holds all logits.

The fused kernels have no second derivative, the composition has; so that nothing hangs on device and dtype, a second
derivative is always refused. Nested (jagged) tensors are no way around padding in PyTorch 2.13: with gradients they
are kept from the memory-efficient kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from escaip.ops.expanded import (
    CHANNEL_MULTIPLE,
    first_derivative_only,
    logit_channels,
    pad_channels,
    padding_key,
    plain_operands,
    refuse_dropout,
)


def availability() -> str | None:
    """Why it is not usable here; None: it always is."""
    return None


def sdpa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_envelope: Tensor,
    direction: Tensor,
    offsets: Tensor,
    angular_channels: tuple[int, ...] | None,
    scale: float,
    self_queries_only: bool = False,
    dropout: float = 0.0,
) -> Tensor:
    """See :func:`escaip.ops.neighborhood_attention`; differentiable once.

    Reads the longest neighborhood from the device.

    Raises:
        ConfigError: attention weights are to be dropped; or when differentiated a second time.
    """
    refuse_dropout("sdpa", dropout)
    q, k, v, log_envelope, direction = first_derivative_only("sdpa", q, k, v, log_envelope, direction)
    queries, keys = plain_operands(q, k, log_envelope, direction, angular_channels, scale, self_queries_only)
    width, head_size = keys.shape[-1], v.shape[-1]
    equal_widths = angular_channels is None and not self_queries_only
    values = pad_channels(v, width if equal_widths else head_size + -head_size % CHANNEL_MULTIPLE)
    sizes = offsets.diff()
    longest = int(sizes.max())
    slot = _slots(offsets, sizes, longest, k.shape[0])
    places = (sizes.numel(), longest)
    unseen = padding_key(width, logit_channels(q.shape[-1], angular_channels, self_queries_only), k.dtype, k.device)
    keys = _pad(keys, slot, places, unseen)
    values = _pad(values, slot, places, values.new_zeros(values.shape[-1]))
    queries = queries.unsqueeze(2) if self_queries_only else _pad(queries, slot, places, queries.new_zeros(width))
    attended = torch.nn.functional.scaled_dot_product_attention(queries, keys, values, scale=scale)
    attended = attended[..., :head_size]
    if self_queries_only:
        return attended.squeeze(2)
    return attended.transpose(1, 2).flatten(0, 1).index_select(0, slot)


def _slots(offsets: Tensor, sizes: Tensor, longest: int, num_tokens: int) -> Tensor:
    """``(T,)`` places of the tokens among ``N * longest``."""
    shift = torch.arange(sizes.numel(), device=offsets.device) * longest - offsets[:-1]
    tokens = torch.arange(num_tokens, device=offsets.device)
    return tokens + torch.repeat_interleave(shift, sizes, output_size=num_tokens)


def _pad(tokens: Tensor, slot: Tensor, places: tuple[int, int], padding: Tensor) -> Tensor:
    """``(T, h, D)`` to ``(N, h, M, D)``, ``padding`` ``(D,)`` where there is no token."""
    count = places[0] * places[1]
    if count > tokens.shape[0]:
        tokens = padding.expand(count, tokens.shape[1], -1).index_copy(0, slot, tokens)
    return tokens.unflatten(0, places).transpose(1, 2)
