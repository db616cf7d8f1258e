"""The C++ kernels against the float64 reference in value and two derivatives."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from family_cases import Case, Results, errors, make_case, run_family, run_reference, without_keys
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from escaip.errors import ConfigError
from escaip.ops import cpp, neighborhood_attention
from escaip.ops.autograd import OPERATORS
from escaip.ops.inputs import Gradients

pytestmark = pytest.mark.skipif(cpp.unavailable() is not None, reason=str(cpp.unavailable()))

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
TYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=["double", "float"])


def make(sizes: list[int], heads: int, d: int, widths: tuple[int, ...], use: str = "all", seed: int = 0) -> Case:
    return make_case(sizes, heads, d, widths, torch.float64, use, seed)


def check(case: Case, dtype: torch.dtype = torch.float64, tolerance: float | None = None) -> Results:
    """Runs the kernels in ``dtype`` and holds them against the reference."""
    found, expected = run_family("native", case.to(dtype)), run_reference(case)
    for name, error in errors(found, expected).items():
        # Differences of what cancels to nothing are measured against one.
        size = max(float(expected[name].norm()), 1e-3)
        assert error * float(expected[name].norm()) <= (tolerance or TOLERANCE[dtype]) * size, f"{name}: {error:.1e}"
    return found


def present(found: Results) -> list[Tensor]:
    return [x for x in found.values() if x is not None]


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


@TYPES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_derivatives(shape: tuple, dtype: torch.dtype) -> None:
    check(make(*shape), dtype)


@TYPES
@pytest.mark.parametrize(("d", "width"), [(64, 20), (7, 7), (5, 2)])
def test_self_queries_only(d: int, width: int, dtype: torch.dtype) -> None:
    check(make([5, 1, 40, 17], 3, d, (width,), "self"), dtype)


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
    check(make(sizes, heads, sum(used) + beyond, used, "self" if self_only else "all", seed), tolerance=1e-11)


@pytest.mark.parametrize("widths", [(3, 2, 1, 1, 1), (8,)])
def test_very_long_neighborhood(widths: tuple[int, ...]) -> None:
    """Many blocks of rows. Removed keys do nothing: the other tokens must be as if alone."""
    total = 1500
    keep = torch.arange(total) % 25 == 0
    case = without_keys(make([total], 1, 8, widths), ~keep)
    case.grad_out[~keep] = 0.0
    case.tangents.q[~keep] = 0.0
    offsets = torch.tensor([0, int(keep.sum())])
    x = case.problem
    alone = Case(
        replace(
            x, q=x.q[keep], k=x.k[keep], v=x.v[keep], log_envelope=x.log_envelope[keep],
            direction=None if x.direction is None else x.direction[keep], query_offsets=offsets, key_offsets=offsets,
        ),
        case.grad_out[keep],
        Gradients(*(None if t is None else t[keep] for t in case.tangents)),
    )  # fmt: skip
    long = run_family("native", case)
    assert all(torch.isfinite(x).all() for x in present(long))
    kept = {name: None if x is None else x[keep] for name, x in long.items()}
    assert max(errors(kept, run_reference(alone)).values()) < 1e-11


def test_all_rows_of_a_long_neighborhood() -> None:
    case = make([700], 1, 4, (2, 1, 1))
    exact = check(case, tolerance=1e-11)
    assert max(errors(run_family("native", case.to(torch.float32)), exact).values()) < 1e-5


def test_removed_keys() -> None:
    gone = torch.tensor([2, 9, 10])
    case = without_keys(make([6, 20], 2, 6, (3, 3)), gone)
    found = check(case)
    assert all(torch.isfinite(x).all() for x in present(found))
    assert all((found[name][gone] == 0).all() for name in ("dk", "dv", "gk", "gv"))
    check(case.changed(log_envelope=torch.where(case.problem.log_envelope < -1, -700.0, 0.0)), torch.float32)


def test_coincident_and_antiparallel_directions() -> None:
    case = make([7, 4], 2, 10, (2, 2, 2, 2, 2))
    n = case.problem.direction
    n[2], n[3], n[4], n[8] = n[1], -n[1], torch.tensor([0.0, 0.0, 1.0]), n[9]
    check(case)


@pytest.mark.parametrize("widths", [(4, 2), (6,)])
def test_without_log_envelope(widths: tuple[int, ...]) -> None:
    check(make([5, 30], 2, 6, widths, "node"))


def test_directions_that_need_no_gradient() -> None:
    case = make([5, 30], 2, 6, (4, 2))
    wanted, without = (run_family("native", case, with_direction) for with_direction in (True, False))
    assert without["dn"] is None
    assert all(torch.equal(wanted[name], without[name]) for name in ("out", "dq", "dk", "dv", "db"))
    zero = replace(case, tangents=case.tangents._replace(direction=torch.zeros_like(case.problem.direction)))
    as_zero = run_family("native", zero)
    assert all(torch.equal(as_zero[name], without[name]) for name in ("gG", "gq", "gk", "gv", "gb", "gn"))


@pytest.mark.parametrize("widths", [(4, 2), (6,)])
def test_empty_neighborhoods_and_no_tokens(widths: tuple[int, ...]) -> None:
    filled, holes = make([5, 8], 2, 6, widths), make([0, 5, 0, 8, 0], 2, 6, widths)
    assert max(errors(run_family("native", holes), run_reference(filled)).values()) < 1e-12
    for sizes in ([0, 0], []):
        assert all(x.numel() == 0 for x in present(run_family("native", make(sizes, 2, 6, widths))))


def test_keys_without_queries_have_zero_gradients() -> None:
    case = make([5, 8], 2, 6, (6,))
    problem = replace(case.problem, q=case.problem.q[:5], query_offsets=torch.tensor([0, 5, 5]))
    tangents = case.tangents._replace(q=case.tangents.q[:5])
    found = run_family("native", Case(problem, case.grad_out[:5], tangents))
    assert all((found[name][5:] == 0).all() for name in ("dk", "dv", "db", "gk", "gv", "gb"))


@pytest.mark.parametrize("widths", [(20, 10, 4, 10, 20), (64,)])
def test_same_bits_on_every_run_and_number_of_threads(widths: tuple[int, ...]) -> None:
    case = make([30, 1, 45, 12, 33, 140] * 3, 2, 64, widths).to(torch.float32)
    once = present(run_family("native", case))
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            again = present(run_family("native", case))
            assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_summed_in_float32(dtype: torch.dtype) -> None:
    half = make_case([5, 30], 2, 8, (4, 4), dtype)
    found = run_family("native", half)
    for name, tensor in found.items():
        assert tensor.dtype == (torch.float32 if name[1] in "bn" else dtype), name
    assert torch.equal(found["out"], run_family("native", half.to(torch.float32))["out"].to(dtype))
    assert max(errors(found, run_reference(half)).values()) < (3e-2 if dtype == torch.bfloat16 else 3e-3)


def test_strided_inputs_which_stay_as_they_are() -> None:
    case = make([5, 30], 3, 8, (4, 4))
    plain = present(run_family("native", case))
    names = ("q", "k", "v", "log_envelope", "direction")
    strided = case.changed(**{x: getattr(case.problem, x).movedim(0, -1).contiguous().movedim(-1, 0) for x in names})
    assert not strided.problem.q.is_contiguous()
    inputs = [x for x in (*vars(strided.problem).values(), case.grad_out, *case.tangents) if isinstance(x, Tensor)]
    before = [x.clone() for x in inputs]
    assert all(torch.equal(a, b) for a, b in zip(plain, present(run_family("native", strided)), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, inputs, strict=True))


@pytest.mark.bad_input
@pytest.mark.parametrize("offsets", [[0, 5, 3, 8], [1, 8], [0, 7], [0, 9]])
def test_wrong_offsets(offsets: list[int]) -> None:
    x, none = torch.zeros(8, 1, 2), torch.zeros(8, 3)
    with pytest.raises(ConfigError, match="offsets must start at 0, never fall, and end") as caught:
        neighborhood_attention(x, x, x, none[:, 0], none, torch.tensor(offsets), None, 1.0, "native")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("operator", ["value", "backward", "double_backward"])
def test_no_tensor_is_held_after_a_call(operator: str) -> None:
    x = make([5, 30], 3, 8, (4, 4)).problem
    offsets, constants = (x.query_offsets, x.key_offsets), (list(x.widths), x.scale)
    geometry = (x.log_envelope, x.direction)
    out, lse = OPERATORS["native"].value(x.q, x.k, x.v, *geometry, *offsets, *constants)
    arguments = {
        "value": (x.q, x.k, x.v, *geometry, *offsets, *constants),
        "backward": (out, x.q, x.k, x.v, *geometry, *offsets, out, lse, *constants, True),
        "double_backward": (
            x.q, x.k, x.v, *geometry, out, x.q, x.k, x.v, *geometry, *offsets, out, lse, *constants,
        ),
    }[operator]  # fmt: skip
    before = [y._use_count() for y in arguments if isinstance(y, Tensor)]
    results = getattr(OPERATORS["native"], operator)(*arguments)
    assert [y._use_count() for y in arguments if isinstance(y, Tensor)] == before
    assert all(y._use_count() == 1 for y in results)


def test_one_openmp_run_time() -> None:
    if not Path("/proc/self/maps").exists():
        pytest.skip("no /proc")
    program = (
        "from escaip.ops import cpp\n"
        "assert cpp.has_kernels()\n"
        "lines = open('/proc/self/maps').read().splitlines()\n"
        "print(len({line.split(maxsplit=5)[-1] for line in lines if 'libgomp' in line}))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(done.stdout) <= 1
