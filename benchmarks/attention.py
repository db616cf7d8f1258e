"""Time and peak memory of neighborhood attention: value, gradient, and the double-backward step of force training.

    python benchmarks/attention.py [--device cuda] [--atoms 100 1000] [--neighbors 8 16 32 48 64 128] [--out FILE]

Side by side in one run, on the same tensors: our backends; the expanded channels of the published implementation,
written here in plain PyTorch (padded, unfused); and PyTorch's ``scaled_dot_product_attention`` restricted to one of its
kernels. Beside each time stand the bytes that must move at least and the products that must be made, which give the
share of the machine's own limits (measured first: a large copy and a large matrix product) that was reached.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import resource
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import markdown_table, measure, provenance, write_json
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from escaip.errors import EscaipError
from escaip.ops import available_backends, neighborhood_attention
from escaip.ops.dense import Padding
from escaip.ops.harmonics import spherical_harmonics

CHANNELS = {
    16: (5, 3, 1, 3, 4), 32: (10, 5, 2, 5, 10), 64: (20, 10, 4, 10, 20), 80: (25, 12, 5, 13, 25),
    128: (40, 20, 8, 20, 40),
}  # fmt: skip
LEAVES = ("q", "k", "v", "log_envelope", "direction")
STEPS = ("value", "gradient", "double")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SDPA_KERNELS = {
    "sdpa math": SDPBackend.MATH,
    "sdpa memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
}


@dataclass(frozen=True)
class Case:
    """One problem: ``neighbors`` tokens per atom on average, ragged by a third."""

    atoms: int
    neighbors: int
    head_size: int
    heads: int
    dtype: torch.dtype
    device: str

    @property
    def channels(self) -> tuple[int, ...]:
        return CHANNELS[self.head_size]

    @property
    def scale(self) -> float:
        return self.head_size**-0.5

    def inputs(self) -> dict[str, Tensor]:
        """Random tokens; the first of each atom is its self token."""
        low, high = max(1, 2 * self.neighbors // 3), 4 * self.neighbors // 3 + 1
        sizes = torch.randint(low, high, (self.atoms,), generator=torch.Generator().manual_seed(0))
        tensors = tokens(sizes, self.heads, self.head_size, self.dtype, seed=1)
        return {name: tensor.to(self.device) for name, tensor in tensors.items()}

    def exact(self) -> dict[str, Tensor]:
        """The same numbers, as rounded to the type of the case, in float64."""
        return {name: x.double() if x.is_floating_point() else x for name, x in self.inputs().items()}


def tokens(sizes: Tensor, heads: int, head_size: int, dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
    """Random inputs of neighborhoods of these sizes, each with its self token first; geometry in float32."""
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
    total = int(offsets[-1])
    direction = torch.nn.functional.normalize(torch.randn(total, 3, generator=generator), dim=-1)
    log_envelope = -torch.randn(total, generator=generator).square()
    direction[offsets[:-1]] = 0.0
    log_envelope[offsets[:-1]] = 0.0
    features = {name: torch.randn(total, heads, head_size, generator=generator).to(dtype) for name in "qkv"}
    return {**features, "log_envelope": log_envelope, "direction": direction, "offsets": offsets}


def expanded_operands(case: Case, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """Padded q, k, v, bias with every channel of degree ``l`` times the ``2l + 1`` harmonics of its bond."""
    pad = Padding.of(inputs["offsets"], len(inputs["k"])).pad
    harmonics = spherical_harmonics(inputs["direction"], len(case.channels) - 1).to(case.dtype)
    degrees = harmonics.split([2 * degree + 1 for degree in range(len(case.channels))], -1)

    def expand(x: Tensor) -> Tensor:
        groups = zip(x.split(case.channels, -1), degrees, strict=True)
        return torch.cat([(g.unsqueeze(-1) * y[:, None, None, :]).flatten(-2) for g, y in groups], -1)

    q, k = (pad(expand(inputs[name])).transpose(1, 2) for name in "qk")
    bias = pad(inputs["log_envelope"], -torch.inf)[:, None, None, :]
    return q, k, pad(inputs["v"]).transpose(1, 2), bias.to(case.dtype)


def published(case: Case, inputs: dict[str, Tensor]) -> Tensor:
    """The attention of the published code as it must be for a second derivative: expanded, padded, unfused."""
    q, k, v, bias = expanded_operands(case, inputs)
    probability = torch.softmax(case.scale * (q @ k.transpose(-1, -2)) + bias, -1)
    return Padding.of(inputs["offsets"], len(inputs["k"])).unpad((probability @ v).transpose(1, 2))


def with_sdpa(case: Case, inputs: dict[str, Tensor], kernel: SDPBackend) -> Tensor:
    """``scaled_dot_product_attention`` on the same operands, by one of its kernels."""
    q, k, v, bias = expanded_operands(case, inputs)
    mask = bias.expand(-1, 1, q.shape[2], -1)
    with sdpa_kernel(kernel):
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=case.scale)
    return Padding.of(inputs["offsets"], len(inputs["k"])).unpad(out.transpose(1, 2))


def run(function: Callable[[dict[str, Tensor]], Tensor], inputs: dict[str, Tensor], step: str) -> list[Tensor]:
    """The value; its gradient; or a gradient of the gradient, as a force loss takes it."""
    leaves = {name: inputs[name].detach().requires_grad_(step != "value") for name in LEAVES}
    out = function({**inputs, **leaves})
    if step == "value":
        return [out]
    first = torch.autograd.grad(project(out), list(leaves.values()), create_graph=step == "double")
    if step == "gradient":
        return list(first)
    total = torch.stack([project(g) for g in first]).sum()
    return list(torch.autograd.grad(total, list(leaves.values())))


def project(x: Tensor) -> Tensor:
    """A scalar whose cotangents are of order one, the same in every type: half types would over- or underflow."""
    wide = x if x.dtype == torch.float64 else x.float()
    return (wide * torch.cos(torch.arange(x.numel(), device=x.device, dtype=wide.dtype)).view_as(x)).sum()


def candidates(case: Case, names: list[str] | None) -> dict[str, Callable[[dict[str, Tensor]], Tensor]]:
    """What runs on this device, by name."""
    found: dict[str, Callable[[dict[str, Tensor]], Tensor]] = {"published": lambda x: published(case, x)}
    for name, kernel in SDPA_KERNELS.items():
        found[name] = lambda x, kernel=kernel: with_sdpa(case, x, kernel)
    for info in available_backends():
        if not info.devices or case.device in info.devices:  # not Triton's interpreter
            found[info.name] = lambda x, name=info.name: neighborhood_attention(
                **x, angular_channels=case.channels, scale=case.scale, backend=name
            )
    return {name: function for name, function in found.items() if names is None or name in names}


def least_work(case: Case, inputs: dict[str, Tensor], step: str) -> tuple[float, float]:
    """Bytes and floating-point operations that no exact method can avoid, summed over what the step runs.

    Every input is read and every result written once per pass; a product of a matrix of logits with ``d`` channels
    takes ``2 d`` operations per pair and head. The value takes 2 such products, the gradient 5 more (q·k again) and the
    second derivative 12 (docs/concepts/attention.md: A, two for Ȧ, E, Ė, two for Ȯ, one for v, two each for q and k).
    """
    sizes = inputs["offsets"].diff().double()
    pairs = float(sizes.square().sum()) * case.heads
    feature = inputs["q"].numel() * inputs["q"].element_size()
    small = inputs["log_envelope"].numel() * 4 * 4
    per_pass = {"value": (4, 2), "gradient": (8, 5), "double": (11, 12)}
    bytes_moved = operations = 0.0
    for name in STEPS[: STEPS.index(step) + 1]:
        tensors, products = per_pass[name]
        bytes_moved += tensors * feature + small
        operations += products * 2 * case.head_size * pairs
    return bytes_moved, operations


def limits(device: str, dtype: torch.dtype) -> tuple[float, float]:
    """Bytes per second of a large copy, and operations per second of a large matrix product, measured here."""
    x = torch.zeros(1 << (28 if device == "cuda" else 25), device=device)
    y = torch.empty_like(x)
    side = 8192 if device == "cuda" else 1024
    a = torch.randn(side, side, device=device).to(dtype)
    copy = measure(lambda: y.copy_(x), 7, device=device)
    product = measure(lambda: a @ a, 7, device=device)
    return 2 * x.numel() * 4 / copy, 2 * side**3 / product


def peak_bytes(function: Callable[[], Any], device: str) -> float | None:
    """Most memory in use above what was there; on the CPU resident memory, None where Linux does not tell."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        return torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what earlier runs freed must not serve this one unseen
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # starts the high-water mark anew
        before = _resident("VmRSS")
        function()
        return _resident("VmHWM") - before
    except (OSError, AttributeError):
        return None


