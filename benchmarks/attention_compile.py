"""What ptxas makes of the Triton attention kernels: registers, spills and shared memory, no GPU needed.

Compiles every kernel with every tile that Triton would time, for the models that users have:

    python benchmarks/attention_compile.py --arch 80 90 --head-size 64 --mode tf32x3 bfloat16
"""

from __future__ import annotations

import argparse
import contextlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.autotuner import Autotuner
from triton.runtime.driver import driver

from escaip.ops.inputs import AttentionInputs, Gradients
from escaip.ops.triton import launch, outer

MODES = {"tf32x3": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
USES = ("angles", "values", "envelope", "node")  # angles in the logits; in the values, too; none
PUBLISHED = (20, 10, 4, 10, 20)  # of 64 channels; other head sizes in proportion


@dataclass(frozen=True)
class Record:
    """A compiled kernel: ``spilled`` is bytes of local memory per thread, ``shared`` bytes per program."""

    kernel: str
    tile: str
    registers: int
    spilled: int
    shared: int


class NamedDriver:
    """A driver that launches nothing: it says which GPU to compile for."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> str:
        return f"{self._target.backend} {self._target.arch}"

    def get_current_stream(self, _: object = None) -> int:
        return 0


@contextlib.contextmanager
def compiling(arch: int, precision: str, most: int | None) -> Iterator[list[Record]]:
    """Launches within compile the last tiles for a compute capability such as 90, ``most`` or all, and run nothing."""
    records: list[Record] = []

    def run(tuner: Autotuner, *, grid: object, warmup: bool, **arguments: Any) -> None:
        arguments["PRECISION"] = precision if precision.startswith("tf32") else arguments["PRECISION"]
        tuner.nargs = {}
        for config in tuner.prune_configs(arguments)[-(most or 0) :]:
            compiled = tuner.fn.warmup(grid=(1, 1), **arguments, **config.all_kwargs())
            registers, spilled = _resources(compiled.asm["cubin"])
            tile = f"{config.kwargs['OWN']}x{config.kwargs['OTHER']} w{config.num_warps} s{config.num_stages}"
            records.append(Record(tuner.base_fn.__name__, tile, registers, spilled, compiled.metadata.shared))

    before = driver._active
    driver.set_active(NamedDriver(GPUTarget("cuda", arch, 32)))
    try:
        with mock.patch.object(Autotuner, "run", run):
            yield records
    finally:
        driver._active = before


def compile_all(
    arch: int, mode: str, head_size: int, use: str, size: int = 24, most: int | None = None
) -> list[Record]:
    """Compiles the five kernels for neighborhoods of ``size`` tokens of eight heads, with all tiles or ``most``."""
    angles = use in ("angles", "values")
    widths = tuple(width * head_size // 64 for width in PUBLISHED[1:]) if angles else ()
    q = torch.zeros(size, 8, head_size, dtype=MODES[mode])
    offsets, bias = torch.tensor([0, size]), None if use == "node" else torch.zeros(size)
    direction = torch.zeros(size, 3) if angles else None
    groups = (head_size - sum(widths), *widths)
    inputs = AttentionInputs(q, q, q, bias, direction, offsets, offsets, groups, 1.0, use == "values")
    with compiling(arch, mode, most) as records:
        outputs = launch.forward(inputs)
        launch.backward(inputs, outputs, q, angles)
        launch.double_backward(inputs, outputs, q, Gradients(q, q, q, bias, direction))
    return records


def compile_outer(arch: int, precision: str, channels: int, others: int) -> list[Record]:
    """Compiles the two kernels of sums of outer products (``escaip.ops.outer``)."""
    x, y, offsets = torch.zeros(24, channels), torch.zeros(24, others), torch.tensor([0, 24])
    sums = torch.zeros(1, channels, others)
    options = {**outer.sizes(channels, others), "PRECISION": precision, "grid": (1,)}
    before, records = driver._active, []
    driver.set_active(NamedDriver(GPUTarget("cuda", arch, 32)))
    try:
        for kernel, arguments in (
            (outer.sum_outer_kernel, (x, y, offsets, sums)),
            (outer.apply_kernel, (sums, y, offsets, x, *sums.stride())),
        ):
            compiled = kernel.warmup(*arguments, **options)
            tile = f"{channels} x {others}"
            records.append(Record(kernel.__name__, tile, *_resources(compiled.asm["cubin"]), compiled.metadata.shared))
    finally:
        driver._active = before
    return records


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of local memory per thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found is not None, text
    return int(found[1]), int(found[2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90])
    parser.add_argument("--mode", nargs="+", choices=MODES, default=["tf32x3", "bfloat16", "float16"])
    parser.add_argument("--use", nargs="+", choices=USES, default=USES)
    parser.add_argument("--head-size", type=int, nargs="+", default=[16, 32, 64, 80, 128])
    parser.add_argument("--size", type=int, default=24, help="mean tokens of a neighborhood (default: 24)")
    options = parser.parse_args()
    print("kernel                  mode        d use        sm          tile  regs  spill  shared")
    for arch in options.arch:
        for mode in options.mode:
            for head_size in options.head_size:
                for use in options.use:
                    for r in compile_all(arch, mode, head_size, use, options.size):
                        what = f"{r.kernel:23} {mode:8} {head_size:4} {use:9} {arch:3} {r.tile:>13}"
                        print(f"{what} {r.registers:5} {r.spilled:6} {r.shared:7}", flush=True)


if __name__ == "__main__":
    main()
