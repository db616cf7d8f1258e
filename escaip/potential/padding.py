"""Padding of an evaluation's inputs to given sizes by rows that no result depends on, for compilers and CUDA graphs."""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass

import torch
from torch import Tensor

from escaip.models import ModelConfig
from escaip.potential.derivatives import ATOMS, LAYOUT, EvaluationInputs
from escaip.types import AtomInputs, ModelOutput, TokenLayout

_LEAST = 2  # compilers specialise sizes of 0 and 1
_ROOM, _STEPS = 1.03, 16  # of a capacity: room above the present sizes, and steps per doubling


@dataclass(frozen=True)
class Sizes:
    """Sizes of the inputs of an evaluation.

    Attributes:
        atoms: ``N``.
        tokens: ``T``.
        extra: ``X`` rows beyond the tokens.
        pairs: ``P`` compared ranks.
    """

    atoms: int
    tokens: int
    extra: int
    pairs: int

    @classmethod
    def of(cls, inputs: EvaluationInputs) -> Sizes:
        """Reads the sizes of a batch."""
        tokens, rows = inputs.layout.num_tokens, inputs.vectors.shape[0]
        return cls(inputs.weight.shape[0], tokens, rows - tokens, inputs.layout.rank_token.shape[0])

    def at_least_two(self) -> Sizes:
        """Returns the smallest sizes from here on that no compiler specialises."""
        added = max(0, _LEAST - self.atoms)
        extra, pairs = (x if x >= _LEAST else x + _LEAST for x in (self.extra, self.pairs))
        return Sizes(self.atoms + added, self.tokens + added, extra, pairs)

    def capacity(self) -> Sizes:
        """Returns larger sizes, rounded up to one of sixteen steps per doubling."""
        rounded = [_round_up(math.ceil(_ROOM * size) + 1) for size in astuple(self)]
        # Each added atom has at least one token.
        return Sizes(rounded[0], max(rounded[1], self.tokens + rounded[0] - self.atoms), rounded[2], rounded[3])

    def hold(self, other: Sizes) -> bool:
        """Whether inputs of the other sizes can be padded to these."""
        added = Sizes(*(mine - its for mine, its in zip(astuple(self), astuple(other), strict=True)))
        return min(astuple(added)) >= 0 and (added.tokens == 0 if added.atoms == 0 else added.tokens >= added.atoms)


def _round_up(size: int) -> int:
    step = 2 ** max(0, math.ceil(math.log2(size)) - 1) / _STEPS
    return math.ceil(math.ceil(size / step) * step)


def pad(inputs: EvaluationInputs, sizes: Sizes) -> EvaluationInputs:
    """Adds atoms that see only themselves, their tokens, rows of length zero and comparisons among those tokens.

    Nothing waits for the device.

    Args:
        inputs: of a batch.
        sizes: that hold those of the inputs.
    """
    own = Sizes.of(inputs)
    if own == sizes:
        return inputs
    assert sizes.hold(own), (sizes, own)
    device = inputs.vectors.device
    atoms, tokens = sizes.atoms - own.atoms, sizes.tokens - own.tokens
    place = torch.arange(tokens, device=device)
    # Added atom a owns the added tokens from a·tokens // atoms on.
    center = own.atoms + torch.div((place + 1) * atoms - 1, max(tokens, 1), rounding_mode="floor")
    bounds = torch.arange(atoms + 1, device=device) * tokens
    bounds = own.tokens + torch.div(bounds, max(atoms, 1), rounding_mode="floor")
    extra = own.atoms if atoms else 0
    # The ranks of added tokens, and of the first atom's self token, are never read.
    rank = place[torch.arange(sizes.pairs - own.pairs, device=device) % tokens] + own.tokens if tokens else None

    def extended(x: Tensor, added: Tensor | int, count: int) -> Tensor:
        if count == 0:
            return x
        tail = x.new_full((count, *x.shape[1:]), added) if isinstance(added, int) else added.to(x.dtype)
        return torch.cat([x, tail])

    def between(x: Tensor, added: Tensor | int) -> Tensor:
        """Adds rows after the tokens, and after the extra rows."""
        if tokens:
            x = torch.cat([extended(x[: own.tokens], added, tokens), x[own.tokens :]])
        return extended(x, extra if x.dim() == 1 else 0, sizes.extra - own.extra)

    layout = {name: getattr(inputs.layout, name) for name in LAYOUT}
    other, pairs = layout["rank_other"], sizes.pairs - own.pairs
    layout = {
        "offsets": extended(layout["offsets"], bounds[1:], atoms),
        "center": between(layout["center"], center),
        "neighbor": between(layout["neighbor"], center),
        "reverse": extended(layout["reverse"], own.tokens + place, tokens),
        "self_token": extended(layout["self_token"], bounds[:-1], atoms),
        "rank_base": extended(layout["rank_base"], 0, tokens),
        "rank_token": extended(layout["rank_token"], 0 if rank is None else rank, pairs),
        "rank_other": extended(
            torch.where(other < own.tokens, other, other + tokens) if tokens else other,
            0 if rank is None else rank,
            pairs,
        ),
    }
    first = own.atoms + torch.arange(atoms, device=device)
    of_atoms = {name: extended(getattr(inputs.atoms, name), 1, atoms) for name in ATOMS}
    of_atoms["first_of_system"] = extended(inputs.atoms.first_of_system, first, atoms)
    return EvaluationInputs(
        between(inputs.vectors, 0),
        extended(inputs.weight, 0, atoms),
        AtomInputs(**of_atoms),
        TokenLayout(**layout),
    )


def unpad(results: list[Tensor], padded: Sizes, own: Sizes, config: ModelConfig) -> tuple[ModelOutput, Tensor | None]:
    """Removes the results of added rows.

    Args:
        results: of ``escaip.potential.compile.flat_evaluation`` for padded inputs.
        padded: sizes of the padded inputs.
        own: sizes of the inputs.
        config: of the model.
    """
    rest = list(results)
    energy, forces = rest.pop(0)[: own.atoms], None if config.is_conservative else rest.pop(0)[: own.atoms]
    output = ModelOutput(energy, forces, {name: rest.pop(0)[: own.atoms] for name in config.heads})
    if not rest:
        return output, None
    gradient = rest[0]
    if padded.tokens > own.tokens:
        gradient = torch.cat([gradient[: own.tokens], gradient[padded.tokens :]])
    return output, gradient[: own.tokens + own.extra]