def _resident(what: str) -> float:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(what):
            return 1024.0 * float(line.split()[1])
    raise OSError(f"{what} is not told")


def measure_case(case: Case, names: list[str] | None, repeats: int, peaks: tuple[float, float]) -> list[dict[str, Any]]:
    """A row per candidate and step; what cannot run says why."""
    rows: list[dict[str, Any]] = []
    try:
        inputs = case.inputs()
    except RuntimeError:  # out of memory
        print(
            f"{case.atoms} atoms, {case.neighbors} neighbors, d = {case.head_size}: the tokens do not fit", flush=True
        )
        return rows
    for step in STEPS:
        work = least_work(case, inputs, step)
        least = max(work[0] / peaks[0], work[1] / peaks[1])
        for name, function in candidates(case, names).items():
            row: dict[str, Any] = {
                "atoms": case.atoms, "neighbors": case.neighbors, "head_size": case.head_size,
                "dtype": str(case.dtype).removeprefix("torch."), "step": step, "name": name,
            }  # fmt: skip
            try:
                seconds = measure(lambda f=function, s=step: run(f, inputs, s), repeats, device=case.device)
                row |= {"ms": 1e3 * seconds, "of_least_time": least / seconds}
                row["bandwidth_bound"] = work[0] / peaks[0] > work[1] / peaks[1]
                peak = peak_bytes(lambda f=function, s=step: run(f, inputs, s), case.device)
                row["peak_MiB"] = None if peak is None else peak / 2**20
            except (RuntimeError, EscaipError) as error:  # out of memory, no kernel, no second derivative
                row |= {"ms": None, "why": str(error).splitlines()[0][:160]}
            rows.append(row)
            gc.collect()
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Milliseconds of each step beside those of the published way, and the memory of the double step."""
    lines = []
    keys = ("atoms", "neighbors", "head_size", "dtype")
    for shape in dict.fromkeys(tuple(row[k] for k in keys) for row in rows):
        here = [row for row in rows if tuple(row[k] for k in keys) == shape]
        by = {(row["name"], row["step"]): row for row in here}
        for name in dict.fromkeys(row["name"] for row in here):
            cells = [*map(str, shape), name]
            for step in STEPS:
                mine, base = by[name, step], by.get(("published", step), {})
                ratio = f" ({base['ms'] / mine['ms']:.1f}×)" if mine["ms"] and base.get("ms") else ""
                cells.append(f"{mine['ms']:.2f}{ratio}" if mine["ms"] else "—")
            peak = by[name, "double"].get("peak_MiB")
            cells.append("—" if peak is None else f"{peak:.0f}")
            reached = by[name, "double"].get("of_least_time")
            cells.append("—" if reached is None else f"{100 * reached:.0f} %")
            lines.append(cells)
    header = [
        "atoms",
        "neighbors",
        "d",
        "dtype",
        "who",
        "value ms",
        "gradient ms",
        "double ms",
        "double MiB",
        "of limit",
    ]
    return markdown_table(header, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--atoms", type=int, nargs="+", default=[100, 1000])
    parser.add_argument("--neighbors", type=int, nargs="+", default=[8, 16, 32, 48, 64, 128])
    parser.add_argument("--head-sizes", type=int, nargs="+", default=[32, 64], choices=sorted(CHANNELS))
    parser.add_argument("--dtypes", nargs="+", default=["float32"], choices=sorted(DTYPES))
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--names", nargs="+", help="only these; default: all that run here")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=100_000, help="cases with more are left out, and listed")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    result: dict[str, Any] = {"provenance": provenance(), "heads": args.heads, "limits": {}, "left_out": [], "rows": []}
    for dtype in args.dtypes:
        peaks = limits(args.device, DTYPES[dtype])
        result["limits"][dtype] = {"bytes_per_second": peaks[0], "operations_per_second": peaks[1]}
        for head_size in args.head_sizes:
            for atoms in args.atoms:
                for neighbors in args.neighbors:
                    if atoms * neighbors > args.tokens:
                        result["left_out"].append([dtype, head_size, atoms, neighbors])
                        continue
                    case = Case(atoms, neighbors, head_size, args.heads, DTYPES[dtype], args.device)
                    rows = measure_case(case, args.names, args.repeats, peaks)
                    result["rows"] += rows
                    if rows:
                        print(table(rows), flush=True)
                    else:
                        result["left_out"].append([dtype, head_size, atoms, neighbors])
                    if args.out:
                        write_json(args.out, result)
    result["peak_process_GiB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if args.out:
        write_json(args.out, result)


if __name__ == "__main__":
    main()
