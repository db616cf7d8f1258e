"""The kernel family: forward, backward and double backward on packed tokens (:class:`escaip.ops.problem.Family`).

No step waits for the GPU: sizes known on the host are shapes alone, so all of it can be captured in a CUDA graph. Sums
over heads and over the two halves of the directions' gradient are PyTorch's, in a fixed order: same bits on every run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor

from escaip.ops.problem import Gradients, Problem, Result
from escaip.ops.triton.backward_kernels import backward_columns, backward_rows
from escaip.ops.triton.chunks import Chunks, cut
from escaip.ops.triton.double_backward_kernels import double_backward_columns, double_backward_rows
from escaip.ops.triton.forward_kernels import forward_rows
from escaip.ops.triton.pieces import assign_tiles
from escaip.ops.triton.tiles import Tile, TileKey, choose_tile, padded_columns, size_class

# Up to this mean size a program serves a whole neighborhood, where sizes are alike: those with an envelope.
WHOLE = 128
SLOTS_PER_PROGRAM = 128


@dataclass(frozen=True)
class Call:
    """A kernel over all tiles of queries, or of keys: everything but the tile.

    Attributes:
        kernel: the kernel.
        arguments: all that it takes but what the tile decides.
        offsets: ``(N + 1,)`` of the owned side.
        count: tokens of the owned side.
        heads: of the tokens.
        split: whether a program owns a tile of a neighborhood instead of all of it.
        key: what its tile depends on.
    """

    kernel: Any
    arguments: dict[str, Any]
    offsets: Tensor
    count: int
    heads: int
    split: bool
    key: TileKey

    def bind(self, tile: Tile) -> Callable[[], Any]:
        """The launch alone, as often as wanted, with the slots of the tile laid out before."""
        programs, owners = self.offsets.shape[0] - 1, None
        if self.split:
            programs, owners = tile_owners(self.offsets, self.count, tile.own)
        return partial(self.kernel[(programs, self.heads)], **self._all_arguments(tile, owners))

    def compile(self, tile: Tile) -> Any:
        """The compiled kernel, as a launch would compile it; nothing runs."""
        owners = self.offsets.new_empty(1, dtype=torch.int32) if self.split else None
        return self.kernel.warmup(grid=(1, 1), **self._all_arguments(tile, owners))

    def _all_arguments(self, tile: Tile, owners: Tensor | None) -> dict[str, Any]:
        constants = {"OWN": tile.own, "OTHER": tile.other, "num_warps": tile.warps, "num_stages": tile.stages}
        return {**self.arguments, "owners": owners, "SPLIT": self.split, **constants}


_recorded: ContextVar[list[Call] | None] = ContextVar("escaip_recorded_calls", default=None)


@contextmanager
def recorded_calls() -> Iterator[list[Call]]:
    """Collects what the functions of this module would run, in order, instead of running it: for the tuner."""
    calls: list[Call] = []
    token = _recorded.set(calls)
    try:
        yield calls
    finally:
        _recorded.reset(token)


@dataclass(frozen=True)
class _Launcher:
    """What the three functions have in common: contiguous inputs, and constants of the kernels.

    Attributes:
        tensors: arguments of every kernel by name.
        logits: chunks of q and k.
        values: chunks of v.
        precision: of float32 matrix products, in Triton's words.
    """

    tensors: dict[str, Tensor | None]
    scale: float
    logits: Chunks
    values: Chunks
    precision: str

    def launch(self, kernel: Any, by_key: bool, **arguments: Any) -> None:
        """Runs a kernel over all tiles of queries, or of keys."""
        q, k, bias = self["q"], self["k"], self.tensors["log_envelope"]
        own, other = (k, q) if by_key else (q, k)
        offsets = self["key_offsets"] if by_key else self["query_offsets"]
        neighborhoods = offsets.shape[0] - 1
        own_mean, other_mean = own.shape[0] / neighborhoods, other.shape[0] / neighborhoods
        constants = {
            "scale": self.scale, "H": q.shape[1], "D": q.shape[2], "LOGITS": self.logits, "VALUES": self.values,
            "ANGLES": self.tensors["direction"] is not None, "BIAS": bias is not None, "PRECISION": self.precision,
        }  # fmt: skip
        call = Call(
            kernel, {**self.tensors, **arguments, **constants}, offsets, own.shape[0], q.shape[1],
            bias is None or own_mean > WHOLE, self._key(kernel.__name__, size_class(own_mean), size_class(other_mean)),
        )  # fmt: skip
        calls = _recorded.get()
        if calls is None:
            call.bind(choose_tile(call.key, q.device))()
        else:
            calls.append(call)

    def _key(self, kernel: str, own: str, other: str) -> TileKey:
        dtype, angles = self["q"].dtype, self.tensors["direction"] is not None
        use = "angles" if angles else "node" if self.tensors["log_envelope"] is None else "envelope"
        mode = self.precision if dtype == torch.float32 else str(dtype).removeprefix("torch.")
        columns = padded_columns(self.logits), padded_columns(self.values)
        return TileKey(kernel, use, mode, max(columns), sum(columns), own, other)

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.tensors[name]
        assert tensor is not None
        return tensor

    @property
    def nothing(self) -> bool:
        """Whether there is no pair, hence nothing to run."""
        return self["q"].shape[0] == 0 or self["k"].shape[0] == 0

    @property
    def all_channels(self) -> bool:
        """Whether every channel of q and k takes part in the logits."""
        return sum(chunk[1] for chunk in self.logits) == self["q"].shape[2]

    def gradient(self, name: str) -> Tensor:
        """Where a kernel writes the gradient of q or k: zero in channels that take no part."""
        like = self[name]
        return torch.empty_like(like) if self.all_channels and not self.nothing else torch.zeros_like(like)


def _launcher(problem: Problem) -> _Launcher:
    names = ("q", "k", "v", "log_envelope", "direction", "query_offsets", "key_offsets")
    given = {name: getattr(problem, name) for name in names}
    contiguous = {name: None if x is None else x.contiguous() for name, x in given.items()}
    logits, values = cut(tuple(problem.widths)), cut((problem.q.shape[2],))
    return _Launcher(contiguous, problem.scale, logits, values, matmul_precision(problem.q))


def matmul_precision(x: Tensor) -> str:
    """How products of float32 tiles are taken for tensors like ``x``.

    Three TF32 products keep float32's digits on tensor cores; one where the user allows PyTorch as much. Float16
    tensors meet float32 tiles too, which TF32 rounds as float16 would.
    """
    if torch.version.hip or (x.is_cuda and torch.cuda.get_device_capability(x.device) < (8, 0)):
        return "ieee"
    exact = x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision != "tf32"
    return "tf32x3" if exact else "tf32"


def tile_owners(offsets: Tensor, count: int, own: int) -> tuple[int, Tensor]:
    """Cuts neighborhoods into tiles of ``own`` tokens without knowing their sizes on the host.

    Neighborhood ``i`` has the slots from ``offsets[i] // own + i`` on. They are enough: ``ceil(n / own)`` is at most
    ``(o + n) // own − o // own + 1``. A few slots stay empty.

    Returns:
        The number of slots, and the neighborhood of each, int32.
    """
    neighborhoods = offsets.shape[0] - 1
    slots = count // own + neighborhoods
    owners = offsets.new_empty(slots, dtype=torch.int32)
    assign_tiles[(triton.cdiv(slots, SLOTS_PER_PROGRAM),)](
        offsets, owners, slots, neighborhoods, neighborhoods.bit_length(), OWN=own, BLOCK=SLOTS_PER_PROGRAM
    )
    return slots, owners


def forward(problem: Problem) -> Result:
    """See :class:`escaip.ops.problem.Family`."""
    launcher = _launcher(problem)
    out = torch.empty_like(launcher["q"])
    lse = out.new_empty(out.shape[:2], dtype=torch.float32)
    if launcher.nothing:
        return Result(out.zero_(), lse.zero_())
    with torch.cuda.device_of(out):
        launcher.launch(forward_rows, by_key=False, out=out, lse=lse)
    return Result(out, lse)


def backward(problem: Problem, result: Result, grad_out: Tensor, with_direction: bool) -> Gradients:
    """See :class:`escaip.ops.problem.Family`."""
    launcher = _launcher(problem)
    dq, dk, dv = launcher.gradient("q"), launcher.gradient("k"), torch.empty_like(launcher["v"])
    heads_db, halves_dn = _partial_sums(launcher, with_direction)
    if launcher.nothing:
        return Gradients(dq, dk, dv.zero_(), _sum_bias(heads_db), _sum_direction(halves_dn))
    out, lse = (x.contiguous() for x in result)
    rows_dn, columns_dn = (None, None) if halves_dn is None else halves_dn.unbind(0)
    common = {
        "grad_out": grad_out.contiguous(), "lse": lse, "dots": lse.new_empty(lse.shape[::-1]),
        "num_queries": dq.shape[0], "WITH_DN": halves_dn is not None,
    }  # fmt: skip
    with torch.cuda.device_of(dq):
        launcher.launch(backward_rows, by_key=False, out=out, dq=dq, dn=rows_dn, **common)
        launcher.launch(
            backward_columns, by_key=True, dk=dk, dv=dv, db=heads_db, dn=columns_dn, num_keys=dk.shape[0], **common
        )
    return Gradients(dq, dk, dv, _sum_bias(heads_db), _sum_direction(halves_dn))


def double_backward(
    problem: Problem, result: Result, grad_out: Tensor, tangents: Gradients
) -> tuple[Tensor, Gradients]:
    """See :class:`escaip.ops.problem.Family`."""
    launcher = _launcher(problem)
    gq, gk, gv = launcher.gradient("q"), launcher.gradient("k"), torch.empty_like(launcher["v"])
    grad_grad_out = torch.empty_like(launcher["q"])
    heads_gb, halves_gn = _partial_sums(launcher, True)
    if launcher.nothing:
        sums = _sum_bias(heads_gb), _sum_direction(halves_gn)
        return grad_grad_out.zero_(), Gradients(gq, gk, gv.zero_(), *sums)
    out, lse = (x.contiguous() for x in result)
    dots, means, dots_t = (lse.new_empty(lse.shape[::-1]) for _ in range(3))
    rows_gn, columns_gn = (None, None) if halves_gn is None else halves_gn.unbind(0)
    common = {
        "tq": tangents.q.contiguous(), "tk": tangents.k.contiguous(), "tv": tangents.v.contiguous(),
        "tb": _tangent(tangents.log_envelope, problem.log_envelope),
        "tn": _tangent(tangents.direction, problem.direction), "grad_out": grad_out.contiguous(), "lse": lse,
        "dots": dots, "means": means, "dots_t": dots_t, "num_queries": gq.shape[0],
    }  # fmt: skip
    with torch.cuda.device_of(gq):
        launcher.launch(
            double_backward_rows, by_key=False, out=out, grad_grad_out=grad_grad_out, gq=gq, gn=rows_gn, **common
        )
        launcher.launch(
            double_backward_columns, by_key=True, gk=gk, gv=gv, gb=heads_gb, gn=columns_gn, num_keys=gk.shape[0],
            **common,
        )  # fmt: skip
    return grad_grad_out, Gradients(gq, gk, gv, _sum_bias(heads_gb), _sum_direction(halves_gn))


def _partial_sums(launcher: _Launcher, with_direction: bool) -> tuple[Tensor | None, Tensor | None]:
    """Each head's share of db, ``(h, T)``, and of the rows and the columns to dn, ``(2, h, T, 3)``."""
    k, bias, direction = launcher["k"], launcher.tensors["log_envelope"], launcher.tensors["direction"]
    empty = torch.zeros if launcher.nothing else torch.empty
    shape = (k.shape[1], k.shape[0])
    heads_db = None if bias is None else empty(shape, dtype=torch.float32, device=k.device)
    if direction is None or not with_direction:
        return heads_db, None
    return heads_db, empty((2, *shape, 3), dtype=torch.float32, device=k.device)


def _sum_bias(heads_db: Tensor | None) -> Tensor | None:
    return None if heads_db is None else heads_db.sum(0)


def _sum_direction(halves_dn: Tensor | None) -> Tensor | None:
    return None if halves_dn is None else halves_dn.sum((0, 1))


def _tangent(tangent: Tensor | None, of: Tensor | None) -> Tensor | None:
    if of is None:
        return None
    return torch.zeros_like(of) if tangent is None else tangent.contiguous()
