"""The tuner in Triton's interpreter with a clock of the test: what it chooses, drops, and leaves when time is up."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget
from triton.runtime.errors import OutOfResources

from escaip.errors import ConfigError
from escaip.ops.triton import compiling, launch, tuning
from escaip.ops.triton.candidates import candidates
from escaip.ops.triton.cases import Case
from escaip.ops.triton.compiling import Job
from escaip.ops.triton.launch import Call
from escaip.ops.triton.tile_files import Entry, Identity, read
from escaip.ops.triton.tiles import KERNELS, MODES, SIZES, USES, Tile, TileKey, table_tile
from escaip.ops.triton.tuning import CudaClock, Failure, Record, agrees, model_cases, tune

GPU = Identity("a GPU", 90, "3.6.0", "0123456789ab")
CASE = Case("angles", "tf32x3", 16, 1, (8, 8), 2, 5)
ALONE = Case("node", "tf32x3", 16, 1, (16,), 1, 4)
TABLE, FAST, SLOW = Tile(16, 16, 2), Tile(16, 16, 1), Tile(16, 32, 4)
TILES = (TABLE, FAST, SLOW)


class FakeClock:
    """Times by tile, and time that passes with each measurement."""

    def __init__(self, ms: dict[Tile, float], step: float = 0.0) -> None:
        self.ms, self.step, self.time = ms, step, 0.0
        self.measured: list[Tile] = []

    def now(self) -> float:
        return self.time

    def measure(self, tile: Tile, launch: Callable[[], Any]) -> float:
        self.measured.append(tile)
        self.time += self.step
        return self.ms[tile]


def run(path: Path, clock: FakeClock, cases: list[Case] | None = None, **options: Any) -> list[Record]:
    options = {"tiles": lambda key: TILES, "identity": GPU, **options}
    return tune(cases or [CASE], "cpu", clock=clock, path=path, **options)


@pytest.fixture
def simple(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that write the same numbers with every tile, in no time."""

    def bind(call: Call, tile: Tile) -> Callable[[], Any]:
        def write() -> None:
            for index, name in enumerate(tuning._OUTPUTS[call.key.kernel]):
                x = call.arguments[name]
                if x is not None:
                    x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(index)))

        return write

    monkeypatch.setattr(Call, "bind", bind)


@contextlib.contextmanager
def spoiled(monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Call, Tile], None]) -> Iterator[None]:
    """Launches after which ``spoil`` is called."""
    honest = Call.bind

    def bind(call: Call, tile: Tile) -> Callable[[], Any]:
        launched = honest(call, tile)

        def both() -> None:
            launched()
            spoil(call, tile)

        return both

    with monkeypatch.context() as patch:
        patch.setattr(Call, "bind", bind)
        yield


def test_the_fastest_tile_of_each_kernel_is_kept(tmp_path: Path) -> None:
    """Here the kernels run, in the interpreter: tiles agree with each other."""
    clock, seen = FakeClock({TABLE: 1.0, SLOW: 0.5}), []
    case = replace(CASE, neighborhoods=1)
    records = run(tmp_path / "tiles.json", clock, [case], tiles=lambda key: (TABLE, SLOW), progress=seen.append)
    assert [record.kernel for record in records] == list(KERNELS)
    assert records == seen
    for record in records:
        assert (record.default, record.default_ms, record.best, record.best_ms) == (TABLE, 1.0, SLOW, 0.5)
        assert (record.tried, record.failed) == (2, ())
        assert record.key == TileKey(record.kernel, "angles", "tf32x3", 48, 80, "<=16", "<=16")
    assert read(tmp_path / "tiles.json", GPU) == [Entry(record.key, SLOW, 0.5, 1.0) for record in records]


@pytest.mark.usefixtures("simple")
def test_a_tile_within_noise_of_the_table_is_not_taken(tmp_path: Path) -> None:
    records = run(tmp_path / "tiles.json", FakeClock({TABLE: 1.0, FAST: 0.98, SLOW: 2.0}))
    assert {record.best for record in records} == {TABLE}


@pytest.mark.usefixtures("simple")
def test_the_fastest_must_be_so_twice(tmp_path: Path) -> None:
    """The first launches of the table's tile may meet a device whose clock is still rising."""

    class Rising(FakeClock):
        def measure(self, tile: Tile, launch: Callable[[], Any]) -> float:
            first = tile not in self.measured[-3:] if tile == TABLE else False
            return super().measure(tile, launch) * (3.0 if first else 1.0)

    records = run(tmp_path / "tiles.json", Rising({TABLE: 1.0, FAST: 1.5, SLOW: 2.0}))
    assert {(record.best, record.best_ms) for record in records} == {(TABLE, 1.0)}


