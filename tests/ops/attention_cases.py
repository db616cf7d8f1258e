"""Inputs of attention and of kernel families, sums written out, and derivatives of the specification in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from escaip.ops import available_backends
from escaip.ops.autograd import OPERATORS
from escaip.ops.inputs import AttentionInputs, Gradients
from escaip.ops.reference import reference_attention

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


def written_out(
    inputs: dict[str, Tensor], channels: tuple[int, ...] | None, scale: float, angular_values: bool = False
) -> Tensor:
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
                logits, values = [], []
                for m in range(first, last):
                    cosine = float(n[j] @ n[m])
                    legendre = [1, cosine, (3 * cosine**2 - 1) / 2, (5 * cosine**3 - 3 * cosine) / 2,
                                (35 * cosine**4 - 30 * cosine**2 + 3) / 8]  # fmt: skip
                    weights_of_values = torch.ones(q.shape[-1], dtype=q.dtype)
                    if j == first or m == first:
                        legendre = [1, 0, 0, 0, 0]
                    elif angular_values:
                        for degree, group in enumerate(groups):
                            weights_of_values[list(group)] = legendre[degree]
                    values.append(weights_of_values * v[m, head])
                    product = sum(
                        legendre[degree] * float(q[j, head, list(group)] @ k[m, head, list(group)])
                        for degree, group in enumerate(groups)
                    )
                    logits.append(scale * product + float(bias[m]))
                weights = torch.softmax(torch.tensor(logits, dtype=q.dtype), 0)
                out[j, head] = weights @ torch.stack(values)
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


Results = dict[str, Tensor | None]
NAMES = ("out", "dq", "dk", "dv", "db", "dn", "gG", "gq", "gk", "gv", "gb", "gn")


@dataclass
class Case:
    """A problem with cotangents: of the value, and of the gradients of the inputs."""

    problem: AttentionInputs
    grad_out: Tensor
    tangents: Gradients

    def to(self, dtype: torch.dtype) -> Case:
        """With all numbers in another type."""

        def cast(x: object) -> object:
            return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x

        problem = AttentionInputs(*(cast(x) for x in vars(self.problem).values()))  # type: ignore[arg-type]
        return Case(problem, self.grad_out.to(dtype), Gradients(*(cast(x) for x in self.tangents)))  # type: ignore[arg-type]

    def on(self, device: str) -> Case:
        """With all tensors on a device."""

        def move(x: object) -> object:
            return x.to(device) if isinstance(x, Tensor) else x

        problem = AttentionInputs(*(move(x) for x in vars(self.problem).values()))  # type: ignore[arg-type]
        return Case(problem, self.grad_out.to(device), Gradients(*(move(x) for x in self.tangents)))  # type: ignore[arg-type]

    def changed(self, **values: object) -> Case:
        """With other parts of the problem."""
        return replace(self, problem=replace(self.problem, **values))  # type: ignore[arg-type]


def make_case(
    sizes: list[int],
    heads: int = 1,
    d: int = 16,
    widths: tuple[int, ...] = (5, 3, 1, 3, 4),
    dtype: torch.dtype = torch.float32,
    use: str = "all",
    seed: int = 0,
    angular_values: bool = False,
) -> Case:
    """A random case; ``use`` is ``all`` (tokens query), ``self`` (self tokens query) or ``node`` (no bias).

    ``dtype`` is that of q, k, v and their cotangents; the geometry is float64 beside float64, else float32.
    """
    generator = torch.Generator().manual_seed(seed)
    exact = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*shape: int, dtype: torch.dtype = exact) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=exact).to(dtype)

    offsets = torch.tensor([0, *sizes]).cumsum(0)
    total = int(offsets[-1])
    occupied = offsets[:-1][offsets.diff() > 0]
    direction = torch.nn.functional.normalize(normal(total, 3), dim=-1)
    direction[occupied] = 0.0
    log_envelope = -normal(total).square()
    log_envelope[occupied] = 0.0
    queries, query_offsets = total, offsets
    if use == "self":
        queries, query_offsets, widths = len(sizes), torch.arange(len(sizes) + 1), widths[:1]
    q, k, v = (normal(rows, heads, d, dtype=dtype) for rows in (queries, total, total))
    angles = direction if len(widths) > 1 else None
    bias = None if use == "node" else log_envelope
    problem = AttentionInputs(q, k, v, bias, angles, query_offsets, offsets, widths, 1 / math.sqrt(d), angular_values)

    def like(x: Tensor | None) -> Tensor | None:
        return None if x is None else normal(*x.shape, dtype=x.dtype)

    return Case(problem, normal(*q.shape, dtype=dtype), Gradients(*map(like, (q, k, v, bias, angles))))  # type: ignore[arg-type]


def run_family(backend: str, case: Case, with_direction: bool = True) -> Results:
    """Everything that the three operators of a backend return, by name."""
    operators, x = OPERATORS[backend], case.problem
    inputs = (x.q, x.k, x.v, x.log_envelope, x.direction, x.query_offsets, x.key_offsets)
    constants = (list(x.widths), x.scale, x.angular_values)
    out, lse = operators.value(*inputs, *constants)
    first = operators.backward(case.grad_out, *inputs, out, lse, *constants, with_direction and x.direction is not None)
    tangents = case.tangents if with_direction else case.tangents._replace(direction=None)
    second = operators.double_backward(*tangents, case.grad_out, *inputs, out, lse, *constants)
    found = dict(zip(NAMES, (out, *first, *second), strict=True))
    absent = {"db", "gb"} if x.log_envelope is None else set()
    absent |= {"dn", "gn"} if x.direction is None else set() if with_direction else {"dn"}
    return {name: None if name in absent else tensor for name, tensor in found.items()}


def run_reference(case: Case, with_direction: bool = True) -> Results:
    """The same by autograd through the specification in float64, on the (rounded) inputs of the case."""
    problem = case.problem
    total, angular = problem.k.shape[0], problem.direction is not None
    bias = torch.zeros(total) if problem.log_envelope is None else problem.log_envelope
    direction = torch.zeros(total, 3) if problem.direction is None else problem.direction
    given = (case.grad_out, problem.q, problem.k, problem.v, bias, direction)
    leaves = [x.detach().double().requires_grad_() for x in given]
    grad, q, k, v, b, n = leaves
    # Self tokens have no direction to differentiate by: their gradient is zero.
    directed = torch.where((n != 0).any(-1, keepdim=True), n, n.detach())
    used = sum(problem.widths)
    q_used, k_used = (torch.nn.functional.pad(x[..., :used], (0, x.shape[-1] - used)) for x in (q, k))
    # Channels that take no part are zero here, in a group of their own.
    unused = (q.shape[-1] - used,) if used < q.shape[-1] else ()
    channels = (*problem.widths, *unused) if angular else None
    offsets, self_queries = problem.key_offsets, problem.q.shape[0] != total
    occupied = offsets if self_queries else torch.cat([offsets[:1], offsets[1:][offsets.diff() > 0]])
    options = {"self_queries_only": self_queries, "angular_values": problem.angular_values}
    out = reference_attention(q_used, k_used, v, b, directed, occupied, channels, problem.scale, **options)
    inputs = [q, k, v, b, *([n] if angular else [])]
    first = torch.autograd.grad(out, inputs, grad, create_graph=True, allow_unused=True)
    pairs = [(g, t) for g, t in zip(first, case.tangents) if g is not None and t is not None]
    if not with_direction and angular:
        pairs = pairs[:-1]
    second = torch.autograd.grad(
        [g for g, _ in pairs], [grad, *inputs], [t.double() for _, t in pairs], allow_unused=True
    )
    none = () if angular else (None,)
    results: Results = dict(zip(NAMES, (out, *first, *none, *second, *none), strict=True))
    if problem.log_envelope is None:
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


def without_keys(case: Case, tokens: Tensor) -> Case:
    """The case with keys removed by their envelope."""
    assert case.problem.log_envelope is not None
    bias = case.problem.log_envelope.clone()
    bias[tokens] = -math.inf
    return case.changed(log_envelope=bias)
