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
)
from escaip.ops.padding import Padding


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
) -> Tensor:
    """See :func:`escaip.ops.neighborhood_attention`; differentiable once.

    Reads the longest neighborhood from the device.

    Raises:
        ConfigError: when differentiated a second time.
    """
    q, k, v, log_envelope, direction = first_derivative_only("sdpa", q, k, v, log_envelope, direction)
    queries, keys = plain_operands(q, k, log_envelope, direction, angular_channels, scale, self_queries_only)
    width, head_size = keys.shape[-1], v.shape[-1]
    equal_widths = angular_channels is None and not self_queries_only
    values = pad_channels(v, width if equal_widths else head_size + -head_size % CHANNEL_MULTIPLE)
    padding = Padding.of(offsets, k.shape[0])
    unseen = padding_key(width, logit_channels(q.shape[-1], angular_channels, self_queries_only), k.dtype, k.device)
    keys, values = padding.pad(keys, unseen).transpose(1, 2), padding.pad(values).transpose(1, 2)
    queries = queries.unsqueeze(2) if self_queries_only else padding.pad(queries).transpose(1, 2)
    attended = torch.nn.functional.scaled_dot_product_attention(queries, keys, values, scale=scale)
    attended = attended[..., :head_size]
    if self_queries_only:
        return attended.squeeze(2)
    return padding.unpad(attended.transpose(1, 2))
