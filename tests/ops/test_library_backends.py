"""Backends that call attention of a library on expanded channels: against the reference, once differentiated."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import itertools
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import attention_cases
import pytest
import torch
from torch import Tensor

from escaip.errors import ConfigError
from escaip.ops import library as library_backends
from escaip.ops.library import sdpa_attention, xformers_attention
from escaip.ops.reference import reference_attention

CHANNELS = [None, (2, 2, 1, 1, 2), (5, 3), (3, 0, 5), (8,)]
SIZES = [[3, 1, 5, 2], [4, 4], [1, 1, 17]]
WIDTH = 8

Attention = Callable[..., Tensor]


def make_inputs(
    sizes: list[int], dtype: torch.dtype = torch.float64, seed: int = 0, heads: int = 2
) -> dict[str, Tensor]:
    """Inputs with q, k and v in ``dtype`` and the geometry in what sums are in."""
    inputs = attention_cases.make_inputs(sizes, heads, WIDTH, seed)
    geometry = torch.float64 if dtype == torch.float64 else torch.float32
    types = {**dict.fromkeys("qkv", dtype), "log_envelope": geometry, "direction": geometry}
    return {name: x.to(types.get(name, x.dtype)) for name, x in inputs.items()}


class StandInMask:
    """What we use of xformers' mask of the same name."""

    def __init__(self, q_sizes: list[int], k_sizes: list[int]) -> None:
        self.q_sizes, self.k_sizes = q_sizes, k_sizes

    @classmethod
    def from_seqlens(
        cls, q_seqlen: list[int], kv_seqlen: list[int] | None = None, *, device: torch.device | None = None
    ) -> StandInMask:
        kv_seqlen = q_seqlen if kv_seqlen is None else kv_seqlen
        assert len(q_seqlen) == len(kv_seqlen)
        assert all(type(size) is int and size > 0 for size in (*q_seqlen, *kv_seqlen))
        return cls(q_seqlen, kv_seqlen)

    def materialize(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        blocks = [torch.zeros(rows, columns, dtype=dtype) for rows, columns in zip(self.q_sizes, self.k_sizes)]
        same = torch.block_diag(*[block + 1 for block in blocks]) == 1
        assert same.shape == shape
        return torch.zeros(shape, dtype=dtype).masked_fill(~same, -math.inf)


def stand_in_kernel(calls: list[dict[str, Any]]) -> Callable[..., Tensor]:
    def memory_efficient_attention(
        query: Tensor, key: Tensor, value: Tensor, attn_bias: Any = None, p: float = 0.0, scale: float | None = None,
        *, op: Any = None, output_dtype: torch.dtype | None = None,
    ) -> Tensor:  # fmt: skip
        """``(1, M, H, K)``, as the CUTLASS kernel demands it, in plain PyTorch, sums in float32."""
        assert query.ndim == key.ndim == value.ndim == 4
        assert query.shape[0] == key.shape[0] == value.shape[0] == 1
        assert query.shape[-1] == key.shape[-1]
        assert key.shape[1] == value.shape[1]
        for x in (query, key, value):
            assert x.dtype == query.dtype
            assert x.stride(-1) == 1
            assert x.shape[-1] % 8 == x.stride(1) % 8 == x.stride(2) % 8 == x.storage_offset() % 8 == 0
            assert x.isfinite().all()
        assert p == 0.0
        assert scale is not None
        calls.append({"attn_bias": attn_bias, "op": op, "widths": (query.shape[-1], value.shape[-1])})
        sums = torch.float64 if query.dtype == torch.float64 else torch.float32
        q, k, v = (x[0].transpose(0, 1).to(sums) for x in (query, key, value))
        logits = scale * (q @ k.mT) + attn_bias.materialize((query.shape[1], key.shape[1]), dtype=sums)
        return (torch.softmax(logits, -1) @ v).transpose(0, 1).unsqueeze(0).to(query.dtype)

    return memory_efficient_attention


def stand_in_library(calls: list[dict[str, Any]]) -> SimpleNamespace:
    return SimpleNamespace(
        memory_efficient_attention=stand_in_kernel(calls),
        BlockDiagonalMask=StandInMask,
        MemoryEfficientAttentionCutlassOp=("forward", "backward"),
    )


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the kernel is called with."""
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(library_backends, "_library", lambda: stand_in_library(calls))
    return calls


@pytest.fixture(params=["sdpa", "xformers"])
def attention(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Attention:
    if request.param == "sdpa":
        return sdpa_attention
    monkeypatch.setattr(library_backends, "_library", lambda: stand_in_library([]))
    return xformers_attention


def gradients(function: Attention, inputs: dict[str, Tensor], weight: Tensor, **arguments: Any) -> tuple[Tensor, ...]:
    """The result, and gradients of q, k, v, log envelope and of the bonds whose directions enter.

    Functions continue differently off the sphere, which normalised bonds do not see.
    """
    leaves = [inputs[name].detach().clone().requires_grad_() for name in attention_cases.LEAVES]
    bonds = leaves[4].any(-1, keepdim=True)
    direction = torch.where(bonds, leaves[4] / leaves[4].norm(dim=-1, keepdim=True).where(bonds, 1.0), 0.0)
    out = function(*leaves[:4], direction, inputs["offsets"], **arguments)
    found = attention_cases.gradients((out * weight).sum(), leaves)
    assert all(gradient.dtype == leaf.dtype for leaf, gradient in zip(leaves, found, strict=True))
    return out.detach(), *found


# Against the reference of the rounded tokens: half types lose the rounding of expanded channels and results.
LIMITS = {
    "cpu": {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 0.02, torch.float16: 0.003},
    "cuda": {torch.float64: 1e-11, torch.float32: 1e-4, torch.bfloat16: 0.03, torch.float16: 0.005},
}


def check(
    function: Attention, sizes: list[int], dtype: torch.dtype, device: str = "cpu", removed: tuple[int, ...] = ()
) -> None:
    """Value and gradients of all queries and of self tokens alone, for every form of channels."""
    for channels, self_queries_only in itertools.product(CHANNELS, (False, True)):
        inputs = make_inputs(sizes, dtype)
        inputs["log_envelope"][list(removed)] = -math.inf
        if self_queries_only:
            inputs["q"] = inputs["q"][inputs["offsets"][:-1]]
        weight = torch.randn_like(inputs["q"])
        arguments = {"angular_channels": channels, "scale": 0.37, "self_queries_only": self_queries_only}
        precise = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
        expected = gradients(reference_attention, precise, weight.double(), **arguments)
        found = gradients(function, {n: x.to(device) for n, x in inputs.items()}, weight.to(device), **arguments)
        for value, exact in zip(found, expected, strict=True):
            error = float((value.double().cpu() - exact).norm())
            assert error <= LIMITS[device][dtype] * max(float(exact.norm()), 1.0), (channels, self_queries_only)


@pytest.mark.parametrize("dtype", LIMITS["cpu"])
@pytest.mark.parametrize("sizes", SIZES)
def test_value_and_first_derivative(attention: Attention, sizes: list[int], dtype: torch.dtype) -> None:
    check(attention, sizes, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels", [None, (5, 3)])
@pytest.mark.parametrize(("sizes", "removed"), [([5, 2], -math.inf), ([4, 4], -math.inf), ([5, 2], -1e9)])
def test_removed_keys_have_no_influence(
    attention: Attention, sizes: list[int], removed: float, channels: tuple[int, ...] | None, dtype: torch.dtype
) -> None:
    inputs = make_inputs(sizes, dtype)
    inputs["log_envelope"][2] = removed
    weight = torch.randn_like(inputs["q"])
    arguments = {"angular_channels": channels, "scale": 0.37}
    found = gradients(attention, inputs, weight, **arguments)
    assert all(x.isfinite().all() for x in found)
    for name, gradient in zip(("k", "v", "log_envelope"), found[2:5]):
        assert (gradient[2] == 0).all(), name
    changed = {**inputs, "k": inputs["k"].clone(), "v": inputs["v"].clone()}
    changed["k"][2] += 5.0
    changed["v"][2] -= 5.0
    others = [0, 1, 3, 4, 5, 6]  # its own row as query stays, too, but it is not asked for anywhere
    assert torch.equal(gradients(attention, changed, weight, **arguments)[0][others], found[0][others])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [0.125, 0.37, 3.0])
@pytest.mark.parametrize("shift", [0.0, -4000.0])
def test_key_bias_is_not_rounded_to_half_precision(
    attention: Attention, shift: float, scale: float, dtype: torch.dtype
) -> None:
    """A bias of −7.3 in bfloat16 would be off by up to 0.016, and the weight with it."""
    inputs = make_inputs([8], dtype)
    inputs["q"].zero_()
    inputs["log_envelope"] = shift - torch.tensor([0.0, 7.31, 6.83, 5.571, 7.93, 4.107, 7.777, 6.1])
    inputs["v"] = torch.eye(8, dtype=dtype).unsqueeze(1).expand(-1, 2, -1).contiguous()
    out = attention(**inputs, angular_channels=(5, 3), scale=scale)
    expected = torch.softmax(inputs["log_envelope"].double(), 0).expand(8, 2, -1)
    relative = ((out.double() - expected) / expected).abs().max()
    assert relative <= torch.finfo(dtype).eps  # rounding of weights or results, no more


@pytest.mark.parametrize("input_name", ["q", "k", "v", "log_envelope", "direction"])
@pytest.mark.parametrize("channels", [None, (5, 3)])
def test_second_derivative_is_refused(attention: Attention, channels: tuple[int, ...] | None, input_name: str) -> None:
    """Whichever input it goes through; creating the graph of the first is no error yet."""
    if channels is None and input_name == "direction":
        pytest.skip("without angles nothing depends on directions")
    inputs = make_inputs([4, 2])
    leaf = inputs[input_name].requires_grad_()
    weight = torch.ones_like(inputs["q"], requires_grad=True)
    out = attention(**inputs, angular_channels=channels, scale=0.5)
    (first,) = torch.autograd.grad((out * weight).square().sum(), leaf, create_graph=True)
    again = attention(**inputs, angular_channels=channels, scale=0.5)
    torch.testing.assert_close(first, torch.autograd.grad((again * weight).square().sum(), leaf)[0])
    for target in (leaf, weight):
        with pytest.raises(ConfigError, match=r"has one derivative, and a second.*reference"):
            torch.autograd.grad(first.square().sum(), target, retain_graph=True)


@pytest.mark.parametrize("channels", [None, (2, 2, 1, 1, 2)])
def test_xformers_is_called_as_it_demands(calls: list[dict[str, Any]], channels: tuple[int, ...] | None) -> None:
    inputs = make_inputs([3, 1, 5])
    found = xformers_attention(**inputs, angular_channels=channels, scale=0.37)
    torch.testing.assert_close(found, reference_attention(**inputs, angular_channels=channels, scale=0.37))
    rows = {**inputs, "q": inputs["q"][inputs["offsets"][:-1]]}
    few = xformers_attention(**rows, angular_channels=channels, scale=0.37, self_queries_only=True)
    torch.testing.assert_close(few, found[inputs["offsets"][:-1]])
    assert len(calls) == 2
    assert calls[0]["widths"] == ((16 if channels is None else 40), 8)
    assert all(len(call["op"]) == 2 for call in calls)


def test_xformers_takes_any_number_of_neighborhoods(
    calls: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library_backends, "MAX_SEQUENCES", 3)
    inputs = make_inputs([2, 1, 4, 3, 1, 2, 5])
    arguments = {"angular_channels": (5, 3), "scale": 0.37}
    expected = reference_attention(**inputs, **arguments)
    torch.testing.assert_close(xformers_attention(**inputs, **arguments), expected)
    assert len(calls) == 3
    first = inputs["offsets"][:-1]
    rows = {**inputs, "q": inputs["q"][first]}
    torch.testing.assert_close(xformers_attention(**rows, **arguments, self_queries_only=True), expected[first])


@pytest.mark.parametrize("head_size", [6, 8])
def test_values_of_any_stride_and_width(attention: Attention, head_size: int) -> None:
    """Head size no multiple of eight, values a slice of a larger tensor."""
    inputs = make_inputs([3, 5])
    inputs = {name: x[..., :head_size] if name in "qk" else x for name, x in inputs.items()}
    inputs["v"] = torch.cat([inputs["v"], inputs["v"]], -1)[..., 3 : 3 + head_size]
    arguments = {"angular_channels": (4, head_size - 4), "scale": 0.37}
    torch.testing.assert_close(attention(**inputs, **arguments), reference_attention(**inputs, **arguments))


def test_sdpa_takes_the_flash_kernel_where_widths_are_equal() -> None:
    """On the CPU it serves attention without angles, bias and padding included; only it is allowed here."""
    inputs = {name: x.requires_grad_(x.is_floating_point()) for name, x in make_inputs([3, 5]).items()}
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        found = sdpa_attention(**inputs, angular_channels=None, scale=0.37)
    torch.testing.assert_close(found, reference_attention(**inputs, angular_channels=None, scale=0.37))


def test_availability(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install 'escaip[cuda]'" in str(library_backends.xformers_unusable())
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "needs a CUDA device" in str(library_backends.xformers_unusable())


CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.skipif(library_backends.xformers_unusable() is not None, reason=str(library_backends.xformers_unusable()))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_xformers_on_cuda(dtype: torch.dtype) -> None:
    check(xformers_attention, [9, 1, 33, 70], dtype, "cuda", (5,))


@CUDA
@pytest.mark.parametrize("efficient", [False, True])
@pytest.mark.parametrize("dtype", LIMITS["cuda"])
def test_sdpa_on_cuda(dtype: torch.dtype, efficient: bool) -> None:
    """With angles it takes the memory-efficient kernel, which knows no float64."""
    if efficient and dtype == torch.float64:
        pytest.skip("no such kernel")
    kernel = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.EFFICIENT_ATTENTION)
    with kernel if efficient else contextlib.nullcontext():
        check(sdpa_attention, [9, 1, 33, 70], dtype, "cuda", (5,))
