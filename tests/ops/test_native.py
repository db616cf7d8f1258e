"""The C++ kernels against the float64 reference in value and two derivatives."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from escaip.errors import ConfigError
from escaip.ops import native
from escaip.ops.reference import reference_attention

pytestmark = pytest.mark.skipif(native.availability() is not None, reason=f"native {native.availability()}")

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
SCALE = 0.3


@dataclass
class Case:
    """Arguments of a call in float64, and cotangents: of the output, and of the first derivatives."""

    leaves: list[Tensor]  # q, k, v, log envelope, direction
    offsets: Tensor
    widths: tuple[int, ...]
    grad_out: Tensor
    tangents: list[Tensor]
    self_only: bool = False

    @property
    def query_offsets(self) -> Tensor:
        return torch.arange(self.offsets.numel()) if self.self_only else self.offsets


def make(sizes: list[int], heads: int, d: int, widths: tuple[int, ...], self_only: bool = False, seed: int = 0) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    total = sum(sizes)
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    selves = offsets[:-1][offsets.diff() > 0]
    queries = len(sizes) if self_only else total
    direction, log_envelope = torch.nn.functional.normalize(normal(total, 3), dim=-1), -normal(total).square()
    direction[selves], log_envelope[selves] = 0.0, 0.0
    leaves = [normal(queries, heads, d), normal(total, heads, d), normal(total, heads, d), log_envelope, direction]
    tangents = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in leaves]
    return Case(leaves, offsets, widths, normal(queries, heads, d), tangents, self_only)


def found(case: Case, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Value, five first derivatives and six second ones of the kernels; those of no directions are left out."""
    *features, bias, direction = [x.to(dtype) for x in case.leaves]
    grad_out, tangents = case.grad_out.to(dtype), [t.to(dtype) for t in case.tangents]
    angles = direction if len(case.widths) > 1 else None
    problem = (*features, bias, angles, case.query_offsets, case.offsets)
    out, lse = native.forward(*problem, case.widths, SCALE)
    first = native.backward(grad_out, *problem, out, lse, case.widths, SCALE, True)
    if angles is None:
        tangents[4] = None
    second = native.double_backward(*tangents, grad_out, *problem, out, lse, case.widths, SCALE)
    assert (first[4] is None) == (second[5] is None) == (angles is None)
    return [x for x in (out, *first, *second) if x is not None]


def expected(case: Case) -> list[Tensor]:
    """The same by autograd through the specification."""
    leaves = [x.clone().requires_grad_() for x in case.leaves]
    grad_out = case.grad_out.clone().requires_grad_()
    q, *rest = leaves
    beyond = q.shape[-1] - sum(case.widths)
    if case.self_only or beyond:  # channels beyond the groups: one more group, of queries that are zero there
        q = torch.cat([q[..., : sum(case.widths)], torch.zeros_like(q[..., :beyond])], -1)
    channels = (*case.widths, beyond) if beyond else case.widths
    single = len(case.widths) == 1
    out = reference_attention(q, *rest, case.offsets, None if single else channels, SCALE, case.self_only)
    has_direction = (case.leaves[4] != 0).any(-1, keepdim=True)
    kept = leaves[:4] if single else leaves
    first = list(torch.autograd.grad((out * grad_out).sum(), kept, create_graph=True))
    if not single:
        first[4] = first[4] * has_direction
    along = sum((a * t).sum() for a, t in zip(first, case.tangents, strict=False))
    second = list(torch.autograd.grad(along, [grad_out, *kept]))
    if not single:
        second[5] = second[5] * has_direction
    return [x.detach() for x in (out, *first, *second)]


