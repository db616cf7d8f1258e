"""Packed tokens to padded matrices and back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Padding:
    """Where the tokens of ``N`` neighborhoods go when each is padded to the longest, ``M``.

    Attributes:
        slot: ``(T,)`` int64, place of each token among ``N * M``.
        shape: ``(N, M)``.
    """

    slot: Tensor
    shape: tuple[int, int]

    @classmethod
    def of(cls, offsets: Tensor, num_tokens: int) -> Padding:
        """Of neighborhoods ``offsets[i] : offsets[i + 1]``; reads the longest from the device."""
        sizes = offsets.diff()
        longest = int(sizes.max())
        shift = torch.arange(sizes.numel(), device=offsets.device) * longest - offsets[:-1]
        tokens = torch.arange(num_tokens, device=offsets.device)
        slot = tokens + torch.repeat_interleave(shift, sizes, output_size=num_tokens)
        return cls(slot, (sizes.numel(), longest))

    def pad(self, tokens: Tensor, fill: float | Tensor = 0.0) -> Tensor:
        """``(T, ...)`` to ``(N, M, ...)``, with ``fill``, broadcast over a token, where there is none."""
        count = self.shape[0] * self.shape[1]
        if count > tokens.shape[0]:
            fill = torch.as_tensor(fill, dtype=tokens.dtype, device=tokens.device)
            tokens = fill.expand(count, *tokens.shape[1:]).index_copy(0, self.slot, tokens)
        return tokens.unflatten(0, self.shape)

    def unpad(self, padded: Tensor) -> Tensor:
        """``(N, M, ...)`` to ``(T, ...)``."""
        return padded.flatten(0, 1).index_select(0, self.slot)
