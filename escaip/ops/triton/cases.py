"""Attention of one shape on random tokens, as the calls of kernels that it takes: what is tuned and compiled ahead."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from escaip.errors import ConfigError
from escaip.ops.problem import HALF_TYPES, Gradients, Problem
from escaip.ops.triton import launch
from escaip.ops.triton.tiles import MODES

CASE_USES = ("angles", "envelope", "self", "node")


@dataclass(frozen=True)
class Case:
    """What a model asks of the kernels.

    Attributes:
        use: ``angles`` and ``envelope`` as tokens of an atom with and without angular groups, ``self`` where the self
            tokens alone query, ``node`` as atoms of a system.
        mode: of products, from :data:`escaip.ops.triton.tiles.MODES`; it names the type of the tokens too.
        head_size: channels of a head.
        heads: heads.
        widths: channels per angular degree; of them the first alone counts in ``self``, and none in the last two.
        neighborhoods: atoms, or systems in ``node``.
        size: mean tokens of an atom, or mean atoms of a system; sizes go from two thirds to four thirds of it.
    """

    use: str
    mode: str
    head_size: int
    heads: int
    widths: tuple[int, ...]
    neighborhoods: int
    size: int

    def __post_init__(self) -> None:
        if self.use not in CASE_USES or self.mode not in MODES:
            raise ConfigError(
                f"use {self.use!r} or mode {self.mode!r} does not exist: uses are {', '.join(CASE_USES)}, modes "
                f"{', '.join(MODES)}"
            )

    @property
    def dtype(self) -> torch.dtype:
        """Of q, k and v."""
        return next((dtype for dtype in HALF_TYPES if str(dtype).endswith(f".{self.mode}")), torch.float32)

    def small(self) -> Case:
        """The smallest case whose kernels compile to the same code."""
        return replace(self, neighborhoods=2, size=launch.WHOLE + 1 if self.size > launch.WHOLE else 4)

    def problem(self, device: torch.device) -> Problem:
        """Tokens from a fixed seed; the first of each atom is its self token."""
        spread = (torch.arange(self.neighborhoods // 2) + 1) % (self.size // 3 + 1)
        sizes = torch.full((self.neighborhoods,), self.size)
        sizes[: len(spread)] -= spread  # in pairs, so that the mean is as asked for
        sizes[len(spread) : 2 * len(spread)] += spread
        offsets = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)]).to(device)
        total = int(sizes.sum())
        generator = torch.Generator(device).manual_seed(0)
        q, k, v = (self._normal((total, self.heads, self.head_size), generator) for _ in range(3))
        direction = torch.nn.functional.normalize(torch.randn(total, 3, generator=generator, device=device), dim=-1)
        log_envelope = -torch.randn(total, generator=generator, device=device).square()
        direction[offsets[:-1]] = 0.0
        log_envelope[offsets[:-1]] = 0.0
        widths = {"angles": self.widths, "self": self.widths[:1]}.get(self.use, (self.head_size,))
        queries = offsets
        if self.use == "self":
            q, queries = q[offsets[:-1]], torch.arange(self.neighborhoods + 1, device=device)
        bias = None if self.use == "node" else log_envelope
        angles = direction if len(widths) > 1 else None
        return Problem(q, k, v, bias, angles, queries, offsets, widths, self.head_size**-0.5)

    def calls(self, device: torch.device) -> list[launch.Call]:
        """The calls of value, gradient and double gradient, in the order in which each finds what it reads."""
        problem = self.problem(device)
        generator = torch.Generator(device).manual_seed(1)

        def like(x: Tensor) -> Tensor:
            return self._normal(tuple(x.shape), generator).to(x.dtype)

        bias, direction = problem.log_envelope, problem.direction
        tangents = Gradients(
            like(problem.q), like(problem.k), like(problem.v), None if bias is None else like(bias),
            None if direction is None else like(direction),
        )  # fmt: skip
        grad_out = like(problem.q)
        with launch.recorded_calls() as calls:
            result = launch.forward(problem)
            launch.backward(problem, result, grad_out, with_direction=direction is not None)
            launch.double_backward(problem, result, grad_out, tangents)
        return [self._in_mode(call) for call in calls]

    def _normal(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return torch.randn(shape, generator=generator, device=generator.device).to(self.dtype)

    def _in_mode(self, call: launch.Call) -> launch.Call:
        """With the products of the case; those of half types are one way only."""
        if self.dtype in HALF_TYPES:
            return call
        arguments = {**call.arguments, "PRECISION": self.mode}
        return replace(call, arguments=arguments, key=replace(call.key, mode=self.mode))