def assert_close(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    assert len(found) == len(expected)
    for place, (a, b) in enumerate(zip(found, expected, strict=True)):
        error, size = float((a.double() - b).norm()), float(b.norm())
        assert error <= tolerance * max(size, 1e-3), f"result {place}: {error:.1e} of {size:.1e}"


SHAPES = [
    ([5, 3, 1, 7], 2, 6, (2, 1, 1, 1, 1)),
    ([33, 1, 40, 16], 2, 64, (20, 10, 4, 10, 20)),  # EScAIP's groups
    ([17, 32], 1, 32, (10, 5, 2, 5, 10)),
    ([9, 20], 2, 10, (3, 0, 4)),  # a degree without channels, and channels beyond the groups
    ([12, 4], 3, 8, (8, 0)),
    ([33, 2], 2, 20, (20,)),
    ([21, 5], 1, 9, (4,)),
    ([150, 3], 1, 7, (3, 1, 1, 1, 1)),  # more than one block of rows
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["double", "float"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_derivatives(shape: tuple, dtype: torch.dtype) -> None:
    case = make(*shape)
    assert_close(found(case, dtype), expected(case), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["double", "float"])
@pytest.mark.parametrize(("d", "width"), [(64, 20), (7, 7), (5, 2)])
def test_self_queries_only(d: int, width: int, dtype: torch.dtype) -> None:
    case = make([5, 1, 40, 17], 3, d, (width,), self_only=True)
    assert_close(found(case, dtype), expected(case), TOLERANCE[dtype])


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    heads=st.integers(1, 3),
    widths=st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(lambda w: w[0] > 0),
    beyond=st.integers(0, 5),
    self_only=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_ragged_shape(
    sizes: list[int], heads: int, widths: list[int], beyond: int, self_only: bool, seed: int
) -> None:
    used = tuple(widths[:1] if self_only else widths)
    case = make(sizes, heads, sum(used) + beyond, used, self_only, seed)
    assert_close(found(case), expected(case), 1e-11)


@pytest.mark.parametrize("widths", [(3, 2, 1, 1, 1), (8,)])
def test_longest_neighborhood(widths: tuple[int, ...]) -> None:
    """Whatever the size, each token's result is that of the reference; here on the last rows, to keep it fast."""
    case = make([native.MAX_KEYS], 1, 8, widths)
    # Keys far below the others do nothing: all but 60 tokens are removed, the rest must be as if alone.
    keep = torch.arange(native.MAX_KEYS) % 17 == 0
    case.leaves[3][~keep] = -math.inf
    case.grad_out[~keep] = 0.0
    case.tangents[0][~keep] = 0.0
    alone = replace(
        case,
        leaves=[x[keep] for x in case.leaves],
        offsets=torch.tensor([0, int(keep.sum())]),
        grad_out=case.grad_out[keep],
        tangents=[x[keep] for x in case.tangents],
    )
    long = found(case)
    assert all(torch.isfinite(x).all() for x in long)
    assert_close([x[keep] for x in long], expected(alone), 1e-11)


def test_all_rows_of_a_long_neighborhood() -> None:
    case = make([700], 1, 4, (2, 1, 1))
    assert_close(found(case), expected(case), 1e-11)
    assert_close(found(case, torch.float32), found(case), 1e-5)


def test_removed_keys() -> None:
    case = make([6, 20], 2, 6, (3, 3))
    case.leaves[3][[2, 9, 10]] = -math.inf
    results = found(case)
    assert all(torch.isfinite(x).all() for x in results)
    assert_close(results, expected(case), 1e-12)
    for place in (2, 3, 8, 9):  # gradients of k and v
        assert (results[place][[2, 9, 10]] == 0).all()
    far = replace(case, leaves=[*case.leaves[:3], torch.where(case.leaves[3] < -1, -700.0, 0.0), case.leaves[4]])
    assert_close(found(far, torch.float32), expected(far), 1e-5)


def test_coincident_and_antiparallel_directions() -> None:
    case = make([7, 4], 2, 10, (2, 2, 2, 2, 2))
    n = case.leaves[4]
    n[2], n[3], n[4], n[8] = n[1], -n[1], torch.tensor([0.0, 0.0, 1.0]), n[9]
    assert_close(found(case), expected(case), 1e-12)


def test_without_log_envelope() -> None:
    case = make([5, 30], 2, 6, (4, 2))
    case.leaves[3].zero_()
    case.tangents[3].zero_()
    value, *derivatives = expected(case)
    first, second = derivatives[:5], derivatives[5:]
    q, k, v, _, n = case.leaves
    problem = (q, k, v, None, n, case.offsets, case.offsets)
    out, lse = native.forward(*problem, case.widths, SCALE)
    got_first = native.backward(case.grad_out, *problem, out, lse, case.widths, SCALE, True)
    tangents = (*case.tangents[:3], None, case.tangents[4])
    got_second = native.double_backward(*tangents, case.grad_out, *problem, out, lse, case.widths, SCALE)
    assert got_first[3] is None
    assert got_second[4] is None
    kept = [value, *first[:3], first[4], *second[:4], second[5]]
    assert_close([x for x in (out, *got_first, *got_second) if x is not None], kept, 1e-12)


def test_directions_that_need_no_gradient() -> None:
    case = make([5, 30], 2, 6, (4, 2))
    problem = (*case.leaves, case.offsets, case.offsets)
    out, lse = native.forward(*problem, case.widths, SCALE)
    rest = (case.grad_out, *problem, out, lse, case.widths, SCALE)
    with_direction, without = native.backward(*rest, True), native.backward(*rest, False)
    assert without[4] is None
    assert all(torch.equal(a, b) for a, b in zip(with_direction[:4], without[:4], strict=True))
    *tangents, tn = case.tangents
    zero, none = (native.double_backward(*tangents, t, *rest) for t in (torch.zeros_like(tn), None))
    assert all(torch.equal(a, b) for a, b in zip(zero, none, strict=True))


@pytest.mark.parametrize("widths", [(4, 2), (6,)])
def test_empty_neighborhoods_and_no_tokens(widths: tuple[int, ...]) -> None:
    filled, holes = make([5, 8], 2, 6, widths), make([0, 5, 0, 8, 0], 2, 6, widths)
    assert_close(found(holes), expected(filled), 1e-12)
    for sizes in ([0, 0], []):
        assert all(x.numel() == 0 for x in found(make(sizes, 2, 6, widths)))


def test_keys_without_queries_have_zero_gradients() -> None:
    case = make([5, 8], 2, 6, (6,))
    q, k, v, b, _ = case.leaves
    problem = (q[:5], k, v, b, None, torch.tensor([0, 5, 5]), case.offsets)
    out, lse = native.forward(*problem, (6,), SCALE)
    first = native.backward(case.grad_out[:5], *problem, out, lse, (6,), SCALE, False)
    assert all((x[5:] == 0).all() for x in first[1:4])


@pytest.mark.parametrize("widths", [(20, 10, 4, 10, 20), (64,)])
def test_same_bits_on_every_run_and_number_of_threads(widths: tuple[int, ...]) -> None:
    case = make([30, 1, 45, 12, 33, 140] * 3, 2, 64, widths)
    once = found(case, torch.float32)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert all(torch.equal(a, b) for a, b in zip(once, found(case, torch.float32), strict=True))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_summed_in_float32(dtype: torch.dtype) -> None:
    case = make([5, 30], 2, 8, (4, 4))
    half, bias, n = [x.to(dtype) for x in (*case.leaves[:3], case.grad_out)], *(x.float() for x in case.leaves[3:])
    results = []
    for q, k, v, g in (half, [x.float() for x in half]):
        problem = (q, k, v, bias, n, case.offsets, case.offsets)
        out, lse = native.forward(*problem, case.widths, SCALE)
        assert lse.dtype == torch.float32
        rest = (g, *problem, out.to(dtype), lse, case.widths, SCALE)
        first = native.backward(*rest, True)
        second = native.double_backward(*(x.to(q.dtype) for x in half[:3]), bias, n, *rest)
        dtypes = [*[q.dtype] * 3, *[bias.dtype] * 2, *[q.dtype] * 4, *[bias.dtype] * 2]
        assert [x.dtype for x in (*first, *second)] == dtypes
        results.append([x.to(dtype) for x in (out, *first, *second)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_strided_inputs_which_stay_as_they_are() -> None:
    case = make([5, 30], 3, 8, (4, 4))
    plain = found(case)
    strided = replace(case, leaves=[x.movedim(0, -1).contiguous().movedim(-1, 0) for x in case.leaves])
    assert not strided.leaves[0].is_contiguous()
    before = [x.clone() for x in (*strided.leaves, *strided.tangents, strided.grad_out)]
    assert all(torch.equal(a, b) for a, b in zip(plain, found(strided), strict=True))
    after = (*strided.leaves, *strided.tangents, strided.grad_out)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.bad_input
def test_too_long_a_neighborhood_and_wrong_offsets() -> None:
    with pytest.raises(ConfigError, match="at most 1024 tokens in a neighborhood: use backend='blocked'"):
        found(make([3, 1025], 1, 2, (2,)))
    for offsets in ([0, 5, 3, 8], [1, 8], [0, 7], [0, 9]):
        with pytest.raises(ConfigError, match="offsets must start at 0, never fall, and end"):
            found(replace(make([8], 1, 2, (2,)), offsets=torch.tensor(offsets)))


def test_one_openmp_run_time() -> None:
    found(make([3], 1, 2, (2,)))
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("no /proc")
    loaded = {line.split(maxsplit=5)[-1] for line in maps.read_text().splitlines() if "libgomp" in line}
    assert len(loaded) <= 1