@pytest.mark.usefixtures("simple")
@pytest.mark.parametrize(
    ("kernel", "name", "where"),
    [
        ("forward_rows", "out", (3, 0, 7)), ("forward_rows", "lse", (9, 0)), ("backward_rows", "dn", (0, 4, 1)),
        ("backward_columns", "db", (0, 2)), ("double_backward_rows", "gq", (1, 0, 1)),
        ("double_backward_columns", "gn", (0, 9, 2)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("value", [torch.nan, 1e3])
def test_a_tile_that_computes_something_else_is_dropped(
    kernel: str, name: str, where: tuple[int, ...], value: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(call: Call, tile: Tile) -> None:
        if call.key.kernel == kernel and tile == FAST:
            call.arguments[name][where] = value

    clock = FakeClock({TABLE: 1.0, FAST: 0.1, SLOW: 0.5})
    with spoiled(monkeypatch, spoil):
        records = {record.kernel: record for record in run(tmp_path / "tiles.json", clock)}
    assert records[kernel].best == SLOW
    assert records[kernel].tried == 2
    assert records[kernel].failed == (Failure(FAST, f"another {name} than the first tile's"),)
    others = [record for record in records.values() if record.kernel != kernel]
    assert {(record.best, record.failed) for record in others} == {(FAST, ())}


def test_what_a_dropped_tile_left_is_not_read_by_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = {"forward_rows": "lse", "backward_rows": "dots", "double_backward_rows": "means"}
    last: list[torch.Tensor] = []

    def spoil(call: Call, tile: Tile) -> None:
        if tile == FAST and call.key.kernel in read:
            call.arguments[read[call.key.kernel]][0] = 3.0
        if call.key.kernel == "double_backward_columns":
            last.append(call.arguments["gk"].clone())

    with spoiled(monkeypatch, spoil):
        clock = FakeClock({TABLE: 1.0, FAST: 0.5})
        records = run(tmp_path / "tiles.json", clock, [ALONE], tiles=lambda key: (TABLE, FAST))
    assert [len(record.failed) for record in records] == [1, 1, 0, 1, 0]
    calls = ALONE.calls(torch.device("cpu"))
    for call in calls:
        call.bind(TABLE)()
    torch.testing.assert_close(last[-1], calls[-1].arguments["gk"])


def test_what_a_tile_does_not_write_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results of the tile before it must not pass for its own."""
    honest = Call.bind

    def bind(call: Call, tile: Tile) -> Callable[[], Any]:
        return (lambda: None) if tile == FAST else honest(call, tile)

    monkeypatch.setattr(Call, "bind", bind)
    clock = FakeClock({TABLE: 1.0, FAST: 0.1})
    records = run(tmp_path / "tiles.json", clock, [ALONE], tiles=lambda key: (TABLE, FAST))
    assert {record.best for record in records} == {TABLE}
    assert all(len(record.failed) == 1 for record in records)


@pytest.mark.usefixtures("simple")
def test_a_tile_that_does_not_fit_is_dropped_and_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(call: Call, tile: Tile) -> None:
        if tile == FAST:
            raise OutOfResources(300_000, 232_448, "shared memory")

    with spoiled(monkeypatch, spoil):
        records = run(tmp_path / "tiles.json", FakeClock({TABLE: 1.0, FAST: 0.1, SLOW: 0.5}))
    for record in records:
        assert record.best == SLOW
        assert record.tried == 2
        assert [failure.tile for failure in record.failed] == [FAST]
        assert record.failed[0].reason.startswith("OutOfResources: out of resource: shared memory, Required: 300000")


@pytest.mark.usefixtures("simple")
def test_where_the_table_does_not_fit_another_tile_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(call: Call, tile: Tile) -> None:
        if tile == TABLE:
            raise OutOfResources(300_000, 101_376, "shared memory")

    with spoiled(monkeypatch, spoil):
        records = run(tmp_path / "tiles.json", FakeClock({FAST: 0.1, SLOW: 0.5}))
    assert {(record.default_ms, record.best, record.best_ms) for record in records} == {(None, FAST, 0.1)}
    assert [entry.default_ms for entry in read(tmp_path / "tiles.json", GPU)] == [None] * 5


@pytest.mark.usefixtures("simple")
def test_where_nothing_runs_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(call: Call, tile: Tile) -> None:
        raise RuntimeError("PassManager::run failed")

    with spoiled(monkeypatch, spoil):
        records = run(tmp_path / "tiles.json", FakeClock({}))
    assert {(record.best, record.best_ms, record.tried, len(record.failed)) for record in records} == {
        (TABLE, None, 0, 3)
    }
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("simple")
def test_what_did_not_compile_is_not_launched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Job] = []

    def compile_some(jobs: list[Job], target: Any, workers: int, seconds: float) -> dict[Job, str | None]:
        asked.extend(jobs)
        assert (workers, seconds) == (3, 60.0)
        return {job: "PTXASError: too many registers" if job.tile == FAST else None for job in jobs}

    class OnGpu:
        """The tensors stay on the CPU; only the question for a GPU is answered otherwise."""

        type, index = "cuda", 0

    monkeypatch.setattr(tuning, "compile_ahead", compile_some)
    monkeypatch.setattr(tuning.triton.runtime.driver, "_active", compiling._Named(GPUTarget("cuda", 90, 32)))
    monkeypatch.setattr(tuning.torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(tuning.torch, "device", lambda name: torch_device("cpu") if name == "cpu" else OnGpu())
    torch_device = type(torch.empty(0).device)
    honest = Case.calls
    monkeypatch.setattr(Case, "calls", lambda case, device: honest(case, torch_device("cpu")))
    clock = FakeClock({TABLE: 1.0, SLOW: 2.0})
    options = {"tiles": lambda key: TILES, "identity": GPU, "workers": 3, "seconds": 100.0}
    records = tune([CASE], "cuda", clock=clock, path=tmp_path / "tiles.json", **options)
    assert {record.failed for record in records} == {(Failure(FAST, "PTXASError: too many registers"),)}
    assert asked == [Job(CASE.small(), kernel, tile) for kernel in KERNELS for tile in TILES]


@pytest.mark.usefixtures("simple")
def test_when_time_is_up_the_table_stays(tmp_path: Path) -> None:
    """Three tiles of the first kernel and the two measured again take 5 s, the first of the second kernel a sixth."""
    clock = FakeClock({TABLE: 1.0, FAST: 0.5, SLOW: 2.0}, step=1.0)
    records = run(tmp_path / "tiles.json", clock, seconds=6.0)
    assert clock.measured == [TABLE, FAST, SLOW, TABLE, FAST, TABLE]
    assert [record.tried for record in records] == [3, 1, 0, 0, 0]
    assert [record.best for record in records] == [FAST, *[TABLE] * 4]
    assert [record.best_ms for record in records] == [0.5, 1.0, None, None, None]
    assert [entry.key.kernel for entry in read(tmp_path / "tiles.json", GPU)] == list(KERNELS[:2])


@pytest.mark.usefixtures("simple")
def test_cases_that_share_a_key_are_measured_once(tmp_path: Path) -> None:
    clock = FakeClock({TABLE: 1.0, FAST: 0.5, SLOW: 2.0})
    cases = [CASE, replace(CASE, neighborhoods=3), replace(CASE, use="self")]
    records = run(tmp_path / "tiles.json", clock, cases)
    assert [record.key.use for record in records] == ["angles"] * 5 + ["envelope"] * 5
    assert len({record.key for record in records}) == 10
    assert len(clock.measured) == 10 * (len(TILES) + 2)


@pytest.mark.usefixtures("simple")
def test_each_case_is_kept_as_it_is_done(tmp_path: Path) -> None:
    """A session may end in the middle of a later one."""

    class Ending(FakeClock):
        def measure(self, tile: Tile, launch: Callable[[], Any]) -> float:
            if len(self.measured) == 27:
                raise KeyboardInterrupt
            return super().measure(tile, launch)

    clock = Ending({TABLE: 1.0, FAST: 0.5, SLOW: 2.0})
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "tiles.json", clock, [CASE, replace(CASE, use="self")])
    assert len(read(tmp_path / "tiles.json", GPU)) == 5


@pytest.mark.bad_input
def test_without_a_gpu_or_a_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="CUDA device, and this is cpu"):
        tune([CASE], "cpu")
    monkeypatch.setattr(tuning, "user_file", lambda identity: None)
    with pytest.raises(ConfigError, match="ESCAIP_CACHE"):
        tune([CASE], "cpu", clock=FakeClock({}), identity=GPU)
    with pytest.raises(ConfigError, match=r"'sideways'.*uses are angles"):
        Case("sideways", "tf32", 16, 1, (16,), 2, 5)


def test_the_clock_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it asks of the device, on one that is made up: the median of single launches after others to warm up."""
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("event")
            self.at = len(log)

        def elapsed_time(self, end: Event) -> float:
            assert end.at == self.at + 2  # the launch alone lies between
            return 2.0 if end.at % 3 else 2.5

    class Properties:
        L2_cache_size = 50

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *device: log.append("wait"))
    monkeypatch.setattr(CudaClock, "_FLUSHED", 64)
    clock = CudaClock(torch.device("cpu"))
    assert clock._flushed.numel() == 100
    assert log == ["wait"]
    assert clock.measure(TABLE, lambda: log.append("launch")) in (2.0, 2.5)
    assert log.count("launch") in (3 + 8, 3 + 10)  # 20 ms of them
    assert log.count("wait") == 3
    assert clock.now() <= clock.now()


def test_agreement_is_of_rounding_and_of_single_numbers() -> None:
    expected = torch.randn(100, 8)
    assert agrees(expected * (1 + 5e-5), expected, 1e-4)
    assert not agrees(expected * (1 + 2e-4), expected, 1e-4)
    many = torch.randn(100_000)
    one = many.clone()
    one[7] += 0.02  # 6e-5 of the norm
    assert not agrees(one, many, 1e-4)
    assert agrees(one, many, 1e-3)
    hole = expected.clone()
    hole[3, 3] = torch.nan
    assert not agrees(hole, expected, 1e-2)
    assert not agrees(expected, hole, 1e-2)
    assert agrees(hole, hole, 1e-4)
    assert agrees(torch.zeros(3), torch.zeros(3), 1e-4)
    assert not agrees(torch.full((3,), torch.inf), torch.ones(3), 1e-2)


@pytest.mark.parametrize("use", ["angles", "envelope", "self", "node"])
def test_a_case_runs_what_a_model_would(use: str) -> None:
    """Its calls, one after the other, leave what the three functions return."""
    case = Case(use, "bfloat16", 16, 1, (8, 0, 8), 3, 6)
    calls = case.calls(torch.device("cpu"))
    assert [call.key.kernel for call in calls] == list(KERNELS)
    assert {call.key.mode for call in calls} == {"bfloat16"}
    for call in calls:
        call.bind(Tile(32, 32, 2))()
    problem = case.problem(torch.device("cpu"))
    assert problem.q.dtype == torch.bfloat16
    assert problem.k.shape[0] == 18
    assert problem.key_offsets.diff().unique().numel() > 1
    torch.testing.assert_close(calls[0].arguments["out"], launch.forward(problem).out)
    assert all(torch.isfinite(calls[-1].arguments[name].float()).all() for name in ("gk", "gv"))


def test_the_mode_of_a_case_is_that_of_its_products() -> None:
    for mode in MODES:
        calls = replace(CASE, mode=mode).calls(torch.device("cpu"))
        precision = {"float16": "tf32", "bfloat16": "tf32"}.get(mode, mode)
        assert {call.arguments["PRECISION"] for call in calls} == {precision}
        assert {call.key.mode for call in calls} == {mode}


def test_cases_of_a_model() -> None:
    cases = model_cases(32, 6, (10, 5, 2, 5, 10), ("tf32x3", "bfloat16"), num_neighbors=30)
    assert [(case.use, case.mode, case.size) for case in cases[:4]] == [
        ("angles", "tf32x3", 24), ("self", "tf32x3", 24), ("angles", "tf32x3", 12), ("self", "tf32x3", 12),
    ]  # fmt: skip
    assert len(cases) == 8
    assert {case.size for case in model_cases(64, 8, None, num_neighbors=None)} == {12, 24, 48, 96}
    assert {case.use for case in model_cases(64, 8, None)} == {"envelope", "self"}
    assert {case.size for case in model_cases(64, 8, None, num_neighbors=10)} == {12}


def test_candidates_are_few_distinct_and_begin_with_the_table() -> None:
    for kernel in KERNELS:
        for use in USES:
            for mode in MODES:
                for columns in (32, 64, 112):
                    for own in SIZES:
                        for other in SIZES:
                            key = TileKey(kernel, use, mode, columns, columns, own, other)
                            tiles = candidates(key)
                            assert tiles[0] == table_tile(key)
                            assert len(set(tiles)) == len(tiles)
                            assert 4 <= len(tiles) <= 14, key
