"""The kernel families (C++, Triton, plain blocks) against the specification in float64, in value and two derivatives.

Without a GPU the Triton kernels run in Triton's interpreter, on CPU tensors; that they compile to GPU code is tested in
test_triton.py.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from attention_cases import Case, Results, errors, make_case, run_family, run_reference, without_keys
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import same_bits_on_threads
from torch import Tensor

from escaip.errors import ConfigError
from escaip.ops import cpp, neighborhood_attention
from escaip.ops import triton as triton_family
from escaip.ops.autograd import OPERATORS
from escaip.ops.inputs import Gradients

DOUBLE, SINGLE, BFLOAT, HALF = torch.float64, torch.float32, torch.bfloat16, torch.float16
PUBLISHED = (20, 10, 4, 10, 20)
# Limits of value, first and second derivatives. float32: accumulated rounding. Half types: every computed operand of a
# matrix product and every result is rounded, by 2^-9 in bfloat16 and 2^-12 in float16. Second derivatives chain twice
# as many of those as first ones and take D from the rounded output, which weighs where E − D is small.
TOLERANCE = {
    DOUBLE: (1e-12, 1e-12, 1e-12), SINGLE: (1e-5, 1e-5, 1e-5), BFLOAT: (4e-3, 6e-3, 1e-2), HALF: (5e-4, 1e-3, 3e-3),
}  # fmt: skip
PRECISIONS = {"native": (DOUBLE, SINGLE), "triton": (SINGLE,), "blocked": (DOUBLE, SINGLE)}
BEST = {"native": DOUBLE, "triton": SINGLE, "blocked": DOUBLE}
UNUSABLE = {"native": cpp.unavailable(), "triton": triton_family.availability(), "blocked": None}
FAMILIES = [
    pytest.param(name, marks=pytest.mark.skipif(reason is not None, reason=str(reason)))
    for name, reason in UNUSABLE.items()
]
families = pytest.mark.parametrize("family", FAMILIES)
native = pytest.mark.skipif(cpp.unavailable() is not None, reason=str(cpp.unavailable()))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def run(family: str, case: Case, with_direction: bool = True) -> Results:
    """Returns what a family makes of a case, on the CPU."""
    found = run_family(family, case.on(DEVICE) if family == "triton" else case, with_direction)
    return {name: None if x is None else x.cpu() for name, x in found.items()}


def check(family: str, case: Case, with_direction: bool = True, slack: float = 1.0) -> Results:
    """Holds the results of a family against the reference, and returns them."""
    found, expected = run(family, case, with_direction), run_reference(case, with_direction)
    value, first, second = TOLERANCE[case.problem.q.dtype]
    for name, error in errors(found, expected).items():
        limit = value if name == "out" else first if name[0] == "d" else second
        norm = float(expected[name].norm())
        # What cancels to nothing is measured against one.
        assert error * norm <= slack * limit * max(norm, 1e-3), f"{name}: {error:.2e}"
    assert all(bool(x.isfinite().all()) for x in present(found))
    return found


def present(found: Results) -> list[Tensor]:
    return [x for x in found.values() if x is not None]


SHAPES = [
    ([5, 3, 1, 7], 2, 6, (2, 1, 1, 1, 1)),
    ([3, 18], 1, 64, PUBLISHED),
    ([17, 32], 1, 32, (10, 5, 2, 5, 10)),
    ([2, 18], 1, 80, (25, 12, 5, 13, 25)),
    ([2, 18], 1, 128, (40, 20, 8, 20, 40)),
    ([9, 20], 2, 10, (3, 0, 4)),  # a degree without channels, and channels beyond the groups
    ([12, 4], 3, 8, (8, 0)),  # angles that nothing depends on
    ([33, 2], 2, 20, (20,)),
    ([21, 5], 1, 9, (4,)),
    ([100, 2], 1, 16, (9, 7)),  # more than one block of rows
    ([1, 1, 1], 1, 16, (5, 3, 1, 3, 4)),
]


@families
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_derivatives(family: str, shape: tuple) -> None:
    _, _, channels, widths = shape
    for dtype in PRECISIONS[family]:
        case = make_case(*shape, dtype=DOUBLE).to(dtype)
        check(family, case)
        if len(widths) > 1 and sum(widths) == channels:
            check(family, case.changed(angular_values=True))


@families
@pytest.mark.parametrize("use", ["all", "self", "node"])
def test_self_queries_and_half_types(family: str, use: str) -> None:
    widths = (64,) if use == "node" else PUBLISHED
    for dtype in (*PRECISIONS[family], *((BFLOAT, HALF) if family == "triton" else ())):
        check(family, make_case([3, 18], 1, 64, widths, dtype, use))


@pytest.mark.parametrize("family", [*FAMILIES[:1], *FAMILIES[2:]])
@pytest.mark.parametrize("dtype", [BFLOAT, HALF])
def test_half_types_are_summed_in_float32(family: str, dtype: torch.dtype) -> None:
    half = make_case([5, 30], 2, 8, (4, 4), dtype)
    found = run(family, half)
    for name, tensor in found.items():
        assert tensor.dtype == (SINGLE if name[1] in "bn" else dtype), name
    assert torch.equal(found["out"], run(family, half.to(SINGLE))["out"].to(dtype))
    assert max(errors(found, run_reference(half)).values()) < (3e-2 if dtype == BFLOAT else 3e-3)


@st.composite
def cases(draw: st.DrawFn, longest: int, heads: int) -> Case:
    """Ragged neighborhoods, groups of any width, channels beyond them; all tokens query, or self tokens alone."""
    sizes = draw(st.lists(st.integers(1, longest), min_size=1, max_size=4))
    widths = draw(st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(lambda w: w[0] > 0))
    use, number = draw(st.sampled_from(["all", "self"])), draw(st.integers(1, heads))
    used = tuple(widths[:1] if use == "self" else widths)
    angular_values = len(used) > 1 and draw(st.booleans())
    channels = sum(used) + (0 if angular_values else draw(st.integers(0, 5)))
    return make_case(sizes, number, channels, used, DOUBLE, use, draw(st.integers(0, 99)), angular_values)


@native
@given(cases(40, 3))
def test_any_shape(case: Case) -> None:
    check("native", case, slack=10.0)


@pytest.mark.skipif(UNUSABLE["triton"] is not None, reason=str(UNUSABLE["triton"]))
@given(cases(30, 2))
@settings(max_examples=2)
def test_any_shape_in_triton(case: Case) -> None:
    check("triton", case.to(SINGLE))


@families
def test_one_token_neighborhoods(family: str) -> None:
    """A softmax over one key is constant: all gradients but that of the value vanish."""
    case = make_case([1, 1, 1])
    found = run(family, case)
    torch.testing.assert_close(found["out"], case.problem.v)
    torch.testing.assert_close(found["dv"], case.grad_out)
    for name in ("dq", "dk", "db", "dn", "gq", "gk", "gv", "gb", "gn"):
        assert found[name].abs().max() < 1e-5, name


@families
def test_coincident_and_antiparallel_directions(family: str) -> None:
    case = make_case([7, 4], 2, 10, (2, 2, 2, 2, 2), BEST[family])
    n = case.problem.direction
    n[2], n[3], n[4], n[8] = n[1], -n[1], torch.tensor([0.0, 0.0, 1.0]), n[9]
    for angular_values in (False, True):
        check(family, case.changed(angular_values=angular_values))


@families
def test_removed_keys_are_as_if_absent(family: str) -> None:
    """Minus infinity, in a tile of its own too: zero at the key, the rest unchanged."""
    gone = torch.tensor([2, *range(4, 36), 40])  # among them the first tile of the second neighborhood
    for dtype in (*PRECISIONS[family], *((BFLOAT,) if family == "triton" else ())):
        case = without_keys(make_case([4, 40], widths=(8, 8), dtype=dtype), gone)
        found = run(family, case)
        assert all(bool(x.isfinite().all()) for x in present(found))
        for name in ("dk", "dv", "db", "gk", "gv", "gb"):
            # The interpreter's bfloat16 zero is 1e-38 at times.
            assert (found[name][gone].double().abs() < 1e-30).all(), name
        case.problem.k[gone], case.problem.v[gone] = 3.0, -2.0
        again = run(family, case)
        for name in ("out", "dq", "gG", "gq"):
            torch.testing.assert_close(again[name], found[name])
    check(family, without_keys(make_case([6, 10], 1, 6, (3, 3), BEST[family]), torch.tensor([2, 9, 10])))
    far = make_case([6, 10], 1, 6, (3, 3))
    check(family, far.changed(log_envelope=torch.where(far.problem.log_envelope < -1, -700.0, 0.0)))


@native
@pytest.mark.parametrize("widths", [(3, 2, 1, 1, 1), (8,)])
def test_very_long_neighborhood(widths: tuple[int, ...]) -> None:
    """Many blocks of rows. Removed keys do nothing: the other tokens must be as if alone."""
    total = 1500
    keep = torch.arange(total) % 25 == 0
    case = without_keys(make_case([total], 1, 8, widths, DOUBLE), ~keep)
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
    kept = {name: None if x is None else x[keep] for name, x in run("native", case).items()}
    assert max(errors(kept, run_reference(alone)).values()) < 1e-11
    for angular_values in (False, True):
        check("native", make_case([700], 1, 4, (2, 1, 1), DOUBLE, angular_values=angular_values), slack=10.0)


@families
@pytest.mark.parametrize("widths", [(4, 2), (6,)])
def test_without_log_envelope(family: str, widths: tuple[int, ...]) -> None:
    check(family, make_case([5, 30], 2, 6, widths, BEST[family], "node"))


@families
def test_directions_that_need_no_gradient(family: str) -> None:
    case = make_case([5, 30], 2, 6, (4, 2), BEST[family])
    wanted, without = run(family, case), check(family, case, with_direction=False)
    assert without["dn"] is None
    assert all(torch.equal(wanted[name], without[name]) for name in ("out", "dq", "dk", "dv", "db"))


@families
@pytest.mark.parametrize("widths", [(4, 2), (6,)])
def test_empty_neighborhoods_and_no_tokens(family: str, widths: tuple[int, ...]) -> None:
    filled, holes = (make_case(sizes, 2, 6, widths, BEST[family]) for sizes in ([5, 8], [0, 5, 0, 8, 0]))
    limit = 1e-12 if BEST[family] == DOUBLE else 1e-5
    assert max(errors(run(family, holes), run_reference(filled)).values()) < limit
    for sizes in ([0, 0], []):
        assert all(x.numel() == 0 for x in present(run(family, make_case(sizes, 2, 6, widths))))


@native
def test_keys_without_queries_have_zero_gradients() -> None:
    case = make_case([5, 8], 2, 6, (6,), DOUBLE)
    problem = replace(case.problem, q=case.problem.q[:5], query_offsets=torch.tensor([0, 5, 5]))
    found = run("native", Case(problem, case.grad_out[:5], case.tangents._replace(q=case.tangents.q[:5])))
    assert all((found[name][5:] == 0).all() for name in ("dk", "dv", "db", "gk", "gv", "gb"))


@native
@pytest.mark.parametrize("widths", [PUBLISHED, (64,)])
def test_same_bits_on_every_run_and_number_of_threads(widths: tuple[int, ...]) -> None:
    case = make_case([30, 1, 45, 12, 33, 140] * 3, 2, 64, widths)
    same_bits_on_threads(lambda: present(run("native", case)))


@families
def test_strided_inputs_which_stay_as_they_are(family: str) -> None:
    case = make_case([5, 9], 2, 8, (4, 4))
    plain = present(run(family, case))
    names = ("q", "k", "v", "log_envelope", "direction")
    strided = case.changed(**{x: getattr(case.problem, x).movedim(0, -1).contiguous().movedim(-1, 0) for x in names})
    assert not strided.problem.q.is_contiguous()
    inputs = [x for x in (*vars(strided.problem).values(), case.grad_out, *case.tangents) if isinstance(x, Tensor)]
    before = [x.clone() for x in inputs]
    for found in (run(family, strided), run(family, strided)):
        for a, b in zip(plain, present(found), strict=True):
            torch.testing.assert_close(
                a, b, rtol=0.0 if family != "blocked" else 1e-5, atol=1e-6 * (family == "blocked")
            )
    assert all(torch.equal(a, b) for a, b in zip(before, inputs, strict=True))


@native
@pytest.mark.bad_input
@pytest.mark.parametrize("offsets", [[0, 5, 3, 8], [1, 8], [0, 7], [0, 9]])
def test_wrong_offsets(offsets: list[int]) -> None:
    x, none = torch.zeros(8, 1, 2), torch.zeros(8, 3)
    with pytest.raises(ConfigError, match="offsets must start at 0, never fall, and end") as caught:
        neighborhood_attention(x, x, x, none[:, 0], none, torch.tensor(offsets), None, 1.0, "native")
    assert "\n" not in str(caught.value)


@native
@pytest.mark.parametrize("operator", ["value", "backward", "double_backward"])
def test_no_tensor_is_held_after_a_call(operator: str) -> None:
    x = make_case([5, 30], 3, 8, (4, 4)).problem
    offsets, constants = (x.query_offsets, x.key_offsets), (list(x.widths), x.scale, True)
    inputs = (x.q, x.k, x.v, x.log_envelope, x.direction)
    out, lse = OPERATORS["native"].value(*inputs, *offsets, *constants)
    arguments = {
        "value": (*inputs, *offsets, *constants),
        "backward": (out, *inputs, *offsets, out, lse, *constants, True),
        "double_backward": (*inputs, out, *inputs, *offsets, out, lse, *constants),
    }[operator]
    before = [y._use_count() for y in arguments if isinstance(y, Tensor)]
    results = getattr(OPERATORS["native"], operator)(*arguments)
    assert [y._use_count() for y in arguments if isinstance(y, Tensor)] == before
    assert all(y._use_count() == 1 for y in results)
