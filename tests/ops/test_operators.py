"""Operators registered as kernels in C++ do what the functions in Python do that they stand for."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from escaip.ops import operator, rows, spline
from escaip.ops import steinhardt as orientation
from escaip.ops.native import build, operators
from escaip.ops.native.operators import register_operators

OFFSETS = torch.tensor([0, 3, 3, 9, 14])
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 2e-2}


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    if build.availability() is not None:
        pytest.skip(f"attention backend 'native' {build.availability()}")
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < operators._TRIED:
        assert not register_operators("float")
        pytest.skip(f"this torch, {torch.__version__}, is too old for kernels of the dispatcher")
    assert register_operators("float")
    assert register_operators("double")


def attention_inputs(dtype: torch.dtype, groups: int) -> list[Any]:
    generator = torch.Generator().manual_seed(1)
    packed = torch.randn(14, 3, 2, 9, dtype=dtype, generator=generator)  # q, k and v are strided views of it
    geometry = torch.float64 if dtype == torch.float64 else torch.float32
    direction = torch.nn.functional.normalize(torch.randn(14, 3, dtype=geometry, generator=generator), dim=1)
    direction[OFFSETS[:-1][OFFSETS.diff() > 0]] = 0.0
    envelope = -torch.rand(14, dtype=geometry, generator=generator)
    widths = [9] if groups == 1 else [4, 3, 2]
    angles = None if groups == 1 else direction
    return [*packed.unbind(1), envelope if groups > 1 else None, angles, OFFSETS, OFFSETS, widths, 0.4, "native"]


def backward_inputs(dtype: torch.dtype, groups: int, with_direction: bool = True) -> list[Any]:
    inputs = attention_inputs(dtype, groups)
    out, lse = operator._attend(*inputs)
    gradient = torch.randn(out.shape, dtype=dtype, generator=torch.Generator().manual_seed(2))
    return [gradient, *inputs[:7], out, lse, *inputs[7:], with_direction and groups > 1]


def spline_inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    table = torch.randn(5, 20, dtype=dtype, generator=generator).repeat(4, 1)
    point = torch.linspace(0.0, 15.0, 40, dtype=dtype)[::2]
    return table[::2], point, torch.randn(20, 20, dtype=dtype, generator=generator).T


def cases(dtype: torch.dtype) -> dict[str, tuple[Callable[..., Any], Callable[..., Any], list[Any]]]:
    """Name to what is called, what it stands for, and arguments."""
    ops = torch.ops.escaip
    table, point, cotangent = spline_inputs(dtype)
    generator = torch.Generator().manual_seed(4)
    found: dict[str, tuple[Callable[..., Any], Callable[..., Any], list[Any]]] = {}
    index = torch.randint(0, 6, (400,), generator=generator)
    for width in (1, 3, 200):  # the last is divided between threads
        x = torch.randn(width, 400, dtype=dtype, generator=generator).T
        found[f"sum_rows {width}"] = (ops.sum_rows, rows._index_add, [x, index, 7])
    found["sum_rows of numbers"] = (ops.sum_rows, rows._index_add, [x[:, 0].contiguous(), index, 7])
    found["sum_rows of nothing"] = (ops.sum_rows, rows._index_add, [x[:0], index[:0], 0])
    found["spline_values"] = (ops.spline_values, spline.spline_values._init_fn, [table, point, 1])
    found["spline_products"] = (ops.spline_products, spline.spline_products._init_fn, [cotangent, table, point, 0])
    if dtype != torch.bfloat16:
        *_, direction, offsets, _, _, _, _ = attention_inputs(dtype, 3)
        weight = torch.rand(14, dtype=dtype, generator=generator)
        value = (direction, weight, offsets, 4)
        gradient = torch.randn(4, 5, dtype=dtype, generator=generator)
        found["orientation"] = (ops.orientation, orientation.orientation_value._init_fn, list(value))
        backward = orientation.orientation_backward._init_fn
        found["orientation_backward"] = (ops.orientation_backward, backward, [gradient, *value[:3]])
    for groups in (1, 3):
        found[f"attention {groups}"] = (ops.attention, operator._attend, attention_inputs(dtype, groups))
        for angles in (False, True):
            arguments = backward_inputs(dtype, groups, angles)
            name = f"attention_backward {groups} {angles}"
            found[name] = (ops.attention_backward, operator._attend_backward, arguments)
    return found


def as_tuple(x: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return x if isinstance(x, tuple) else (x,)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("name", list(cases(torch.float32)))
def test_kernels_do_what_python_does(name: str, dtype: torch.dtype) -> None:
    known = cases(dtype)
    if name not in known:
        pytest.skip("the geometry is never of a half type")
    called, stands_for, arguments = known[name]
    before = [x.clone() for x in arguments if isinstance(x, Tensor)]
    found, expected = as_tuple(called(*arguments)), as_tuple(stands_for(*arguments))
    # Sums of half types are made in single precision, which Python's are not all.
    precise = [x.float() if isinstance(x, Tensor) and x.dtype == torch.bfloat16 else x for x in arguments]
    for x, y, exact in zip(found, expected, as_tuple(stands_for(*precise)), strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        assert x.is_contiguous()
        torch.testing.assert_close(x, exact.to(x.dtype), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    for x, y in zip((x for x in arguments if isinstance(x, Tensor)), before, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("name", list(cases(torch.float32)))
def test_kernels_hold_no_tensor_after_a_call(name: str) -> None:
    called, _, arguments = cases(torch.float32)[name]

    def owners() -> list[int]:
        return [x._use_count() for x in arguments if isinstance(x, Tensor)]

    before = owners()
    results = as_tuple(called(*arguments))
    assert owners() == before
    assert all(x._use_count() == 1 for x in results)


@pytest.mark.parametrize("groups", [1, 3])
def test_other_families_are_served_as_before(groups: int) -> None:
    native, other = attention_inputs(torch.float64, groups), attention_inputs(torch.float64, groups)
    other[-1] = "blocked"
    for x, y in zip(torch.ops.escaip.attention(*other), operator._attend(*native), strict=True):
        torch.testing.assert_close(x, y)
    arguments = backward_inputs(torch.float64, groups)
    expected = operator._attend_backward(*arguments)
    arguments[-2] = "blocked"
    for x, y in zip(torch.ops.escaip.attention_backward(*arguments), expected, strict=True):
        torch.testing.assert_close(x, y)


def test_what_has_no_kernels_yet_is_served_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    none = (ctypes.c_void_p * len(operators._CALLED))()
    operators.library("float", "operators").escaip_serve_double(ctypes.byref(none))
    try:
        for called, stands_for, arguments in cases(torch.float64).values():
            for x, y in zip(as_tuple(called(*arguments)), as_tuple(stands_for(*arguments)), strict=True):
                torch.testing.assert_close(x, y)
    finally:
        register_operators.cache_clear()
        assert register_operators("double")


def test_nothing_is_compiled_where_that_is_not_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "is_kept", lambda *_: False)
    register_operators.cache_clear()
    try:
        assert not register_operators("float", False)
    finally:
        register_operators.cache_clear()


def test_what_is_wrong_is_said_as_before() -> None:
    inputs = attention_inputs(torch.float32, 3)
    inputs[5] = inputs[6] = torch.tensor([0, 3, 2, 9, 14])
    with pytest.raises(Exception, match="offsets must start at 0, never fall"):
        torch.ops.escaip.attention(*inputs)


def test_sums_have_the_same_bits_on_any_number_of_threads() -> None:
    x, index = torch.randn(2000, 96), torch.randint(0, 50, (2000,))
    threads = torch.get_num_threads()
    found = []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            found.append(torch.ops.escaip.sum_rows(x, index, 50))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in itertools.pairwise(found))


def test_derivatives_pass_through() -> None:
    q, k, v, envelope, direction, *rest = attention_inputs(torch.float64, 3)
    is_bond = direction.any(dim=1, keepdim=True)
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v, envelope, direction + ~is_bond)]

    def value(*tensors: Tensor) -> Tensor:
        unit = torch.nn.functional.normalize(tensors[4], dim=1)
        return torch.ops.escaip.attention(*tensors[:4], unit * is_bond, *rest)[0]

    assert torch.autograd.gradcheck(value, leaves)
