"""Chooses tiles by measurement (docs/attention.md, "Tiles"): every candidate of every kernel, timed on the device."""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
import triton
from torch import Tensor

from escaip.errors import ConfigError
from escaip.ops.triton.candidates import candidates
from escaip.ops.triton.cases import Case
from escaip.ops.triton.compiling import Job, compile_ahead, reason
from escaip.ops.triton.launch import Call
from escaip.ops.triton.tile_files import Entry, Identity, forget, identity_of, user_file, write
from escaip.ops.triton.tiles import Tile, TileKey

# What a kernel writes; the others read some of it.
_OUTPUTS = {
    "forward_rows": ("out", "lse"),
    "backward_rows": ("dq", "dn", "dots"),
    "backward_columns": ("dk", "dv", "db", "dn"),
    "double_backward_rows": ("grad_grad_out", "gq", "gn", "dots", "means", "dots_t"),
    "double_backward_columns": ("gk", "gv", "gb", "gn"),
}
# How far two tiles may be apart in norm: sums in another order, of operands that the mode rounds. A single number may
# be so many root mean squares apart.
_TOLERANCE = {"tf32x3": 1e-4, "ieee": 1e-4, "tf32": 1e-2, "float16": 1e-2, "bfloat16": 3e-2}
_SINGLE = 30
_MARGIN = 0.03  # a tile that is not this much faster than the table's is not worth other bits
_COMPILE_SHARE = 0.6  # of the time, at most
_MAX_WORKERS = 16
_TOKENS = 48_000  # of a case: some waves of programs on the largest GPUs, some hundred MiB


@dataclass(frozen=True)
class Failure:
    """A tile that was dropped, and why in one line."""

    tile: Tile
    reason: str


@dataclass(frozen=True)
class Record:
    """What came of one kernel in one situation.

    Attributes:
        key: kernel, use, mode, columns and sizes.
        default: the table's tile.
        default_ms: its time; None where it did not run, or time was up before.
        best: the tile to take; the table's unless another is faster.
        best_ms: its time; None where nothing was timed.
        tried: tiles that were timed.
        failed: tiles that do not compile, do not fit, or compute something else.
    """

    key: TileKey
    default: Tile
    default_ms: float | None
    best: Tile
    best_ms: float | None
    tried: int
    failed: tuple[Failure, ...]

    @property
    def kernel(self) -> str:
        """Name of the kernel."""
        return self.key.kernel


class Clock(Protocol):
    """Where times come from; a test brings its own."""

    def now(self) -> float:
        """Seconds."""

    def measure(self, tile: Tile, launch: Callable[[], Any]) -> float:
        """Milliseconds that a launch takes the device."""


class CudaClock:
    """Medians between CUDA events, each launch on an emptied L2 cache.

    The device is given work ahead of each series, so that it never waits for the host between two events.

    Args:
        device: a CUDA device.
    """

    _FLUSHED, _RISING = 256 << 20, 1000  # bytes; launches, a tenth of a second, in which clocks rise
    _AHEAD, _WARM_UP, _FEWEST, _MOST, _SERIES_MS = 16, 3, 5, 30, 20.0

    def __init__(self, device: torch.device) -> None:
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        self._flushed = torch.empty(max(self._FLUSHED, 2 * cache), dtype=torch.int8, device=device)
        for _ in range(self._RISING):
            self._flushed.zero_()
        torch.cuda.synchronize(device)

    def now(self) -> float:
        """See :class:`Clock`."""
        return time.monotonic()

    def measure(self, tile: Tile, launch: Callable[[], Any]) -> float:
        """See :class:`Clock`."""
        once = statistics.median(self._series(launch, self._WARM_UP))
        repeats = min(max(int(self._SERIES_MS / max(once, 1e-3)), self._FEWEST), self._MOST)
        return statistics.median(self._series(launch, repeats))

    def _series(self, launch: Callable[[], Any], repeats: int) -> list[float]:
        with torch.cuda.device(self._flushed.device):
            for _ in range(self._AHEAD):
                self._flushed.zero_()
            pairs = []
            for _ in range(repeats):
                self._flushed.zero_()
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                start.record()
                launch()
                end.record()
                pairs.append((start, end))
            torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in pairs]


