from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from http_server import FileServer, Page, file_server
from toys import names, refusal

from escaip.data import download as module
from escaip.data.download import BLOCK, download
from escaip.errors import ConfigError, DataError
from escaip.files import DatasetCard, list_datasets

FAST = {"attempts": 4, "delay": 0.0, "progress": False}
ONCE = {"attempts": 1}
SIZE = 5 * BLOCK + 1234
CONTENT = bytes(bytearray((k * k + k // 251) % 256 for k in range(SIZE)))
OTHER = CONTENT[::-1]
MD5 = hashlib.md5(CONTENT).hexdigest()


@pytest.fixture(autouse=True)
def _no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy", "ESCAIP_DATA"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def server() -> Iterator[FileServer]:
    with file_server() as running:
        yield running


Card = Callable[..., DatasetCard]
Entry = Callable[..., dict[str, Any]]
Get = Callable[..., str]


@pytest.fixture
def card(tmp_path: Path) -> Card:
    """A card with these files."""

    def make(*files: dict[str, Any]) -> DatasetCard:
        manifest = {"dataset": {"homepage": "https://example.org/set"}, "files": list(files)}
        return DatasetCard("made", "made", manifest, tmp_path / "card")

    return make


@pytest.fixture
def entry(server: FileServer) -> Entry:
    """An entry of a card for ``/f``, with the right checksum unless told otherwise."""

    def make(name: str = "f.bin", path: str = "/f", **more: Any) -> dict[str, Any]:
        facts = {"name": name, "url": server.address + path, "md5": MD5, **more}
        return {key: value for key, value in facts.items() if value is not None}

    return make


@pytest.fixture
def get(card: Card, entry: Entry, tmp_path: Path) -> Get:
    """Downloads one file with these options, described by further keys of its entry."""

    def run(options: dict[str, Any] | None = None, **facts: Any) -> str:
        return download(card(entry(**facts)), **{"root": tmp_path / "data", **FAST, **(options or {})})

    return run


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "data" / "made" / "f.bin"


def assert_only(target: Path, content: bytes = CONTENT) -> None:
    assert target.read_bytes() == content
    assert names(target.parent) == [f".{target.name}.verified", target.name]


@pytest.mark.parametrize("content", [CONTENT, b""])
def test_whole_once_and_never_again(server: FileServer, get: Get, target: Path, content: bytes) -> None:
    server.pages["/f"] = Page(content)
    facts = {"size": len(content), "md5": hashlib.md5(content).hexdigest()}
    report, again = get(**facts), get(**facts)
    assert_only(target, content)
    assert len(server.asked) == 1
    assert f"downloaded, md5:{facts['md5']} (as published)" in report
    assert "1 files downloaded, 0 were there" in report
    assert "0 files downloaded, 1 were there" in again


@pytest.mark.parametrize("checksum", ["md5", "sha256", None])
def test_cuts_cost_nothing_but_the_block_on_its_way(
    server: FileServer, get: Get, target: Path, checksum: str | None
) -> None:
    digest = {} if checksum is None else {checksum: hashlib.new(checksum, CONTENT).hexdigest()}
    server.pages["/f"] = Page(CONTENT, cuts=[BLOCK + 7, 3, 2 * BLOCK, 0])
    report = get(**{"md5": None, **digest})
    assert_only(target)
    algorithm = checksum or "sha256"
    assert f"{algorithm}:{hashlib.new(algorithm, CONTENT).hexdigest()} (" in report
    asked = server.got("/f")
    assert [item.status for item in asked] == [200, 206, 206, 206, 206]
    assert server.sent("/f") - SIZE <= 4 * BLOCK
    for before, after in pairwise(asked):
        assert before.start + before.sent - BLOCK < after.start <= before.start + before.sent
        assert after.headers["if-range"] == '"one"'


OLD, NEW = "Sun, 13 Sep 2020 12:26:40 GMT", "Tue, 14 Nov 2023 22:13:20 GMT"
FAULTS: dict[str, tuple[Page, Page, list[int]]] = {
    # name: (the first, interrupted run meets; the second run meets; first bytes asked for, both runs together)
    "interrupted": (Page(CONTENT, cuts=[2 * BLOCK]), Page(CONTENT), [0, 2 * BLOCK]),
    "ignores Range": (Page(CONTENT, cuts=[2 * BLOCK], ranges=False), Page(CONTENT, ranges=False), [0, 0]),
    "another range": (Page(CONTENT, cuts=[2 * BLOCK]), Page(CONTENT, wrong_range=True), [0, BLOCK, 0]),
    "changed": (Page(OTHER, cuts=[BLOCK], etag='"1"'), Page(CONTENT, etag='"2"'), [0, 0]),
    "changed, ignores If-Range": (
        Page(OTHER, cuts=[BLOCK], etag='"1"'), Page(CONTENT, etag='"2"', if_range=False), [0, BLOCK, 0],
    ),
    "changed by date": (
        Page(OTHER, cuts=[BLOCK], etag=None, modified=OLD),
        Page(CONTENT, etag=None, modified=NEW, if_range=False), [0, BLOCK, 0],
    ),
    "longer than before": (Page(OTHER[:-1], cuts=[BLOCK]), Page(CONTENT), [0, BLOCK, 0]),
    "shorter than before": (Page(CONTENT + OTHER, cuts=[SIZE + 1]), Page(CONTENT), [0, SIZE + 1, 0]),
    "without a version": (Page(OTHER, cuts=[BLOCK], etag='W/"1"'), Page(CONTENT, etag='W/"2"'), [0, 0]),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("md5", [MD5, None])
def test_faults_of_servers_never_give_a_wrong_file(
    server: FileServer, get: Get, target: Path, fault: str, md5: str | None
) -> None:
    first, second, starts = FAULTS[fault]
    for page in (first, second):
        server.pages["/f"] = Page(**{**vars(page), "cuts": [*page.cuts]})
        if page is first:
            with pytest.raises(DataError, match=r"broke off.*kB are kept: run the same command again"):
                get(ONCE, md5=md5)
            assert names(target.parent) == ["f.bin.part", "f.bin.part.json"]
    get(md5=md5)
    assert_only(target)
    if md5 is None:
        assert [item.start for item in server.got("/f")] == starts


@pytest.mark.parametrize("length", ["chunked", "none", SIZE + 1000])
def test_lengths_that_are_missing_or_wrong(server: FileServer, get: Get, target: Path, length: Any) -> None:
    server.pages["/f"] = Page(CONTENT, length=length, cuts=[BLOCK] if length == "chunked" else [])
    if isinstance(length, int):
        with pytest.raises(DataError, match=r"f.bin: .*times"):
            get(md5=None)
        server.pages["/f"].length = SIZE - 1000
        with pytest.raises(DataError, match=f"md5 is .*, published is {MD5}"):
            get()
        assert names(target.parent) == []
        return
    get()
    assert_only(target)
    target.unlink()
    server.pages["/f"].cuts = [2 * BLOCK]
    if length == "none":
        with pytest.raises(DataError, match="neither the server nor the card states a length or checksum"):
            get(md5=None)
    get(md5=None, size=SIZE)
    assert_only(target)


def test_always_cut_without_ranges_gives_up(server: FileServer, get: Get, target: Path) -> None:
    server.pages["/f"] = Page(CONTENT, ranges=False, cuts=[2 * BLOCK] * 99)
    with pytest.raises(DataError, match=r"f.bin: the connection broke off"):
        get()
    assert len(server.got("/f")) <= 6
    assert not target.exists()


@pytest.mark.parametrize("sent_before", [[CONTENT[:-1] + b"!"], [OTHER, OTHER]])
def test_wrong_checksums_are_repaired_once(
    server: FileServer, get: Get, target: Path, sent_before: list[bytes]
) -> None:
    server.pages["/f"] = Page(CONTENT, sent_before=[*sent_before])
    if len(sent_before) == 2:
        wrong = hashlib.md5(OTHER).hexdigest()
        with pytest.raises(DataError, match=rf"md5 is {wrong}, published is {MD5}.*example.org/set"):
            get()
        assert names(target.parent) == []
    get()
    assert_only(target)


@pytest.mark.parametrize(
    ("part", "state", "start"),
    [
        (CONTENT, {"size": SIZE}, None),  # only the name is missing
        (OTHER[: 2 * BLOCK], {"size": SIZE}, 0),  # foreign bytes, found by the checksum
        (CONTENT[:100], {"url": "http://other/f"}, 0),
        (CONTENT[:100], {"size": 50}, 0),
        (CONTENT[:100], {"size": "x"}, 0),
        (CONTENT[:100], {"size": [SIZE]}, 0),
        (CONTENT[:100], {"version": 4}, 100),  # the checksum will tell
        (CONTENT[:100], {"size": SIZE + 1}, 0),
        (CONTENT[:100], "[]", 0),
        (CONTENT[:100], "{", 0),
    ],
)
def test_parts_of_earlier_runs(
    server: FileServer, get: Get, target: Path, part: bytes, state: Any, start: int | None
) -> None:
    server.pages["/f"] = Page(CONTENT)
    target.parent.mkdir(parents=True)
    target.with_name("f.bin.part").write_bytes(part)
    facts = {"url": f"{server.address}/f", "version": '"one"', "size": None}
    target.with_name("f.bin.part.json").write_text(state if isinstance(state, str) else json.dumps({**facts, **state}))
    get(size=SIZE)
    assert_only(target)
    assert [item.start for item in server.got("/f")][-1:] == ([] if start is None else [start])


@pytest.mark.parametrize("md5", [MD5, None])
def test_after_a_crash_of_the_machine_only_a_checksum_is_trusted(
    server: FileServer, get: Get, target: Path, md5: str | None
) -> None:
    server.pages["/f"] = Page(CONTENT, cuts=[3 * BLOCK])
    with pytest.raises(DataError):
        get(ONCE, md5=md5)
    state = target.with_name("f.bin.part.json")
    state.write_text(json.dumps({**json.loads(state.read_text()), "boot": "another"}))
    target.with_name("f.bin.part").write_bytes(CONTENT[:BLOCK] + bytes(2 * BLOCK))
    get(md5=md5)
    assert_only(target)


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_redirects_to_another_host_keep_the_range(server: FileServer, get: Get, target: Path, code: int) -> None:
    with file_server() as other:
        other.pages["/g"] = Page(CONTENT, cuts=[BLOCK])
        server.pages["/f"] = Page(redirect=(code, other.address.replace("127.0.0.1", "localhost") + "/g"))
        get()
        assert [item.start for item in other.got("/g")] == [0, BLOCK]
    assert_only(target)


def test_redirects_never_leave_encryption(get: Get, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import requests

    def answer(url: str, **_: Any) -> requests.Response:
        response = requests.Response()
        response.status_code, response.url, response.raw = 200, "http://example.org/f", io.BytesIO(CONTENT)
        return response

    monkeypatch.setattr(requests, "get", answer)
    with pytest.raises(DataError, match="without encryption"):
        get(url="https://example.org/f")
    assert not target.exists()


def test_passing_refusals_and_the_time_to_wait(
    server: FileServer, get: Get, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []

    class Patient(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            waits.append(timeout or 0.0)
            return False

    monkeypatch.setattr(module, "Event", Patient)
    server.pages["/f"] = Page(CONTENT, statuses=[500, (429, {"Retry-After": "7"}), 503])
    get({"delay": 2.0})
    assert_only(target)
    assert waits == [2.0, 7.0, 8.0]


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("page", "message"),
    [
        (Page(statuses=[404]), r"404 Not Found to .*/f: see https://example.org/set"),
        (Page(statuses=[403]), r"403 Forbidden to .*: see https://example.org/set for .*access"),
        (Page(statuses=[418]), r"answers 418"),
        (Page(statuses=[500] * 9), r"answers 500 Internal Server Error, 4 times"),
        (Page(statuses=[(429, {"Retry-After": "86400"})]), r"429 Too Many Requests and asks to wait 86400 s"),
        (Page(CONTENT, content_type="text/html; charset=utf-8"), "a web page came instead of the file"),
        (Page(CONTENT, headers={"Content-Encoding": "br"}), r"sends it compressed \(br\)"),
        (Page(CONTENT + b"x"), f"offers {SIZE + 1} bytes, the card says {SIZE}"),
        (Page(CONTENT, length=SIZE - 1), f"offers {SIZE - 1} bytes, the card says {SIZE}"),
        *(
            (Page(redirect=(302, address)), r"f.bin: .*/f cannot be asked for")
            for address in ("/f", "ftp://127.0.0.1/f", "file:///etc/passwd", "http://[broken/f")
        ),
    ],
)
def test_refusals_in_one_line(server: FileServer, get: Get, target: Path, page: Page, message: str) -> None:
    server.pages["/f"] = page
    with refusal(message):
        get(size=SIZE)
    assert names(target.parent) == []


def test_a_silent_server(server: FileServer, get: Get, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_TIMEOUT", 0.1)
    server.pages["/f"] = Page(CONTENT, pause=0.5)
    with pytest.raises(DataError, match="broke off"):
        get({"attempts": 2})
    server.pages["/f"].pause = 0.001
    get()
    assert_only(target)


def test_through_a_proxy(server: FileServer, get: Get, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", server.address)
    server.pages["/f"] = Page(CONTENT, cuts=[BLOCK])
    get(url="http://data.invalid/f")
    assert_only(target)
    assert all(item.proxied for item in server.asked)
    assert [item.start for item in server.got("/f")] == [0, BLOCK]


@pytest.mark.parametrize("proxy", ["", "the proxy for "])
def test_nobody_listens(get: Get, target: Path, monkeypatch: pytest.MonkeyPatch, proxy: str) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9" if proxy else "")
    with refusal(rf"no answer from {proxy}127.0.0.1 \(.*, 4 times"):
        get(url="http://127.0.0.1:9/f")
    assert names(target.parent) == []


@pytest.mark.parametrize("variable", ["REQUESTS_CA_BUNDLE", "SSL_CERT_FILE"])
def test_authorities_from_the_environment(
    get: Get, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variable: str
) -> None:
    monkeypatch.delenv("REQUESTS_CA_BUNDLE", raising=False)
    monkeypatch.setenv(variable, str(tmp_path / "absent.pem"))
    with pytest.raises(DataError, match=r"absent.pem"):
        get(url="https://127.0.0.1:9/f")


@pytest.mark.parametrize("md5", [MD5, None])
def test_a_file_on_disk_is_checked(server: FileServer, get: Get, target: Path, md5: str | None) -> None:
    server.pages["/f"] = Page(CONTENT)
    target.parent.mkdir(parents=True)
    target.write_bytes(CONTENT)
    get(md5=md5)
    status = target.stat()
    target.write_bytes(OTHER)
    with pytest.raises(DataError, match=r"is .*(published is|it was) .*: move or delete it"):
        get(md5=md5)
    os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns))
    get(md5=md5)  # size and time are those of the file that was checked
    with pytest.raises(DataError, match=r"is .*: move or delete it"):
        get({"verify": True}, md5=md5)
    target.write_bytes(CONTENT[:-1])
    with pytest.raises(DataError, match=f"has {SIZE - 1} bytes, published are {SIZE}"):
        get(size=SIZE, md5=md5)
    assert target.read_bytes() == CONTENT[:-1]
    assert server.asked == []


def test_several_files_at_a_time(server: FileServer, card: Card, entry: Entry, tmp_path: Path) -> None:
    contents = {f"part/{k}.bin": os.urandom(BLOCK + k) for k in range(6)}
    meeting = threading.Barrier(3)
    entries = []
    for k, (name, content) in enumerate(contents.items()):
        server.pages[f"/{name}"] = Page(content, meeting=meeting)
        entries.append(entry(name, f"/{name}", md5=hashlib.md5(content).hexdigest(), split="ab"[k % 2]))
    made, options = card(*entries), {"root": tmp_path, "progress": False, "attempts": 1}
    download(made, jobs=3, **options)
    assert [(tmp_path / "made" / name).read_bytes() for name in contents] == list(contents.values())
    assert "0 files downloaded, 3 were there" in download(made, split="a", **options)
    assert "0 files downloaded, 2 were there" in download(made, files=["part/[12]*"], **options)
    assert len(server.asked) == 6


def test_one_failure_does_not_stop_the_others(server: FileServer, card: Card, entry: Entry, tmp_path: Path) -> None:
    server.pages |= {"/f": Page(CONTENT), "/h": Page(CONTENT)}
    made = card(entry("f.bin"), entry("g.bin", "/g"), entry("h.bin", "/h"))
    with pytest.raises(DataError, match=r"g.bin: .*404.*\(1 of 3 files failed, 2 are there\)"):
        download(made, root=tmp_path, jobs=1, **FAST)
    assert (tmp_path / "made" / "h.bin").read_bytes() == CONTENT


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "val"}, r"split: made has no split 'val'; it has test, train"),
        ({"files": ["nothing"]}, r"file: made has no 'nothing'; there are f.bin, g.bin"),
        ({"jobs": 0}, "jobs: 0"),
    ],
)
def test_wrong_choices(card: Card, entry: Entry, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        download(card(entry("f.bin", split="train"), entry("g.bin", split="test")), **options)


@pytest.mark.bad_input
def test_gated_files(server: FileServer, get: Get, target: Path) -> None:
    with pytest.raises(DataError, match=rf"f.bin: cannot be .* a person: accept the terms \(http.*put it at {target}"):
        get(gated=True, how="accept the terms")
    assert server.asked == []
    assert "by hand" in get({"dry_run": True}, gated=True)
    target.parent.mkdir(parents=True)
    target.write_bytes(CONTENT)
    assert "as published" in get(gated=True)


def test_dry_run(server: FileServer, card: Card, entry: Entry, tmp_path: Path) -> None:
    folder = tmp_path / "made"
    folder.mkdir()
    (folder / "whole.bin").write_bytes(CONTENT)
    (folder / "begun.bin.part").write_bytes(CONTENT[:1000])
    made = card(
        entry("whole.bin", size=SIZE, split="train"),
        entry("begun.bin", approximate_size=3_000_000),
        entry("unknown.bin", "/h"),
    )
    report = download(made, root=tmp_path, dry_run=True)
    rows = [line.split() for line in report.splitlines()]
    assert rows[1] == ["whole.bin", "train", "657kB", "whole"]
    assert rows[2] == ["begun.bin", "-", "about", "3.00MB", "1.00kB"]
    assert rows[3] == ["unknown.bin", "-", "?", "-"]
    assert "needed 3.00MB and 1 files of unknown size" in report
    assert server.asked == []
    assert names(folder) == ["begun.bin.part", "whole.bin"]


def usage(free: int) -> Callable[[Any], Any]:
    return lambda path: shutil._ntuple_diskusage(10**12, 0, free)


@pytest.mark.bad_input
def test_a_disk_too_small_is_refused_before_anything(
    server: FileServer, get: Get, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.pages["/f"] = Page(CONTENT, cuts=[2 * BLOCK])
    monkeypatch.setattr(shutil, "disk_usage", usage(SIZE - 1))
    with pytest.raises(DataError, match=r"657kB are needed and 657kB are free.*--root"):
        get(size=SIZE)
    assert server.asked == []
    assert "1.00B too little" in get({"dry_run": True}, size=SIZE)
    with pytest.raises(DataError, match=r"f.bin: the disk is full \(657kB are needed"):  # known once the file comes
        get()
    server.pages["/f"].cuts = [2 * BLOCK]
    monkeypatch.setattr(shutil, "disk_usage", usage(SIZE))
    with pytest.raises(DataError, match="broke off"):
        get(ONCE, size=SIZE)
    monkeypatch.setattr(shutil, "disk_usage", usage(SIZE - 2 * BLOCK))  # bytes on disk are not needed again
    get(size=SIZE)
    assert_only(target)
    monkeypatch.setattr(shutil, "disk_usage", usage(2 * SIZE))
    more = {"extract": True, "dry_run": True}
    assert "needed 1.31MB" in get(more, name="f.tar", size=SIZE)
    assert "needed 2.63MB" in get(more, name="f.tar.gz", size=SIZE)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_keeps_the_part(
    server: FileServer, get: Get, target: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    server.pages["/f"] = Page(CONTENT)
    genuine = module._blocks

    def full(response: Any) -> Iterator[bytes]:
        for count, block in enumerate(genuine(response)):
            if count == 2:
                raise OSError(number, os.strerror(number))
            yield block

    with monkeypatch.context() as patch:
        patch.setattr(module, "_blocks", full)
        with pytest.raises(DataError, match=r"f.bin: the disk is full .*; received bytes are kept"):
            get()
    assert target.with_name("f.bin.part").read_bytes() == CONTENT[: 2 * BLOCK]
    get()
    assert_only(target)
    assert [item.start for item in server.got("/f")] == [0, 2 * BLOCK]


@pytest.mark.bad_input
def test_a_folder_that_cannot_be_written(server: FileServer, get: Get, tmp_path: Path, target: Path) -> None:
    server.pages["/f"] = Page(CONTENT)
    (tmp_path / "data").write_text("a file")
    with pytest.raises(DataError, match=r"f.bin: cannot be written|Not a directory|File exists"):
        get()
    (tmp_path / "data").unlink()
    target.mkdir(parents=True)
    with pytest.raises(DataError, match="is a folder"):
        get()


def test_two_at_once(server: FileServer, get: Get, target: Path) -> None:
    server.pages["/f"] = Page(CONTENT, pause=0.01)
    failures: list[str] = []

    def run() -> None:
        try:
            get()
        except DataError as error:
            failures.append(str(error))

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == ["f.bin: another process is downloading it; wait for that one"] * 2
    assert_only(target)
    assert len(server.got("/f")) == 1


def test_a_part_renamed_before_the_lock_is_not_written_to(
    server: FileServer, get: Get, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.pages["/f"] = Page(OTHER)
    genuine = module.try_lock

    def late(path: Path) -> Any:
        if not target.exists():
            path.write_bytes(CONTENT)
            path.rename(target)  # another process was quicker
            stream = open(target, "ab")  # noqa: SIM115
            return stream
        return genuine(path)

    monkeypatch.setattr(module, "try_lock", late)
    with pytest.raises(DataError, match="appeared meanwhile: run the same command again"):
        get()
    assert target.read_bytes() == CONTENT
    get()
    assert_only(target)


SCRIPT = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have set it aside
import json, sys
from pathlib import Path
from escaip.data.download import download
from escaip.files import DatasetCard
files, root = json.loads(sys.argv[1]), sys.argv[2]
card = DatasetCard("made", "made", {"dataset": {}, "files": files}, Path("card"))
download(card, root=root, progress=False, delay=0.01)
"""


def start(entry: dict[str, Any], root: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SCRIPT, json.dumps([entry]), str(root)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def wait_for(part: Path, size: int) -> None:
    for _ in range(2000):
        if part.exists() and part.stat().st_size >= size:
            return
        time.sleep(0.005)
    raise AssertionError(f"{part} did not grow")


# Ends the process without warning at the N-th call that changes names or lengths, or waits for the disk.
DYING = """
import os, pathlib
calls = [0]
def dying(function):
    def call(*arguments, **options):
        calls[0] += 1
        if calls[0] == int(sys.argv[3]):
            os._exit(9)
        return function(*arguments, **options)
    return call
import requests  # before, which also changes files
calls_of = {os: ("replace", "fsync", "ftruncate"), pathlib.Path: ("unlink", "write_text")}
for place, names in calls_of.items():
    for name in names:
        setattr(place, name, dying(getattr(place, name)))
"""


@pytest.mark.parametrize("published", [True, False])
def test_killed_at_every_step(server: FileServer, entry: Entry, get: Get, target: Path, published: bool) -> None:
    lines = SCRIPT.split("files, root")
    script = f"{lines[0]}{DYING}\nfiles, root{lines[1]}"
    md5 = hashlib.md5(CONTENT).hexdigest() if published else None
    step, status = 0, 9
    while status == 9:
        step += 1
        shutil.rmtree(target.parent, ignore_errors=True)
        server.asked.clear()
        server.pages["/f"] = Page(CONTENT, cuts=[BLOCK])
        command = [sys.executable, "-c", script, json.dumps([entry(md5=md5)]), str(target.parents[1]), str(step)]
        status = subprocess.run(command, check=False).returncode
        if target.exists():
            assert target.read_bytes() == CONTENT
            assert f".{target.name}.verified" in names(target.parent)
        get(md5=md5)
        assert_only(target)
        assert server.sent("/f") - SIZE <= 2 * BLOCK + 8 * (1 << 14)
    assert status == 0
    assert step > 8


def test_ctrl_c_says_how_to_go_on(server: FileServer, entry: Entry, target: Path) -> None:
    server.pages["/f"] = Page(CONTENT, pause=0.02)
    process = start(entry(), target.parents[1])
    wait_for(target.with_name("f.bin.part"), BLOCK)
    process.send_signal(signal.SIGINT)
    text = process.communicate(timeout=20)[1]
    assert "received bytes are kept: run the same command again to continue" in text.splitlines()
    server.pages["/f"].pause = 0.0
    assert start(entry(), target.parents[1]).communicate()[1] == ""
    assert_only(target)
    assert server.got("/f")[1].start >= BLOCK


def tar_of(files: dict[str, bytes], mode: str = "w", kind: bytes = tarfile.REGTYPE, link: str = "") -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode=mode) as archive:  # type: ignore[call-overload]
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size, member.type, member.linkname = len(content), kind, link
            archive.addfile(member, io.BytesIO(content))
    return made.getvalue()


def zip_of(files: dict[str, bytes]) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return made.getvalue()


FILES = {"top.txt": b"1", "deep/er/file.bin": CONTENT, "empty": b""}
MAKERS: dict[str, Callable[[dict[str, bytes]], bytes]] = {
    ".tar": tar_of,
    ".tar.gz": lambda files: tar_of(files, "w:gz"),
    ".tar.xz": lambda files: tar_of(files, "w:xz"),
    ".tgz": lambda files: tar_of(files, "w:gz"),
    ".zip": zip_of,
}


@pytest.mark.parametrize("suffix", MAKERS)
def test_unpacked_once(server: FileServer, get: Get, target: Path, suffix: str) -> None:
    content = MAKERS[suffix](FILES)
    server.pages["/f"] = Page(content)
    facts = {"name": f"set{suffix}", "md5": hashlib.md5(content).hexdigest(), "options": {"extract": True}}
    report = get(**facts)
    folder = target.parent / "set"
    assert f"unpacked into {folder}" in report
    assert {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()} == {
        **FILES,
        ".unpacked.json": (folder / ".unpacked.json").read_bytes(),
    }
    before = (folder / "top.txt").stat().st_ino
    get(**facts)
    assert (folder / "top.txt").stat().st_ino == before
    assert len(server.got("/f")) == 1
    assert names(target.parent) == [f".set{suffix}.verified", "set", f"set{suffix}"]


def test_unpacking_starts_again_and_replaces_its_own(server: FileServer, get: Get, target: Path) -> None:
    content = tar_of(FILES)
    server.pages["/f"] = Page(content)
    facts = {"name": "set.tar", "md5": None, "options": {"extract": True}}
    leftover = target.parent / ".set.tar.unpacking"
    leftover.mkdir(parents=True)
    (leftover / "old").write_text("of a killed run")
    get(**facts)
    assert names(target.parent / "set") == [".unpacked.json", "deep", "empty", "top.txt"]
    for name in ("set.tar", ".set.tar.verified"):
        (target.parent / name).unlink()
    server.pages["/f"] = Page(tar_of({"new": b"n"}))
    get(**facts)
    assert names(target.parent / "set") == [".unpacked.json", "new"]


@pytest.mark.bad_input
def test_a_foreign_folder_is_not_touched(server: FileServer, get: Get, target: Path) -> None:
    server.pages["/f"] = Page(tar_of(FILES))
    (target.parent / "set").mkdir(parents=True)
    (target.parent / "set" / "mine").write_text("mine")
    with pytest.raises(DataError, match=r"set: is there already and was not unpacked from set.tar: move it away"):
        get(name="set.tar", md5=None, options={"extract": True})
    assert names(target.parent / "set") == ["mine"]


def special_tar(kind: bytes, link: str) -> bytes:
    return tar_of({"odd": b""}, kind=kind, link=link)


def encrypted_zip() -> bytes:
    content = bytearray(zip_of({"odd": b"target"}))
    for sign, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(sign) + flags] |= 1
    return bytes(content)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("set.tar", tar_of({"../out": b"x"}), "outside"),
        ("set.tar", tar_of({"a/../../out": b"x"}), "outside"),
        ("set.tar", special_tar(tarfile.SYMTYPE, "/etc/passwd"), "odd"),
        ("set.tar", special_tar(tarfile.SYMTYPE, "../../out"), "outside"),
        ("set.tar", special_tar(tarfile.CHRTYPE, ""), "special"),
        ("set.zip", zip_of({"../out": b"x"}), "leads outside its folder"),
        ("set.zip", zip_of({"/out": b"x"}), "leads outside its folder"),
        ("set.zip", zip_of({"a\\..\\out": b"x"}), "leads outside its folder"),
        ("set.zip", encrypted_zip(), "encrypted"),
        ("set.tar", CONTENT, "cannot be unpacked"),
        ("set.tar.gz", tar_of(FILES, "w:gz")[:-300], "cannot be unpacked"),
        ("set.zip", zip_of(FILES)[:-300], "cannot be unpacked"),
        ("set.tar.xz", tar_of(FILES, "w:xz")[:600], "cannot be unpacked"),
        ("set.tar", tar_of({"a": b"x", "a/b": b"y"}), "cannot be written"),
    ],
)
def test_hostile_archives(
    server: FileServer, get: Get, target: Path, tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    server.pages["/f"] = Page(content)
    with refusal(message):
        get(name=name, md5=None, options={"extract": True})
    assert names(target.parent) == [f".{name}.verified", name]
    assert names(tmp_path) == ["data"]


def test_a_full_disk_while_unpacking_leaves_nothing(
    server: FileServer, get: Get, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.pages["/f"] = Page(tar_of(FILES))

    def full(archive: Path, folder: Path) -> None:
        (folder / "half").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "_unpack_into", full)
    with pytest.raises(DataError, match=r"set.tar: the disk is full"):
        get({"extract": True}, name="set.tar", md5=None)
    assert names(target.parent) == [".set.tar.verified", "set.tar"]


def test_the_root_comes_from_the_environment(
    server: FileServer, get: Get, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.pages["/f"] = Page(CONTENT)
    monkeypatch.setenv("ESCAIP_DATA", str(tmp_path / "elsewhere"))
    get({"root": None})
    assert_only(tmp_path / "elsewhere" / "made" / "f.bin")
    monkeypatch.delenv("ESCAIP_DATA")
    monkeypatch.chdir(tmp_path)
    get({"root": None})
    assert_only(tmp_path / "data" / "made" / "f.bin")


def test_every_card_can_be_planned(tmp_path: Path) -> None:
    for found in list_datasets():
        if found.manifest.get("files"):
            assert found.name in download(found, root=tmp_path, dry_run=True)
    assert names(tmp_path) == []


def test_files_of_cards_stay_in_their_folder_and_have_checksums() -> None:
    for card in list_datasets():
        entries = card.manifest.get("files", [])
        assert len({entry["name"] for entry in entries}) == len(entries)
        for entry in entries:
            # A name with a leading dot, or one of a part, would be that of another file's record.
            assert re.fullmatch(r"[\w-][\w.+-]*(/[\w-][\w.+-]*)*(?<!\.part)(?<!\.part\.json)", entry["name"])
            assert entry["url"].startswith("https://")
            assert re.fullmatch("[0-9a-f]{32}", entry.get("md5", "0" * 32))
            assert re.fullmatch("[0-9a-f]{64}", entry.get("sha256", "0" * 64))
            assert all(type(entry[key]) is int for key in ("size", "approximate_size") if key in entry)
