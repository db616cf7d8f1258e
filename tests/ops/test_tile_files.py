"""Measured tiles in files: what is kept, what is refused, and which of them a launch takes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from escaip.errors import ConfigError, DataError
from escaip.ops.triton import tile_files
from escaip.ops.triton.tile_files import Entry, Identity, load, read, user_file, write
from escaip.ops.triton.tiles import (
    KERNELS,
    MODES,
    OVERRIDES,
    SIZES,
    USES,
    Tile,
    TileKey,
    choose_tile,
    size_class,
    table_tile,
)  # fmt: skip

GPU = Identity("NVIDIA H100 80GB HBM3", 90, "3.6.0", "0123456789ab")
KEY = TileKey("forward_rows", "angles", "tf32x3", 112, 176, "<=32", "<=32")
ENTRY = Entry(KEY, Tile(32, 32, 4, 2), 0.5, 0.75)
CUDA = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache and an empty shipped folder; returns the latter."""
    shipped = tmp_path / "measured"
    shipped.mkdir()
    monkeypatch.setenv("ESCAIP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tile_files, "SHIPPED", shipped)
    monkeypatch.setattr(tile_files, "measured_tiles", lambda device: load(GPU))
    return shipped


def kept(identity: Identity = GPU) -> Path:
    path = user_file(identity)
    assert path is not None
    return path


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = kept()
    assert path.parent == tmp_path / "cache" / "tiles"
    assert path.name == "NVIDIA-H100-80GB-HBM3-triton-3.6.0-0123456789ab.json"
    other = Entry(replace(KEY, kernel="backward_rows"), Tile(16, 64, 8), 1.0, None)
    write(path, GPU, [ENTRY, other])
    assert read(path, GPU) == [ENTRY, other]
    assert list(path.parent.iterdir()) == [path]


def test_a_second_run_adds_and_replaces() -> None:
    other = Entry(replace(KEY, mode="bfloat16"), Tile(16, 16, 1), 0.1, 0.1)
    again = replace(ENTRY, tile=Tile(16, 16, 2), ms=0.4)
    write(kept(), GPU, [ENTRY])
    write(kept(), GPU, [other])
    write(kept(), GPU, [again])
    assert read(kept(), GPU) == [again, other]


def test_an_interrupted_write_leaves_the_old_file(monkeypatch: pytest.MonkeyPatch) -> None:
    write(kept(), GPU, [ENTRY])
    before = kept().read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tile_files.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write(kept(), GPU, [replace(ENTRY, ms=0.1)])
    assert kept().read_bytes() == before
    assert list(kept().parent.iterdir()) == [kept()]


@pytest.mark.parametrize(
    ("name", "value"), [("device", "NVIDIA H200"), ("arch", 80), ("triton", "3.7.1"), ("kernels", "ba9876543210")]
)
def test_a_file_serves_one_device_triton_and_state_of_the_kernels(name: str, value: Any) -> None:
    write(kept(), GPU, [ENTRY])
    here = replace(GPU, **{name: value})
    if name != "arch":  # two devices of one name have one architecture
        assert load(here).entries == ()
    assert kept(here) != kept() or name == "arch"
    kept(here).write_bytes(kept().read_bytes())  # as when a cache is copied and renamed
    with pytest.raises(DataError, match=f"{name} is .* there and .* here.*escaip tune"):
        read(kept(here), here)
    with pytest.warns(UserWarning, match="cannot be used"):
        assert load(here).entries == ()


def change(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("item", "value"),
    [
        ("kernel", "sideways_rows"), ("use", ["angles"]), ("mode", "fp8"), ("own", "<=8"), ("other", None),
        ("columns", 0), ("columns", True), ("widest", None),
        ("tile", [24, 16, 2, 1]), ("tile", [16, 8, 2, 1]), ("tile", [16, 512, 2, 1]),
        ("tile", [16, 16, 3, 1]), ("tile", [16, 16, 2, 0]), ("tile", [16, 16, 2, 99]), ("tile", [16, 16, 2]),
        ("tile", [16.0, 16, 2, 1]), ("tile", "16x16"), ("ms", "fast"), ("ms", -1.0), ("ms", None),
        ("default_ms", float("nan")),
    ],
)  # fmt: skip
def test_a_tile_that_no_tuner_writes_is_refused(item: str, value: Any) -> None:
    write(kept(), GPU, [ENTRY])
    change(kept(), lambda content: content["tiles"][0].update({item: value}))
    with pytest.raises(DataError, match="cannot be used"):
        read(kept(), GPU)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "text", ["", '{"schema": 1', "[]", '{"schema": 2}', '{"tiles": []}', "\udcff", '{"schema": 1, "tiles": 3}']
)
def test_a_broken_file_is_one_warning_and_the_table(text: str) -> None:
    kept().write_bytes(text.encode(errors="surrogateescape"))
    with pytest.warns(UserWarning, match="escaip tune") as caught:
        assert load(GPU).entries == ()
    assert len(caught) == 1
    line = str(caught[0].message)
    assert str(kept()) in line
    assert "\n" not in line
    write(kept(), GPU, [ENTRY])  # the remedy it names
    assert load(GPU).entries == (ENTRY,)


def test_another_users_cache_is_one_warning(monkeypatch: pytest.MonkeyPatch, places: Path) -> None:
    def foreign(_: str) -> Path:
        raise ConfigError("the cache belongs to another user: set ESCAIP_CACHE to a folder of yours")

    write(places / f"{GPU.slug}.json", GPU, [ENTRY])
    monkeypatch.setattr(tile_files, "cache_folder", foreign)
    with pytest.warns(UserWarning, match="ESCAIP_CACHE"):
        assert load(GPU).entries == (ENTRY,)