def tune(
    cases: Sequence[Case],
    device: torch.device | str = "cuda",
    *,
    seconds: float = 120.0,
    workers: int | None = None,
    path: str | os.PathLike[str] | None = None,
    progress: Callable[[Record], None] | None = None,
    clock: Clock | None = None,
    identity: Identity | None = None,
    tiles: Callable[[TileKey], Sequence[Tile]] = candidates,
) -> list[Record]:
    """Times every candidate of every kernel and keeps the fastest in a file, which later processes read.

    Candidates compile first, side by side, for at most three fifths of the time. Then each key is measured alone:
    value, gradient and double gradient are five kernels, and cases may share a key (the first of them is measured). A
    candidate that does not compile, does not fit, or disagrees with the table's tile beyond rounding is dropped and
    recorded. When time is up, what was not measured keeps the tile of the table. The file is written after each case,
    and launches of this process take its tiles from then on.

    Args:
        cases: what to measure, most important first (:func:`model_cases`).
        device: a CUDA device that runs nothing else.
        seconds: for all of it; what is running then ends first.
        workers: processes that compile; by default one per usable core, up to 16. 0 compiles at the launches.
        path: of the file; by default in the user's cache, where launches look.
        progress: called with each record.
        clock: where times come from, by default CUDA events.
        identity: what the file is for, by default the device.
        tiles: the candidates of a key, the one to compare with first.

    Returns:
        A record per key.

    Raises:
        ConfigError: no CUDA device, no folder for the file, or a kernel left the device unusable.
    """
    device = torch.device(device)
    if clock is None or identity is None:
        if device.type != "cuda" or not torch.cuda.is_available():
            raise ConfigError(
                f"tiles are measured on a CUDA device, and this is {device}: run it on a machine with one"
            )
        clock, identity = clock or CudaClock(device), identity or identity_of(device)
    file = Path(path) if path is not None else user_file(identity)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
    if file is None or not os.access(file.parent, os.W_OK | os.X_OK):
        place = "the cache" if file is None else file.parent
        raise ConfigError(f"tiles cannot be kept in {place}: set ESCAIP_CACHE to a folder of yours, or name a file")
    until = clock.now() + seconds
    records: dict[TileKey, Record] = {}
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        broken: dict[Job, str | None] = {}
        if workers != 0 and device.type == "cuda":
            target = triton.runtime.driver.active.get_current_target()
            jobs = list(dict.fromkeys(job for case in cases for job in _jobs(case, tiles)))
            broken = compile_ahead(jobs, target, workers or _usable_cores(), _COMPILE_SHARE * seconds)
        for case in cases:
            for call in case.calls(device):
                if call.key in records:  # run all the same: others of the case read what it writes
                    if clock.now() < until:
                        call.bind(records[call.key].best)()
                    continue
                jobs_of = {tile: Job(case.small(), call.key.kernel, tile) for tile in tiles(call.key)}
                known = {tile: broken.get(job) for tile, job in jobs_of.items()}
                records[call.key] = record = _Tuner(call, clock, until).run(known)
                if progress is not None:
                    progress(record)
            entries = [Entry(x.key, x.best, x.best_ms, x.default_ms) for x in records.values() if x.best_ms is not None]
            if entries:
                write(file, identity, entries)
    forget()
    return list(records.values())


