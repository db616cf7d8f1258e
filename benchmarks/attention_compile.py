"""What ptxas makes of the Triton attention kernels: registers, spills and shared memory, no GPU needed.

Compiles every kernel ahead of time as it would be launched for the models that users have, with the built-in tiles:

    python benchmarks/attention_compile.py --arch 80 90

or with each tile that the tuner would try:

    python benchmarks/attention_compile.py --arch 90 --head-size 64 --candidates
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch
import triton
from triton.backends.compiler import GPUTarget

from escaip.ops.triton.candidates import candidates
from escaip.ops.triton.cases import Case
from escaip.ops.triton.compiling import compiling_for, reason
from escaip.ops.triton.launch import Call
from escaip.ops.triton.tiles import KERNELS, Tile, table_tile

HEAD_SIZES = (16, 32, 64, 80, 128)
MODES = ("tf32x3", "bfloat16", "float16")
USES = ("angles", "envelope", "node")
PUBLISHED = (20, 10, 4, 10, 20)  # of 64 channels; other head sizes in proportion
NEIGHBORHOOD = 31
SYSTEM = 256  # atoms of a system in node attention; larger ones compile to the same code
WALKS = (12, 24, 48, 96)  # tokens of neighborhoods whose candidates differ


@dataclass(frozen=True)
class Configuration:
    """One kernel as it would be launched; modes and uses are those of :class:`escaip.ops.triton.cases.Case`."""

    kernel: str
    mode: str
    head_size: int
    use: str

    def call(self, size: int | None = None) -> Call:
        """The launch, for neighborhoods of ``size`` tokens."""
        size = size or (SYSTEM if self.use == "node" else NEIGHBORHOOD)
        case = Case(self.use, self.mode, self.head_size, 8, group_widths(self.head_size), 1, size)
        return next(call for call in case.calls(torch.device("cpu")) if call.key.kernel == self.kernel)


@dataclass(frozen=True)
class Record:
    """What came of it: ``spilled`` is bytes of local memory per thread, ``shared`` bytes per program."""

    kernel: str
    mode: str
    head_size: int
    use: str
    arch: int
    own: int
    other: int
    warps: int
    stages: int
    registers: int
    spilled: int
    shared: int
    seconds: float


def group_widths(head_size: int) -> tuple[int, ...]:
    """The published groups in proportion to the head size."""
    outer = [width * head_size // 64 for width in PUBLISHED[1:]]
    return (head_size - sum(outer), *outer)


def configurations(modes: tuple[str, ...] = MODES) -> Iterator[Configuration]:
    """Those of the models that users have."""
    for kernel in KERNELS:
        for mode in modes:
            for head_size in HEAD_SIZES:
                for use in USES:
                    yield Configuration(kernel, mode, head_size, use)


def compile_one(configuration: Configuration, arch: int, tile: Tile | None = None) -> Record:
    """Compiles one configuration for a compute capability such as 80 or 90, with the built-in tile or another."""
    started = time.perf_counter()
    call = configuration.call()
    tile = tile or table_tile(call.key)
    with compiling_for(GPUTarget("cuda", arch, 32)):
        compiled = call.compile(tile)
    registers, spilled = _resources(compiled.asm["cubin"])
    return Record(
        **asdict(configuration), arch=arch, **asdict(tile), registers=registers, spilled=spilled,
        shared=compiled.metadata.shared, seconds=round(time.perf_counter() - started, 1),
    )  # fmt: skip


def tiles_of(configuration: Configuration, with_candidates: bool) -> list[Tile]:
    """The built-in tile, or all that the tuner tries for walks of any length."""
    if not with_candidates:
        return [table_tile(configuration.call().key)]
    sizes = (SYSTEM,) if configuration.use == "node" else WALKS
    return list(dict.fromkeys(tile for size in sizes for tile in candidates(configuration.call(size).key)))


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
    parser.add_argument("--mode", nargs="+", default=MODES, help=f"default: {' '.join(MODES)}; tf32 and ieee too")
    for name in ("kernel", "use"):
        parser.add_argument(f"--{name}", nargs="+", help="only these")
    parser.add_argument("--head-size", type=int, nargs="+", help="only these")
    parser.add_argument("--candidates", action="store_true", help="every tile that the tuner tries")
    options = parser.parse_args()
    wanted = {name: getattr(options, name) for name in ("kernel", "use", "head_size")}
    print("kernel                  mode        d use        sm           tile  regs  spill  shared     s")
    for arch in options.arch:
        for configuration in configurations(tuple(options.mode)):
            if any(allowed and getattr(configuration, name) not in allowed for name, allowed in wanted.items()):
                continue
            for tile in tiles_of(configuration, options.candidates):
                c = configuration
                what = f"{c.kernel:23} {c.mode:8} {c.head_size:4} {c.use:9} {arch:3} {tile!s:>14}"
                try:
                    r = compile_one(c, arch, tile)
                except Exception as error:  # a candidate that does not compile is a finding
                    print(what, reason(error), flush=True)
                else:
                    print(f"{what} {r.registers:5} {r.spilled:6} {r.shared:7} {r.seconds:5}", flush=True)


if __name__ == "__main__":
    main()
