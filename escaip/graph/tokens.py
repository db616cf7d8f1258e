"""The tokens of a batch in chunks of whole neighborhoods, and how a function is applied to them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch.utils.checkpoint import checkpoint

from escaip.types import Geometry, TokenLayout, Tokens

T = TypeVar("T")


class TokenChunks:
    """All tokens of a batch, in chunks that a model processes one after the other.

    A model states what happens to tokens; the chunks decide how many are processed at once, in which precision, and
    what is kept for the derivative. Results do not depend on any of that beyond rounding.

    Args:
        layout: of all tokens.
        geometry: of the same tokens.
        max_tokens: of a chunk, unless one neighborhood alone has more; None for a single chunk.
        recompute: share of the calls of which only the inputs are kept; the calls are repeated when the derivative is
            taken (activation checkpointing, arXiv 1604.06174).
        rounded: half precision for products within the calls (autocast); None for that of the inputs.

    Attributes:
        layout: as given.
        chunks: in order; together they are all atoms and all tokens.
    """

    def __init__(
        self,
        layout: TokenLayout,
        geometry: Geometry,
        max_tokens: int | None = None,
        recompute: float = 0.0,
        rounded: torch.dtype | None = None,
    ) -> None:
        self.layout = layout
        self.chunks = split_tokens(layout, geometry, max_tokens)
        self._recompute, self._rounded, self._due = recompute, rounded, 0.0

    def map(self, function: Callable[..., T], *values: Sequence[Any]) -> list[T]:
        """Applies a function to each chunk.

        Args:
            function: takes the :class:`~escaip.types.Tokens` of a chunk, then what each of ``values`` holds for it. It
                may be called again later, so variables that it closes over must not be assigned anew.
            values: one entry for each chunk, as another call of this method returns them.

        Returns:
            The results, one for each chunk.
        """
        return [self._call(function, *arguments) for arguments in zip(self.chunks, *values, strict=True)]

    def _call(self, function: Callable[..., T], *arguments: Any) -> T:
        device = self.layout.offsets.device.type
        with contextlib.nullcontext() if self._rounded is None else torch.autocast(device, self._rounded):
            self._due += self._recompute
            if self._due < 1.0:
                return function(*arguments)
            self._due -= 1.0
            return checkpoint(function, *arguments, use_reentrant=False)


def split_tokens(layout: TokenLayout, geometry: Geometry, max_tokens: int | None = None) -> list[Tokens]:
    """Divides the tokens into chunks of whole neighborhoods; see :class:`TokenChunks`."""
    center, neighbor = layout.token_center, layout.token_neighbor
    if max_tokens is None or layout.num_tokens <= max_tokens:
        whole = (layout.offsets, layout.self_token, center, neighbor)
        return [Tokens(0, *whole, geometry.distance, geometry.direction, geometry.log_envelope)]
    ends = _cuts(layout.offsets.tolist(), max_tokens)
    starts = [0, *ends[:-1]]
    bounds = layout.offsets[[0, *ends]]
    # The derivative of a split is one concatenation; that of a slice would be as large as the whole.
    rows = [
        x.split(bounds.diff().tolist())
        for x in (center, neighbor, geometry.distance, geometry.direction, geometry.log_envelope)
    ]
    places = [
        (first, layout.offsets[first : end + 1] - offset, layout.self_token[first:end] - offset)
        for first, end, offset in zip(starts, ends, bounds, strict=False)
    ]
    return [Tokens(*place, *chunk) for place, *chunk in zip(places, *rows, strict=True)]


def _cuts(offsets: list[int], max_tokens: int) -> list[int]:
    """Returns the ends of runs of neighborhoods with at most ``max_tokens`` tokens, or one neighborhood, each."""
    ends, start = [], 0
    for atom in range(1, len(offsets)):
        if offsets[atom] - start > max_tokens and offsets[atom - 1] > start:
            ends.append(atom - 1)
            start = offsets[atom - 1]
    return [*ends, len(offsets) - 1]