class _Tuner:
    """Measures one kernel on what the kernels before it left."""

    def __init__(self, call: Call, clock: Clock, until: float) -> None:
        self._call, self._clock, self._until = call, clock, until
        names = _OUTPUTS[call.key.kernel]
        self._outputs = {name: call.arguments[name] for name in names if call.arguments[name] is not None}
        self._expected: dict[str, Tensor] | None = None

    def run(self, known: dict[Tile, str | None]) -> Record:
        """A record from candidates, the table's tile first, each with why it is known to fail, or None."""
        default = next(iter(known))
        times: dict[Tile, float] = {}
        failed: list[Failure] = []
        for tile, why in known.items():
            if self._clock.now() >= self._until:
                break
            if why is None:
                try:
                    why = self._check(launch := self._call.bind(tile))
                    if why is None:
                        times[tile] = self._clock.measure(tile, launch)
                except Exception as error:  # whatever Triton raises: it is not this tile
                    why = reason(error)
                    self._survived(tile, why)
            if why is not None:
                failed.append(Failure(tile, why))
        best = self._choose(default, times)
        for name, x in (self._expected or {}).items():
            self._outputs[name].copy_(x)
        return Record(self._call.key, default, times.get(default), best, times.get(best), len(times), tuple(failed))

    def _check(self, launch: Callable[[], Any]) -> str | None:
        """Runs a tile and says in which result it disagrees with the first one that ran."""
        for x in self._outputs.values():
            x.fill_(torch.nan)
        launch()
        if self._expected is None:
            self._expected = {name: x.clone() for name, x in self._outputs.items()}
            return None
        limit = _TOLERANCE[self._call.key.mode]
        for name, x in self._outputs.items():
            if not agrees(x, self._expected[name], limit):
                return f"another {name} than the first tile's"
        return None

    def _choose(self, default: Tile, times: dict[Tile, float]) -> Tile:
        """The fastest, where it is faster than the table's tile twice and by more than noise."""
        if not times:
            return default
        best = min(times, key=lambda tile: times[tile])
        if default not in times or best == default:
            return best
        for tile in (default, best):
            times[tile] = min(times[tile], self._clock.measure(tile, self._call.bind(tile)))
        return best if times[best] < (1 - _MARGIN) * times[default] else default

    def _survived(self, tile: Tile, why: str) -> None:
        """Raises where a failed tile took the device with it."""
        x = next(iter(self._outputs.values()))
        if not x.is_cuda:
            return
        try:
            torch.cuda.synchronize(x.device)
        except RuntimeError as error:
            raise ConfigError(
                f"tile {tile} of {self._call.key.kernel} left {x.device} unusable ({why}): take it out of the "
                "candidates and report it; what was measured before is kept"
            ) from error


def agrees(found: Tensor, expected: Tensor, limit: float) -> bool:
    """Whether two results differ by rounding, and are unwritten (NaN) at the same places."""
    found, expected = found.float(), expected.float()
    if not torch.equal(found.isnan(), expected.isnan()):
        return False
    off, expected = (found - expected).nan_to_num(), expected.nan_to_num()
    single = _SINGLE * limit * expected.square().mean().sqrt()
    return bool(off.norm() <= limit * expected.norm()) and bool(off.abs().max() <= single)


def model_cases(
    head_size: int,
    heads: int,
    angular_channels: Sequence[int] | None,
    modes: Iterable[str] = ("tf32x3",),
    num_neighbors: int | None = 30,
) -> list[Case]:
    """What a model asks of the kernels: its neighborhoods, and the last block's, where self tokens alone query.

    Args:
        head_size: channels of a head.
        heads: heads.
        angular_channels: channels per angular degree, or None.
        modes: of :data:`escaip.ops.triton.tiles.MODES`.
        num_neighbors: of an atom at most, None without a limit; it says how long walks get.
    """
    widths = (head_size,) if angular_channels is None else tuple(angular_channels)
    use = "angles" if len(widths) > 1 else "envelope"
    longest = float("inf") if num_neighbors is None else num_neighbors + 1
    sizes = [size for size, above in ((24, 16), (12, 0), (48, 32), (96, 63)) if longest > above]
    shape = (head_size, heads, widths)
    return [
        Case(kind, mode, *shape, _TOKENS // size, size) for mode in modes for size in sizes for kind in (use, "self")
    ]


HEADER = f"{'kernel':24} {'use':9} {'mode':9} {'own':>5} {'other':>5} {'table ms':>9} {'best ms':>9}  tile"


def line(record: Record) -> str:
    """What was found, in a line under :data:`HEADER`."""
    key = record.key
    times = " ".join(f"{'-' if ms is None else format(ms, '.4f'):>9}" for ms in (record.default_ms, record.best_ms))
    dropped = f", {len(record.failed)} dropped" if record.failed else ""
    tile = f"{record.best} (of {record.tried}{dropped})" if record.tried else f"{record.best} (not measured{dropped})"
    return f"{key.kernel:24} {key.use:9} {key.mode:9} {key.own:>5} {key.other:>5} {times}  {tile}"


def _jobs(case: Case, tiles: Callable[[TileKey], Sequence[Tile]]) -> Iterable[Job]:
    for call in replace(case, neighborhoods=2).calls(torch.device("cpu")):
        for tile in tiles(call.key):
            yield Job(case.small(), call.key.kernel, tile)


def _usable_cores() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, _MAX_WORKERS)
