"""Inputs of attention, the sum written out, and derivatives through any function of them."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from escaip.ops import available_backends

# Those that take float64 on the CPU; the GPU kernels have tests of their own.
CPU_BACKENDS = [info for info in available_backends() if not info.devices or "cpu" in info.devices]
LEAVES = ("q", "k", "v", "log_envelope", "direction")


def make_inputs(sizes: list[int], heads: int = 2, width: int = 6, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    total = sum(sizes)
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    direction = torch.nn.functional.normalize(normal(total, 3), dim=-1)
    log_envelope = -normal(total).square()
    direction[offsets[:-1]] = 0.0
    log_envelope[offsets[:-1]] = 0.0
    return {
        "q": normal(total, heads, width),
        "k": normal(total, heads, width),
        "v": normal(total, heads, width),
        "log_envelope": log_envelope,
        "direction": direction,
        "offsets": offsets,
    }


def written_out(inputs: dict[str, Tensor], channels: tuple[int, ...] | None, scale: float) -> Tensor:
    """One query, one head, one neighborhood at a time."""
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    offsets, n, bias = inputs["offsets"].tolist(), inputs["direction"], inputs["log_envelope"]
    out = torch.zeros_like(q)
    groups = [range(q.shape[-1])] if channels is None else []
    start = 0
    for count in channels or ():
        groups.append(range(start, start + count))
        start += count
    for first, last in pairwise(offsets):
        for head in range(q.shape[1]):
            for j in range(first, last):
                logits = []
                for m in range(first, last):
                    cosine = float(n[j] @ n[m])
                    legendre = [1, cosine, (3 * cosine**2 - 1) / 2, (5 * cosine**3 - 3 * cosine) / 2,
                                (35 * cosine**4 - 30 * cosine**2 + 3) / 8]  # fmt: skip
                    if j == first or m == first:
                        legendre = [1, 0, 0, 0, 0]
                    product = sum(
                        legendre[degree] * float(q[j, head, list(group)] @ k[m, head, list(group)])
                        for degree, group in enumerate(groups)
                    )
                    logits.append(scale * product + float(bias[m]))
                weights = torch.softmax(torch.tensor(logits, dtype=q.dtype), 0)
                out[j, head] = weights @ v[first:last, head]
    return out


def derivatives(function: Callable[..., Tensor], inputs: dict[str, Tensor], order: int, seed: int = 0) -> list[Tensor]:
    """The value; with order 1 first derivatives of a random projection of it; with order 2 second ones too.

    The second are derivatives of a random projection of the first, with respect to the cotangent of the value and to
    all inputs. What does not depend on an input counts as zero.
    """
    generator = torch.Generator().manual_seed(seed)
    leaves = [inputs[name].detach().requires_grad_() for name in LEAVES]
    out = function(*leaves)
    found = [out]
    if order:
        cotangent = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out).requires_grad_()
        first = gradients(out, leaves, cotangent, create_graph=order > 1)
        found += first
    if order > 1:
        tangents = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) for x in first]
        projected = sum((x.double() * t.double()).sum() for x, t in zip(first, tangents, strict=True))
        found += gradients(projected, [cotangent, *leaves])
    return [x.detach() for x in found]


def gradients(
    output: Tensor, inputs: list[Tensor], cotangent: Tensor | None = None, create_graph: bool = False
) -> list[Tensor]:
    """``torch.autograd.grad`` with zeros for inputs that play no part."""
    found = torch.autograd.grad(output, inputs, cotangent, create_graph=create_graph, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, inputs, strict=True)]


def relative_errors(found: list[Tensor], expected: list[Tensor]) -> list[float]:
    """``‖found − expected‖ / ‖expected‖`` of each; absolute where the expected one vanishes."""
    errors = []
    for f, e in zip(found, expected, strict=True):
        difference, size = (f.detach().double() - e.detach().double()).norm(), float(e.detach().double().norm())
        errors.append(float(difference) / (size if size > 0 else 1.0))
    return errors
