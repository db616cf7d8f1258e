"""The Triton kernels against the specification in float64: value, first and second derivative.

Without a GPU they run in Triton's interpreter, on CPU tensors; that they compile to GPU code is a test of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

triton = pytest.importorskip("triton")

from family_cases import Case, Results, errors, make_case, run_family, run_reference, without_keys  # noqa: E402

from escaip.ops import triton as triton_family  # noqa: E402
from escaip.ops.triton import launch  # noqa: E402
from escaip.ops.triton.common import cut  # noqa: E402

PUBLISHED = (20, 10, 4, 10, 20)
# float32: accumulated rounding. Half types: every computed operand of a matrix product and every result is rounded,
# by 2^-9 in bfloat16 and 2^-12 in float16. Second derivatives chain twice as many of those as first ones and take
# D from the rounded output, which weighs where E − D is small.
TOLERANCE = {torch.float32: (1e-5, 1e-5, 1e-5), torch.bfloat16: (4e-3, 6e-3, 1e-2), torch.float16: (5e-4, 1e-3, 3e-3)}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # the interpreter takes tensors of the CPU
KERNELS = (
    launch.forward_rows, launch.backward_rows, launch.backward_columns, launch.double_backward_rows,
    launch.double_backward_columns,
)  # fmt: skip


def run_kernels(case: Case, with_direction: bool = True) -> Results:
    """What the kernels make of a case, on the CPU."""
    found = run_family("triton", case.on(DEVICE), with_direction)
    return {name: None if x is None else x.cpu() for name, x in found.items()}


def check(case: Case, with_direction: bool = True) -> None:
    found, expected = run_kernels(case, with_direction), run_reference(case, with_direction)
    value, first, second = TOLERANCE[case.problem.q.dtype]
    for name, error in errors(found, expected).items():
        limit = value if name == "out" else first if name[0] == "d" else second
        assert error < limit, f"{name}: {error:.2e}"
    for name, x in found.items():
        assert x is None or torch.isfinite(x).all(), name


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("use", ["all", "self", "node"])
def test_published_channels(dtype: torch.dtype, use: str) -> None:
    widths = (64,) if use == "node" else PUBLISHED
    check(make_case([3, 18], d=64, widths=widths, dtype=dtype, use=use))


@pytest.mark.parametrize(
    ("d", "widths"),
    [
        (16, (5, 3, 1, 3, 4)),
        (32, (10, 5, 2, 5, 10)),
        (80, (25, 12, 5, 13, 25)),
        (128, (40, 20, 8, 20, 40)),
        (16, (4, 0, 12)),  # an empty group
        (16, (16, 0, 0)),  # angles that nothing depends on
        (24, (4, 5, 3)),  # channels that take no part
        (12, (2, 10)),
    ],
)
def test_head_sizes(d: int, widths: tuple[int, ...]) -> None:
    check(make_case([2, 18], d=d, widths=widths))


@pytest.mark.parametrize("d", [16, 48, 80])
def test_no_angles(d: int) -> None:
    check(make_case([3, 18], heads=2, d=d, widths=(d,)))


def test_long_neighborhood_and_many_tiles() -> None:
    check(make_case([100, 2], widths=(9, 7)))


def test_systems_of_very_different_sizes_some_empty() -> None:
    check(make_case([0, 70, 0, 1, 16, 0], widths=(16,), use="node"))


def test_without_gradient_of_the_direction() -> None:
    check(make_case([4, 18], heads=2, widths=(9, 7)), with_direction=False)


@given(
    sizes=st.lists(st.integers(1, 36), min_size=1, max_size=3),
    heads=st.integers(1, 2),
    widths=st.lists(st.integers(0, 9), min_size=1, max_size=4),
    use=st.sampled_from(["all", "self", "node"]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=6)
def test_any_shape(sizes: list[int], heads: int, widths: list[int], use: str, seed: int) -> None:
    groups = (widths[0] + 1, *widths[1:]) if use != "node" else (16,)
    check(make_case(sizes, heads, sum(groups), groups, use=use, seed=seed))


def test_one_token_neighborhoods() -> None:
    """A softmax over one key is constant: all gradients but that of the value vanish."""
    case = make_case([1, 1, 1])
    found = run_kernels(case)
    torch.testing.assert_close(found["out"], case.problem.v)
    torch.testing.assert_close(found["dv"], case.grad_out)
    for name in ("dq", "dk", "db", "dn", "gq", "gk", "gv", "gb", "gn"):
        assert found[name].abs().max() < 1e-5, name


def test_coincident_and_antiparallel_directions() -> None:
    case = make_case([6, 5])
    n = case.problem.direction
    n[2], n[3], n[7:] = n[1], -n[1], n[7]
    check(case)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_removed_key_is_as_if_absent(dtype: torch.dtype) -> None:
    """Minus infinity in a tile of its own too: finite numbers everywhere, zero at the key, the rest unchanged."""
    case = make_case([4, 40], widths=(8, 8), dtype=dtype)
    gone = torch.tensor([2, *range(4, 36), 40])  # among them the first tile of the second neighborhood
    case = without_keys(case, gone)
    found = run_kernels(case)
    assert all(x is None or torch.isfinite(x).all() for x in found.values())
    for name in ("dk", "dv", "db", "gk", "gv", "gb"):
        # The interpreter's bfloat16 zero is 1e-38 at times.
        assert (found[name][gone].double().abs() < 1e-30).all(), name
    case.problem.k[gone], case.problem.v[gone] = 3.0, -2.0
    again = run_kernels(case)
    for name in ("out", "dq", "gG", "gq"):
        torch.testing.assert_close(again[name], found[name])


def test_a_constant_added_to_the_bias_tangent_changes_nothing() -> None:
    """Softmax does not see it, and no digits are lost to it."""
    case = make_case([20], d=32, widths=(16, 16), dtype=torch.bfloat16)
    plain = run_kernels(case)
    tangents = case.tangents._replace(log_envelope=case.tangents.log_envelope + 64.0)
    shifted = run_kernels(replace(case, tangents=tangents))
    for name in ("gG", "gq", "gv"):
        error = (shifted[name] - plain[name]).float().norm() / plain[name].float().norm()
        assert error < 5e-3, name


def test_usable_in_the_interpreter() -> None:
    assert triton_family.availability() is None


def test_nothing_to_do() -> None:
    case = make_case([])
    found = run_kernels(case)
    assert found["out"].shape == (0, 1, 16)
    assert found["gn"].shape == (0, 3)


def test_same_bits_twice_and_inputs_untouched() -> None:
    case = make_case([7, 33], widths=(8, 8))
    given = (*vars(case.problem).values(), case.grad_out, *case.tangents)
    inputs = [x for x in given if isinstance(x, torch.Tensor)]
    before = [x.clone() for x in inputs]
    first, second = run_kernels(case), run_kernels(case)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))


def test_strided_inputs() -> None:
    case = make_case([5, 9], heads=2, widths=(8, 8))
    problem, tangents = case.problem, case.tangents
    whole = torch.stack([problem.q, problem.k, problem.v], 2)
    q, k, v = whole.unbind(2)
    grad = case.grad_out.transpose(0, 2).contiguous().transpose(0, 2)
    assert not any(x.is_contiguous() for x in (q, k, v, grad))
    strided = Case(replace(problem, q=q, k=k, v=v), grad, tangents._replace(q=grad, k=grad, v=grad))
    plain = replace(case, tangents=tangents._replace(q=case.grad_out, k=case.grad_out, v=case.grad_out))
    found, expected = run_kernels(strided), run_kernels(plain)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_lse() -> None:
    case = make_case([6], widths=(16,))
    x = case.on(DEVICE).problem
    lse = launch.forward(x).lse
    logits = x.scale * torch.einsum("jhd,khd->jkh", x.q, x.k) + x.log_envelope[None, :, None]
    torch.testing.assert_close(lse, logits.logsumexp(1))


@pytest.mark.parametrize(("own", "other"), [(16, 32), (32, 16), (64, 64)])
def test_any_tile_gives_the_same(own: int, other: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for kernel in KERNELS:
        monkeypatch.setattr(kernel, "configs", [triton.Config({"OWN": own, "OTHER": other})])
    check(make_case([21, 3, 40], widths=(8, 0, 8)))
    check(make_case([21, 0, 40], widths=(16,), use="node"))
    check(make_case([0, 5, 16, 17, 0, 33, 1, 0], widths=(16,), use="node"))


COMPILE = """
import attention_compile as tool
for case in [(90, "tf32x3", 64, "angles"), (80, "bfloat16", 16, "envelope"), (90, "float16", 16, "node", 300)]:
    records = tool.compile_all(*case, most=1)
    assert len(records) == 5
    for record in records:
        assert record.spilled <= 256, record
        assert record.shared <= 99 * 1024, record  # of a consumer GPU
