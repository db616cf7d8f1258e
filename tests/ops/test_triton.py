"""The Triton kernels beside their family's contract: tiles, code for GPUs without one, and training."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import ase.build
import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")

from attention_cases import make_case  # noqa: E402
from test_families import DEVICE, PUBLISHED, check, run  # noqa: E402
from tiny import batch_of, make_potential  # noqa: E402

from escaip.ops import triton as triton_family  # noqa: E402
from escaip.ops.outer import _sum_outer, sum_outer  # noqa: E402
from escaip.ops.triton import launch  # noqa: E402
from escaip.ops.triton.common import cut  # noqa: E402

KERNELS = (
    launch.forward_rows, launch.backward_rows, launch.backward_columns, launch.double_backward_rows,
    launch.double_backward_columns,
)  # fmt: skip


def test_usable_in_the_interpreter() -> None:
    assert triton_family.availability() is None


def test_a_constant_added_to_the_bias_tangent_changes_nothing() -> None:
    """Softmax does not see it, and no digits are lost to it."""
    case = make_case([20], d=32, widths=(16, 16), dtype=torch.bfloat16)
    plain = run("triton", case)
    tangents = case.tangents._replace(log_envelope=case.tangents.log_envelope + 64.0)
    shifted = run("triton", replace(case, tangents=tangents))
    for name in ("gG", "gq", "gv"):
        error = (shifted[name] - plain[name]).float().norm() / plain[name].float().norm()
        assert error < 5e-3, name


def test_lse() -> None:
    case = make_case([6], widths=(16,))
    x = case.on(DEVICE).problem
    lse = launch.forward(x).lse
    logits = x.scale * torch.einsum("jhd,khd->jkh", x.q, x.k) + x.log_envelope[None, :, None]
    torch.testing.assert_close(lse, logits.logsumexp(1))


@pytest.mark.parametrize(("own", "other"), [(16, 32), (64, 16)])
def test_any_tile_gives_the_same(own: int, other: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for kernel in KERNELS:
        monkeypatch.setattr(kernel, "configs", [triton.Config({"OWN": own, "OTHER": other})])
    check("triton", make_case([21, 3, 40], widths=(8, 0, 8)))
    check("triton", make_case([21, 0, 40], widths=(16,), use="node"))
    check("triton", make_case([0, 5, 16, 17, 0, 33, 1, 0], widths=(16,), use="node"))


COMPILE = """
import attention_compile as tool
for case in [(90, "tf32x3", 64, "angles"), (90, "bfloat16", 64, "values"), (80, "bfloat16", 16, "node", 300)]:
    records = tool.compile_all(*case, most=1)
    assert len(records) == 5
    for record in records:
        assert record.spilled <= 256, record
        assert record.shared <= 99 * 1024, record  # of a consumer GPU
for record in tool.compile_outer(90, "tf32x3", 16, 25):
    assert record.spilled == 0, record
    assert record.shared <= 99 * 1024, record
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


@pytest.mark.parametrize(("channels", "others"), [(1, 25), (16, 16), (18, 9), (3, 100)])
def test_sums_of_outer_products_and_their_two_derivatives(channels: int, others: int) -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = torch.tensor([5, 1, 0, 70, 32])
    center, offsets = torch.repeat_interleave(sizes).to(DEVICE), torch.tensor([0, *sizes]).cumsum(0).to(DEVICE)
    x, y, *cotangents = (
        torch.randn(shape, generator=generator).to(DEVICE)
        for shape in ((108, channels), (108, others), (5, channels, others), (108, channels), (108, others))
    )

    def derivatives(function: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        a, b, grad, to_a, to_b = (one.to(dtype).requires_grad_() for one in (x, y, *cotangents))
        found = function(a, b)
        first = torch.autograd.grad(found, [a, b], grad, create_graph=True)
        return [found, *first, *torch.autograd.grad(first, [a, b, grad], [to_a, to_b])]

    plain = derivatives(lambda a, b: sum_outer(a, b, center, 5), torch.float64)
    for found, expected in zip(derivatives(lambda a, b: _sum_outer(a, b, offsets), torch.float32), plain, strict=True):
        torch.testing.assert_close(
            found.double(), expected, rtol=1e-5, atol=1e-5 * float(expected.detach().abs().max())
        )


def test_chunks_cover_the_channels() -> None:
    groups = ((0, 20, 32, 0), (20, 10, 16, 1), (30, 4, 16, 2), (34, 10, 16, 3), (44, 20, 32, 4))
    assert cut(PUBLISHED) == groups
    assert cut((80,)) == ((0, 64, 64, 0), (64, 16, 32, 0))
    assert cut((200, 0, 3)) == ((0, 128, 128, 0), (128, 64, 64, 0), (192, 8, 16, 0), (200, 3, 32, 2))


def losses(backend: str, steps: int) -> list[float]:
    options = {"num_heads": 1, "angular_channels": (8, 4, 4), "attention_backend": backend}
    potential = make_potential(dtype=torch.float32, **options).to(DEVICE).train()
    potential.element_references.zero_()
    molecule = ase.build.molecule("CO")
    molecule.rattle(0.1, seed=1)
    batch = batch_of(molecule).to(DEVICE)
    bond = batch.positions[1] - batch.positions[0]
    target = 0.5 * torch.stack([bond, -bond]).float()  # what a gradient of an energy can be
    optimizer = torch.optim.Adam(potential.parameters(), lr=5e-3)
    seen = []
    for _ in range(steps):
        prediction = potential(batch, create_graph=True)
        loss = (prediction.forces - target).square().mean() + 0.1 * prediction.energy.square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(float(loss.detach()))
    return seen


@pytest.mark.slow
def test_steps_give_the_losses_of_the_reference() -> None:
    fused, plain = losses("triton", 12), losses("reference", 12)
    assert plain[-1] < 0.8 * plain[0]
    # float32 in another order of sums: rounding, which a dozen steps of Adam do not blow up.
    assert fused == pytest.approx(plain, abs=1e-3 * plain[0])
