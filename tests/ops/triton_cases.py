"""Inputs for the kernels, and what autograd makes of the specification in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from escaip.ops.reference import reference_attention

Results = dict[str, Tensor | None]


@dataclass
class Case:
    """Arguments of a kernel family; ``widths`` of one entry means no angles."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_envelope: Tensor | None
    direction: Tensor | None
    query_offsets: Tensor
    key_offsets: Tensor
    widths: tuple[int, ...]
    scale: float

    @property
    def arguments(self) -> tuple[object, ...]:
        return (self.q, self.k, self.v, self.log_envelope, self.direction, self.query_offsets, self.key_offsets)

    @property
    def self_queries(self) -> bool:
        return self.q.shape[0] != self.k.shape[0]


def make_case(
    sizes: list[int],
    heads: int = 1,
    d: int = 16,
    widths: tuple[int, ...] = (5, 3, 1, 3, 4),
    dtype: torch.dtype = torch.float32,
    use: str = "all",
    seed: int = 0,
) -> Case:
    """A random case; ``use`` is ``all`` (tokens query), ``self`` (self tokens query) or ``node`` (no bias)."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    offsets = torch.tensor([0, *sizes]).cumsum(0)
    total = int(offsets[-1])
    occupied = offsets[:-1][offsets.diff() > 0]
    direction = torch.nn.functional.normalize(normal(total, 3), dim=-1)
    direction[occupied] = 0.0
    log_envelope = -normal(total).square()
    log_envelope[occupied] = 0.0
    q, k, v = (normal(total, heads, d).to(dtype) for _ in range(3))
    query_offsets = offsets
    if use == "self":
        q, query_offsets, widths = q[: len(sizes)], torch.arange(len(sizes) + 1), widths[:1]
    angles = direction if len(widths) > 1 else None
    bias = None if use == "node" else log_envelope
    return Case(q, k, v, bias, angles, query_offsets, offsets, widths, 1 / math.sqrt(d))


def cotangents(case: Case, seed: int = 1) -> tuple[Tensor, list[Tensor | None]]:
    """``grad_out``, and cotangents of the gradients of q, k, v, log envelope and direction."""
    generator = torch.Generator().manual_seed(seed)

    def like(x: Tensor | None) -> Tensor | None:
        return None if x is None else torch.randn(x.shape, generator=generator).to(x.dtype)

    grad_out = like(case.q)
    assert grad_out is not None
    return grad_out, [like(x) for x in (case.q, case.k, case.v, case.log_envelope, case.direction)]


def run_family(case: Case, grad_out: Tensor, tangents: list[Tensor | None], with_direction: bool = True) -> Results:
    """Everything the three functions return, by name."""
    from escaip.ops import triton as family

    rest = (case.widths, case.scale)
    out, lse = family.forward(*case.arguments, *rest)
    first = family.backward(grad_out, *case.arguments, out, lse, *rest, with_direction)
    if not with_direction:
        tangents = [*tangents[:4], None]
    second = family.double_backward(*tangents, grad_out, *case.arguments, out, lse, *rest)
    names = ("out", "dq", "dk", "dv", "db", "dn", "gG", "gq", "gk", "gv", "gb", "gn")
    return dict(zip(names, (out, *first, *second), strict=True))


def run_reference(case: Case, grad_out: Tensor, tangents: list[Tensor | None], with_direction: bool = True) -> Results:
    """The same by autograd through the specification in float64, on the (rounded) inputs of the case."""
    total = case.k.shape[0]
    bias = torch.zeros(total) if case.log_envelope is None else case.log_envelope
    direction = torch.zeros(total, 3) if case.direction is None else case.direction
    leaves = [x.double().requires_grad_() for x in (grad_out, case.q, case.k, case.v, bias, direction)]
    grad, q, k, v, b, n = leaves
    # Self tokens have no direction to differentiate by: their gradient is zero.
    directed = torch.where((n != 0).any(-1, keepdim=True), n, n.detach())
    used = sum(case.widths)
    q_used, k_used = (torch.nn.functional.pad(x[..., :used], (0, x.shape[-1] - used)) for x in (q, k))
    # Channels that take no part are zero here, in a group of their own.
    unused = (q.shape[-1] - used,) if used < q.shape[-1] else ()
    channels = None if case.direction is None else (*case.widths, *unused)
    occupied = torch.cat([case.key_offsets[:1], case.key_offsets[1:][case.key_offsets.diff() > 0]])
    out = reference_attention(
        q_used, k_used, v, b, directed, occupied, channels, case.scale, self_queries_only=case.self_queries
    )
    inputs = [q, k, v, b, *([n] if case.direction is not None else [])]
    first = torch.autograd.grad(out, inputs, grad, create_graph=True, allow_unused=True)
    pairs = [(g, t) for g, t in zip(first, tangents) if g is not None and t is not None]
    if not with_direction and case.direction is not None:
        pairs = pairs[:-1]
    second = torch.autograd.grad(
        [g for g, _ in pairs], [grad, *inputs], [t.double() for _, t in pairs], allow_unused=True
    )
    first_all = [*first, None] if case.direction is None else list(first)
    second_all = [*second, None] if case.direction is None else list(second)
    names = ("out", "dq", "dk", "dv", "db", "dn", "gG", "gq", "gk", "gv", "gb", "gn")
    results: Results = dict(zip(names, (out, *first_all, *second_all), strict=True))
    if case.log_envelope is None:
        results["db"] = results["gb"] = None
    if not with_direction:
        results["dn"] = None
    return {name: None if x is None else x.detach() for name, x in results.items()}


def errors(found: Results, expected: Results) -> dict[str, float]:
    """Relative error in norm of each result; both absent is no error."""
    result = {}
    for name, want in expected.items():
        got = found[name]
        assert (got is None) == (want is None), name
        if got is not None and want is not None:
            assert got.shape == want.shape, name
            result[name] = float((got.double() - want).norm() / want.norm().clamp(min=1e-12))
    return result


def with_zero_key(case: Case, token: int) -> Case:
    """The case with one key removed by its envelope."""
    assert case.log_envelope is not None
    bias = case.log_envelope.clone()
    bias[token] = -math.inf
    return replace(case, log_envelope=bias)