def test_fewer_columns_share_a_tile_and_more_do_not() -> None:
    wide = Entry(replace(KEY, widest=144, columns=224), Tile(16, 16, 4), 1.0, 2.0)
    write(kept(), GPU, [wide, ENTRY])
    found = load(GPU)
    expected = {96: ENTRY.tile, 176: ENTRY.tile, 192: wide.tile, 224: wide.tile, 240: None}
    assert {columns: found.find(replace(KEY, columns=columns)) for columns in expected} == expected
    assert found.find(replace(KEY, widest=65)) == ENTRY.tile
    for other in (replace(KEY, use="envelope"), replace(KEY, own="<64"), replace(KEY, mode="tf32")):
        assert found.find(other) is None
    assert found.find(replace(KEY, widest=64)) is None


def test_the_order_of_places(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_tile(KEY, CUDA) == table_tile(KEY) == Tile(16, 32, 4)
    backward = replace(KEY, kernel="backward_rows")
    shipped = [Entry(KEY, Tile(16, 16, 1), 1.0, 1.0), Entry(backward, Tile(16, 16, 4), 1.0, 1.0)]
    write(places / f"{GPU.slug}.json", replace(GPU, triton="3.6.1"), shipped)
    assert choose_tile(KEY, CUDA) == Tile(16, 16, 1)
    write(kept(), GPU, [ENTRY])
    assert choose_tile(KEY, CUDA) == ENTRY.tile
    assert choose_tile(backward, CUDA) == Tile(16, 16, 4)  # the user did not measure it
    assert choose_tile(replace(KEY, kernel="backward_columns"), CUDA) == Tile(16, 32, 4)
    monkeypatch.setitem(OVERRIDES, KEY.kernel, Tile(64, 64, 8))
    assert choose_tile(KEY, CUDA) == Tile(64, 64, 8)


def test_a_shipped_file_of_another_triton_is_passed_over_in_silence(places: Path) -> None:
    write(places / f"{GPU.slug}.json", replace(GPU, triton="3.5.9"), [ENTRY])
    assert load(GPU).entries == ()


def test_shipped_files_are_of_these_kernels() -> None:
    folder = Path(tile_files.__file__).parent / "measured"
    assert (folder / "README.md").is_file()
    for path in folder.glob("*.json"):
        content = json.loads(path.read_text())
        identity = Identity(*(content[name] for name in ("device", "arch", "triton")), tile_files.kernels_digest())
        assert path.stem == identity.slug
        assert read(path, identity) != []


def test_the_digest_follows_the_source_of_every_kernel(tmp_path: Path) -> None:
    source = Path(tile_files.__file__).parent
    compiled = {path.stem for path in source.glob("*.py") if "@triton." in path.read_text()}
    assert compiled == set(tile_files.SOURCES)
    copy = tmp_path / "copy"
    shutil.copytree(source, copy)
    assert tile_files.digest_of(copy) == tile_files.kernels_digest()
    for name in tile_files.SOURCES:
        before = tile_files.digest_of(copy)
        with (copy / f"{name}.py").open("a") as stream:
            stream.write("\n")
        assert tile_files.digest_of(copy) != before, name


def test_without_a_cuda_device_nothing_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def touched(device: torch.device) -> None:
        raise AssertionError(device)

    monkeypatch.setattr(tile_files, "measured_tiles", touched)
    for device in (None, torch.device("cpu")):
        assert choose_tile(KEY, device) == table_tile(KEY)


def test_files_are_read_once_per_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    seen = []
    monkeypatch.setattr(tile_files, "identity_of", lambda device: seen.append(device) or GPU)
    monkeypatch.setattr(tile_files, "load", lambda identity: tile_files.MeasuredTiles((ENTRY,)))
    tile_files.forget()
    try:
        assert [choose_tile(KEY, CUDA) for _ in range(3)] == [ENTRY.tile] * 3
        assert len(seen) == 1
        tile_files.forget()
        choose_tile(KEY, CUDA)
        choose_tile(KEY, torch.device("cuda", 1))
        assert len(seen) == 3
    finally:
        tile_files.forget()


def test_the_table_is_as_it_was() -> None:
    """Tiles before anything was measured, by the rule in words of means that they were chosen by."""
    long = {
        ("node", "bfloat16", 32): Tile(64, 64, 4, 2), ("node", "float16", 128): Tile(64, 64, 8, 2),
        ("envelope", "tf32x3", 64): Tile(32, 64, 4, 2), ("node", "tf32", 65): Tile(16, 32, 4),
    }  # fmt: skip
    for (use, mode, columns), tile in long.items():
        assert (
            table_tile(TileKey("forward_rows", use, mode, columns, 2 * columns, size_class(64), size_class(1e4)))
            == tile
        )
    for kernel in KERNELS:
        for own, other, use in [
            (20.0, 20.0, "angles"),
            (1.0, 17.0, "envelope"),
            (63.9, 100.0, "node"),
            (80, 80, "angles"),
        ]:
            assert table_tile(TileKey(kernel, use, "tf32", 64, 128, size_class(own), size_class(other))) == Tile(
                16, 32, 4
            )
        assert table_tile(TileKey(kernel, "angles", "tf32", 64, 128, size_class(90), size_class(16))) == Tile(16, 16, 2)
    assert [size_class(mean) for mean in (0.0, 16, 16.1, 32, 32.5, 63.9, 64, 1e9)] == [
        "<=16", "<=16", "<=32", "<=32", "<64", "<64", ">=64", ">=64",
    ]  # fmt: skip


def test_every_key_has_a_tile() -> None:
    for kernel in KERNELS:
        for use in USES:
            for mode in MODES:
                for own in SIZES:
                    for columns in (32, 64, 300):
                        assert isinstance(table_tile(TileKey(kernel, use, mode, columns, columns, own, own)), Tile)
