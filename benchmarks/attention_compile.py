"""What ptxas makes of the Triton attention kernels: registers, spills and shared memory, no GPU needed.

Compiles every kernel ahead of time as it would be launched for the models that users have:

    python benchmarks/attention_compile.py --arch 80 90
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from escaip.ops.triton.backward_kernels import backward_columns, backward_rows
from escaip.ops.triton.chunks import cut
from escaip.ops.triton.double_backward_kernels import double_backward_columns, double_backward_rows
from escaip.ops.triton.forward_kernels import forward_rows
from escaip.ops.triton.tiles import Tile, choose_tile, padded_columns

KERNELS = (forward_rows, backward_rows, backward_columns, double_backward_rows, double_backward_columns)
HEAD_SIZES = (16, 32, 64, 80, 128)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PUBLISHED = (20, 10, 4, 10, 20)  # of 64 channels; other head sizes in proportion
NEIGHBORHOOD = 31
SYSTEM = 10_000  # atoms of a system in node attention
_TRITON_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_FEATURES = {"q", "k", "v", "out", "grad_out", "tq", "tk", "tv", "dq", "dk", "dv", "gq", "gk", "gv", "grad_grad_out"}
_INTEGERS = {"num_queries", "num_keys"}


@dataclass(frozen=True)
class Configuration:
    """One kernel as it would be launched; ``use`` is ``angles``, ``envelope`` (no angles) or ``node``."""

    kernel: str
    dtype: str
    head_size: int
    use: str
    precision: str


@dataclass(frozen=True)
class Record:
    """What came of it: ``spilled`` is bytes of local memory per thread, ``shared`` bytes per program."""

    kernel: str
    dtype: str
    head_size: int
    use: str
    precision: str
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


def configurations() -> Iterator[Configuration]:
    """Those of the models that users have."""
    for kernel in KERNELS:
        for dtype in DTYPES:
            precision = "tf32x3" if dtype == torch.float32 else "tf32"
            for head_size in HEAD_SIZES:
                for use in ("angles", "envelope", "node"):
                    yield Configuration(kernel.__name__, _TRITON_NAMES[dtype], head_size, use, precision)


def compile_one(configuration: Configuration, arch: int, tile: Tile | None = None) -> Record:
    """Compiles one configuration, with the tile of the table or another."""
    started = time.perf_counter()
    kernel = next(kernel for kernel in KERNELS if kernel.__name__ == configuration.kernel)
    angles, node = configuration.use == "angles", configuration.use == "node"
    size = configuration.head_size
    logits, values = cut(group_widths(size) if angles else (size,)), cut((size,))
    mean = SYSTEM if node else NEIGHBORHOOD
    item = 4 if configuration.dtype == "fp32" else 2
    tile = tile or choose_tile(configuration.kernel, angles, item, padded_columns(logits, values), mean, mean)
    constants: dict[str, Any] = {
        "H": 8, "D": size, "LOGITS": logits, "VALUES": values, "ANGLES": angles, "BIAS": not node, "WITH_DN": angles,
        "SPLIT": node, "PRECISION": configuration.precision, "OWN": tile.own, "OTHER": tile.other,
    }  # fmt: skip
    absent = {"log_envelope", "tb", "db", "gb"} if node else {"owners"}
    absent |= set() if angles else {"direction", "tn", "dn", "gn"}
    signature, attributes = {}, {}
    for position, name in enumerate(kernel.arg_names):
        if name in absent:
            constants[name] = None
        signature[name] = "constexpr" if name in constants else _argument_type(name, configuration.dtype)
        if signature[name].startswith("*"):
            attributes[(position,)] = [["tt.divisibility", 16]]
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    registers, spilled = _resources(compiled.asm["cubin"])
    return Record(
        **asdict(configuration), arch=arch, **asdict(tile), registers=registers, spilled=spilled,
        shared=compiled.metadata.shared, seconds=round(time.perf_counter() - started, 1),
    )  # fmt: skip


def compile_all(arch: int, chosen: Iterable[Configuration] | None = None) -> list[Record]:
    """Compiles configurations, all of them by default, for a compute capability such as 80 or 90."""
    return [compile_one(configuration, arch) for configuration in chosen or configurations()]


def _argument_type(name: str, dtype: str) -> str:
    if name in _FEATURES:
        return f"*{dtype}"
    if name.endswith("offsets"):
        return "*i64"
    if name == "owners":
        return "*i32"
    if name in _INTEGERS:
        return "i32"
    return "fp32" if name == "scale" else "*fp32"


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
    for name in ("kernel", "dtype", "use"):
        parser.add_argument(f"--{name}", nargs="+", help="only these")
    parser.add_argument("--head-size", type=int, nargs="+", help="only these")
    options = parser.parse_args()
    wanted = {name: getattr(options, name) for name in ("kernel", "dtype", "use", "head_size")}
    print("kernel                   dtype    d use        sm         tile  regs  spill  shared     s")
    for arch in options.arch:
        for configuration in configurations():
            if any(allowed and getattr(configuration, name) not in allowed for name, allowed in wanted.items()):
                continue
            r = compile_one(configuration, arch)
            tile = f"{r.own}x{r.other}w{r.warps}s{r.stages}"
            print(
                f"{r.kernel:24} {r.dtype:5} {r.head_size:4} {r.use:9} {r.arch:3} {tile:>12} {r.registers:5} "
                f"{r.spilled:6} {r.shared:7} {r.seconds:5}",
                flush=True,
            )


if __name__ == "__main__":
    main()