"""
CHOOSE = """
from unittest import mock
import attention_compile as tool
import torch
from escaip.ops.inputs import AttentionInputs
from escaip.ops.triton import launch

def forward(sizes):
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    q = torch.zeros(int(offsets[-1]), 2, 16)
    launch.forward(AttentionInputs(q, q, q, q[:, 0, 0], None, offsets, offsets, (16,), 1.0))

def bench(call, quantiles):
    call()
    tile = kernel.fn.run.call_args.kwargs
    timed.append(tile["OWN"])
    return [1.0 if tile["num_warps"] == 8 else 2.0] * 3

kernel, timed = launch.forward_rows, []
tool.driver.set_active(tool.NamedDriver(tool.GPUTarget("cuda", 90, 32)))
with mock.patch.object(kernel.fn, "run"), mock.patch.object(kernel, "_do_bench", bench):
    for sizes, expected in [([20, 24], True), ([25, 25, 28], False), ([60], True), ([18], False)]:
        timed.clear()
        forward(sizes)
        assert bool(timed) == expected, sizes
        assert kernel.fn.run.call_args.kwargs["num_warps"] == 8
    kernel.cache.clear()
    forward([20, 24])
    assert not timed, "the choice is kept on disk"
"""


@pytest.mark.parametrize("script", [pytest.param(COMPILE, marks=pytest.mark.slow), CHOOSE], ids=["compile", "choose"])
def test_for_gpus_without_one(script: str, tmp_path: Path) -> None:
    """The kernels compile for compute capability 8.0 and 9.0; Triton times tiles once for each class of sizes."""
    benchmarks = Path(__file__).parents[2] / "benchmarks"
    if not (benchmarks / "attention_compile.py").exists():
        pytest.skip("needs a checkout")
    # A process of its own: here the kernels are the interpreter's.
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environment, cwd=benchmarks, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_chunks_cover_the_channels() -> None:
    groups = ((0, 20, 32, 0), (20, 10, 16, 1), (30, 4, 16, 2), (34, 10, 16, 3), (44, 20, 32, 4))
    assert cut(PUBLISHED) == groups
    assert cut((80,)) == ((0, 64, 64, 0), (64, 16, 32, 0))
    assert cut((200, 0, 3)) == ((0, 128, 128, 0), (128, 64, 64, 0), (192, 8, 16, 0), (200, 3, 32, 2))
