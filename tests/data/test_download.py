from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from email.utils import formatdate
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from http_server import FileServer, Page, file_server

from escaip.data import transfer, transfer_disk, transfer_http
from escaip.data.download import DownloadReport, download
from escaip.data.transfer import BLOCK
from escaip.data.transfer_http import RetryPolicy
from escaip.errors import ConfigError, DataError
from escaip.files import DatasetCard

FAST = RetryPolicy(attempts=4, first_delay=0.0, connect_timeout=5.0, read_timeout=5.0)
SIZE = 5 * BLOCK + 1234
CONTENT = bytes(bytearray((k * k + k // 251) % 256 for k in range(SIZE)))
OTHER = CONTENT[::-1]


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
Get = Callable[..., DownloadReport]


@pytest.fixture
def card(tmp_path: Path) -> Card:
    """A card with these files."""

    def make(*files: dict[str, Any]) -> DatasetCard:
        manifest = {"dataset": {"homepage": "https://example.org/set"}, "files": list(files)}
        return DatasetCard("made", "made", manifest, tmp_path / "card")

    return make


@pytest.fixture
def entry(server: FileServer) -> Callable[..., dict[str, Any]]:
    """An entry of a card for ``/f``, with the right checksum unless told otherwise."""

    def make(name: str = "f.bin", path: str = "/f", **more: Any) -> dict[str, Any]:
        facts = {"name": name, "url": server.address + path, "md5": hashlib.md5(CONTENT).hexdigest(), **more}
        return {key: value for key, value in facts.items() if value is not None}

    return make


@pytest.fixture
def get(card: Card, entry: Callable[..., dict[str, Any]], tmp_path: Path) -> Get:
    """Downloads one file, described by further keys of its entry."""

    def run(policy: RetryPolicy = FAST, more: dict[str, Any] | None = None, **facts: Any) -> DownloadReport:
        options = {"root": tmp_path / "data", "retries": policy, "progress": False, **(more or {})}
        return download(card(entry(**facts)), **options)

    return run


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "data" / "made" / "f.bin"


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir()) if folder.exists() else []


def assert_only(target: Path, content: bytes = CONTENT) -> None:
    assert target.read_bytes() == content
    assert names(target.parent) == [f".{target.name}.verified", target.name]


def test_whole_once_and_never_again(server: FileServer, get: Get, target: Path) -> None:
    server.pages["/f"] = Page(CONTENT)
    report = get(size=SIZE)
    assert_only(target)
    assert report.files[0].new
    assert report.files[0].published
    assert report.files[0].digest == f"md5:{hashlib.md5(CONTENT).hexdigest()}"
    again = get(size=SIZE)
    assert not again.files[0].new
    assert len(server.asked) == 1
    assert "1 files downloaded" in report.summary()
    assert "1 were there" in again.summary()


@pytest.mark.parametrize("checksum", ["md5", "sha256", None])
def test_cuts_cost_nothing_but_the_block_on_its_way(
    server: FileServer, get: Get, target: Path, checksum: str | None
) -> None:
    digest = {} if checksum is None else {checksum: hashlib.new(checksum, CONTENT).hexdigest()}
    server.pages["/f"] = Page(CONTENT, cuts=[BLOCK + 7, 3, 2 * BLOCK, 0])
    report = get(**{"md5": None, **digest})
    assert_only(target)
    assert report.files[0].published == (checksum is not None)
    algorithm = checksum or "sha256"
    assert report.files[0].digest == f"{algorithm}:{hashlib.new(algorithm, CONTENT).hexdigest()}"
    asked = server.got("/f")
    assert [item.status for item in asked] == [200, 206, 206, 206, 206]
    assert server.sent("/f") - SIZE <= 4 * BLOCK
    for before, after in pairwise(asked):
        assert before.start + before.sent - BLOCK < after.start <= before.start + before.sent
        assert after.headers["if-range"] == '"one"'


def test_another_process_continues(server: FileServer, get: Get, target: Path) -> None:
    server.pages["/f"] = Page(CONTENT, cuts=[2 * BLOCK], statuses=[])
    with pytest.raises(DataError, match=r"broke off.*262 kB are kept: run the same command again"):
        get(RetryPolicy(attempts=1))
    assert names(target.parent) == ["f.bin.part", "f.bin.part.json"]
    get()
    assert_only(target)
    assert [item.start for item in server.got("/f")] == [0, 2 * BLOCK]


def test_a_part_that_is_whole_is_not_asked_for(server: FileServer, get: Get, target: Path) -> None:
    server.pages["/f"] = Page(CONTENT, cuts=[2 * BLOCK])
    with pytest.raises(DataError):
        get(RetryPolicy(attempts=1))
    target.with_name("f.bin.part").write_bytes(CONTENT)
    get()
    assert_only(target)
    assert len(server.got("/f")) == 1


def test_bytes_not_synced_before_a_crash_of_the_machine_are_not_trusted(
    server: FileServer, get: Get, target: Path
) -> None:
    server.pages["/f"] = Page(CONTENT, cuts=[3 * BLOCK])
    with pytest.raises(DataError):
        get(RetryPolicy(attempts=1), md5=None)
    state = target.with_name("f.bin.part.json")
    state.write_text(json.dumps({**json.loads(state.read_text()), "boot": "another", "synced": BLOCK}))
    target.with_name("f.bin.part").write_bytes(CONTENT[:BLOCK] + bytes(2 * BLOCK))
    get(md5=None)
    assert_only(target)
    assert server.got("/f")[-1].start == BLOCK


WRONG_STATES = [
    "",
    "{",
    "[]",
    "{}",
    '{"url": 3, "validator": 4, "size": "x", "boot": 1, "synced": -1}',
    '{"url": "URL", "validator": 4, "size": null, "boot": "b", "synced": 1}',
    '{"url": "URL", "validator": "v", "size": "x", "boot": "b", "synced": 1}',
    '{"url": "URL", "validator": "v", "size": null, "boot": "b", "synced": -1}',
    '{"url": "URL", "validator": "v", "size": null, "boot": "b", "synced": true}',
]


@pytest.mark.parametrize("state", WRONG_STATES)
def test_a_damaged_state_starts_over(server: FileServer, get: Get, target: Path, state: str) -> None:
    server.pages["/f"] = Page(CONTENT)
    target.parent.mkdir(parents=True)
    target.with_name("f.bin.part").write_bytes(OTHER[:100])
    target.with_name("f.bin.part.json").write_text(state.replace("URL", f"{server.address}/f"))
    assert get().messages == ()
    assert_only(target)
    assert len(server.got("/f")) == 1


def test_another_address_or_size_in_the_card_starts_over(server: FileServer, get: Get, target: Path) -> None:
    server.pages["/f"] = Page(OTHER, cuts=[BLOCK])
    server.pages["/new"] = Page(CONTENT, cuts=[BLOCK])
    with pytest.raises(DataError):
        get(RetryPolicy(attempts=1))
    with pytest.raises(DataError):
        get(RetryPolicy(attempts=1), path="/new")
    assert server.got("/new")[0].start == 0
    server.pages["/new"].content = CONTENT + b"more"
    checksum = hashlib.md5(CONTENT + b"more").hexdigest()
    report = get(path="/new", size=SIZE + 4, md5=checksum)
    assert "no beginning of this file" in report.messages[0]
    assert_only(target, CONTENT + b"more")


def test_a_size_that_the_card_states_meanwhile(server: FileServer, get: Get, target: Path) -> None:
    server.pages["/f"] = Page(CONTENT, length="chunked", cuts=[BLOCK])
    with pytest.raises(DataError, match="broke off"):
        get(RetryPolicy(attempts=1), md5=None)
    with pytest.raises(DataError, match=f"offers {SIZE} bytes, the card says {SIZE + 1}"):
        get(md5=None, size=SIZE + 1)
    get(md5=None, size=SIZE)
    assert_only(target)
    assert server.got("/f")[-1].start == BLOCK


def test_no_ranges_starts_over_and_says_so(server: FileServer, get: Get, target: Path) -> None:
    server.pages["/f"] = Page(CONTENT, ranges=False, cuts=[BLOCK, 2 * BLOCK])
    report = get()
    assert_only(target)
    assert any("starting over, the server cannot continue" in line for line in report.messages)


def test_no_ranges_and_always_cut_gives_up(server: FileServer, get: Get, target: Path) -> None:
    server.pages["/f"] = Page(CONTENT, ranges=False, cuts=[2 * BLOCK] * 99)
    with pytest.raises(DataError, match=r"f.bin: the connection broke off"):
        get()
    assert len(server.got("/f")) <= 6
    assert not target.exists()


@pytest.mark.parametrize("if_range", [True, False])
@pytest.mark.parametrize("kind", ["etag", "modified"])
def test_a_changed_file_starts_over(server: FileServer, get: Get, target: Path, if_range: bool, kind: str) -> None:
    both = [formatdate(1_600_000_000, usegmt=True), formatdate(1_700_000_000, usegmt=True)]
    old, new = ({"etag": '"1"'}, {"etag": '"2"'}) if kind == "etag" else ({"modified": m, "etag": None} for m in both)
    server.pages["/f"] = Page(OTHER, cuts=[2 * BLOCK], if_range=if_range, **old)
    with pytest.raises(DataError):
        get(RetryPolicy(attempts=1), md5=None)
    server.pages["/f"] = Page(CONTENT, if_range=if_range, **new)
    report = get(md5=None)
    assert_only(target)
    assert "the file changed on the server" in report.messages[0]


def test_a_shorter_file_starts_over(server: FileServer, get: Get, target: Path) -> None:
    server.pages["/f"] = Page(OTHER, cuts=[4 * BLOCK], etag=None)
    with pytest.raises(DataError):
        get(RetryPolicy(attempts=1))
    server.pages["/f"] = Page(CONTENT[:BLOCK], etag=None)
    get(md5=hashlib.md5(CONTENT[:BLOCK]).hexdigest())
    assert_only(target, CONTENT[:BLOCK])
    assert [item.status for item in server.got("/f")] == [200, 416, 200]


def test_without_a_version_or_checksum_nothing_is_continued(server: FileServer, get: Get, target: Path) -> None:
    server.pages["/f"] = Page(CONTENT, etag='W/"weak"', cuts=[BLOCK])
    report = get(md5=None)
    assert_only(target)
    assert [item.start for item in server.got("/f")] == [0, 0]
    assert "could tell whether the file is still the same" in report.messages[-1]


def test_a_wrong_range_is_not_appended(server: FileServer, get: Get, target: Path) -> None:
    server.pages["/f"] = Page(CONTENT, wrong_range=True, cuts=[2 * BLOCK])
    report = get(md5=None)
    assert_only(target)
    assert any("another range" in line for line in report.messages)


def test_wrong_checksum_once_is_repaired(server: FileServer, get: Get, target: Path) -> None:
    server.pages["/f"] = Page(CONTENT, sent_before=[CONTENT[:-1] + b"!"])
    report = get()
    assert_only(target)
    assert "starting over, the checksum" in report.messages[0]


def test_wrong_checksum_twice_never_takes_the_name(server: FileServer, get: Get, target: Path) -> None:
    server.pages["/f"] = Page(OTHER)
    wrong, right = hashlib.md5(OTHER).hexdigest(), hashlib.md5(CONTENT).hexdigest()
    with pytest.raises(DataError, match=rf"md5 is {wrong}, published is {right} \(twice the same.*example.org/set"):
        get()
    assert names(target.parent) == ["f.bin.corrupt"]
    assert len(server.got("/f")) == 2
    server.pages["/f"] = Page(CONTENT)
    get()
    assert_only(target)


def test_a_part_with_foreign_bytes_is_found_out(server: FileServer, get: Get, target: Path) -> None:
    server.pages["/f"] = Page(CONTENT, cuts=[2 * BLOCK])
    with pytest.raises(DataError):
        get(RetryPolicy(attempts=1))
    target.with_name("f.bin.part").write_bytes(OTHER[: 2 * BLOCK])
    get()
    assert_only(target)
    assert [item.start for item in server.got("/f")] == [0, 2 * BLOCK, 0]


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_redirects_to_another_host_keep_the_range(server: FileServer, get: Get, target: Path, code: int) -> None:
    with file_server() as other:
        other.pages["/g"] = Page(CONTENT, cuts=[BLOCK])
        server.pages["/f"] = Page(redirect=(code, other.address.replace("127.0.0.1", "localhost") + "/g"))
        get()
        assert [item.start for item in other.got("/g")] == [0, BLOCK]
    assert_only(target)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("/f", "more than 10 redirects"),
        ("ftp://127.0.0.1/f", "redirects from http to ftp, which is not safe"),
        ("file:///etc/passwd", "redirects from http to file"),
        ("http://[broken/f", "Invalid IPv6 URL"),
    ],
)
def test_bad_redirects(server: FileServer, get: Get, target: Path, address: str, message: str) -> None:
    server.pages["/f"] = Page(redirect=(302, address))
    with pytest.raises(DataError, match=message):
        get()
    assert names(target.parent) == []
    assert len(server.asked) <= 22  # HEAD and GET


def test_redirects_never_leave_encryption(server: FileServer) -> None:
    import requests

    response = requests.Response()
    response.status_code, response.headers["Location"] = 302, "http://example.org/f"
    remote = transfer_http.RemoteFile("f.bin", "https://example.org/f")
    with requests.Session() as session, pytest.raises(DataError, match="redirects from https to http, which is not"):
        transfer_http._next_address(remote, session, response, remote.url)
    response.headers["Location"] = "https://other.org/f"
    assert transfer_http._next_address(remote, session, response, remote.url) == "https://other.org/f"


def test_passing_refusals(server: FileServer, target: Path) -> None:
    waits: list[float] = []

    class Patient(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            waits.append(timeout or 0.0)
            return False

    server.pages["/f"] = Page(CONTENT, statuses=[500, (429, {"Retry-After": "7"}), 503])
    said: list[str] = []
    remote = transfer_http.RemoteFile("f.bin", f"{server.address}/f")
    notes = transfer_disk.Listener()
    notes.say = said.append  # type: ignore[method-assign, assignment]
    transfer.fetch(remote, target, RetryPolicy(attempts=5, first_delay=2.0), notes, Patient())
    assert target.read_bytes() == CONTENT
    assert len(waits) == 3
    assert 1.5 <= waits[0] <= 2.5
    assert waits[1] == 7.0
    assert 6.0 <= waits[2] <= 10.0
    assert "429 Too Many Requests; next attempt in 7 s" in said[1]


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("page", "message"),
    [
        (Page(statuses=[404]), r"/f does not exist \(404 Not Found\): see https://example.org/set"),
        (Page(statuses=[403]), r"refuses it \(403 Forbidden\): see https://example.org/set for how to get access"),
        (Page(statuses=[418]), r"answers 418"),
        (Page(statuses=[500] * 9), r"answers 500 Internal Server Error, 4 times; 0 B are kept"),
        (Page(statuses=[(429, {"Retry-After": "86400"})]), r"429 Too Many Requests and asks to wait 86400 s"),
        (Page(CONTENT, content_type="text/html; charset=utf-8"), "a web page came instead of the file"),
        (Page(CONTENT, headers={"Content-Encoding": "br"}), r"sends it compressed \(br\)"),
        (Page(CONTENT + b"x"), f"offers {SIZE + 1} bytes, the card says {SIZE}"),
        (Page(CONTENT, length=SIZE - 1), f"offers {SIZE - 1} bytes, the card says {SIZE}"),
    ],
)
def test_refusals_in_one_line(server: FileServer, get: Get, target: Path, page: Page, message: str) -> None:
    server.pages["/f"] = page
    with pytest.raises(DataError, match=message) as caught:
        get(size=SIZE)
    assert "\n" not in str(caught.value)
    assert names(target.parent) == []


def test_a_length_that_lies(server: FileServer, get: Get, target: Path) -> None:
    server.pages["/f"] = Page(CONTENT, length=SIZE + 1000)
    with pytest.raises(DataError, match=r"f.bin: .*times"):
        get(md5=None)
    assert not target.exists()
    server.pages["/f"] = Page(CONTENT, length=SIZE - 1000)
    with pytest.raises(DataError, match="md5 is"):
        get()
    assert not target.exists()


@pytest.mark.parametrize("length", ["chunked", "none"])
def test_no_length(server: FileServer, get: Get, target: Path, length: str) -> None:
    server.pages["/f"] = Page(CONTENT, length=length, cuts=[BLOCK] if length == "chunked" else [])
    get()
    assert_only(target)


def test_an_end_that_nobody_announced(server: FileServer, get: Get, target: Path) -> None:
    server.pages["/f"] = Page(CONTENT, length="none", cuts=[2 * BLOCK])
    get(size=SIZE, md5=None)
    assert_only(target)
    assert len(server.got("/f")) == 2
    target.unlink()
    with pytest.raises(DataError, match="neither the server nor the card states a length or checksum"):
        get(md5=None)


def test_an_empty_file(server: FileServer, get: Get, target: Path) -> None:
    server.pages["/f"] = Page(b"")
    get(md5=hashlib.md5(b"").hexdigest())
    assert_only(target, b"")


def test_a_silent_server(server: FileServer, get: Get, target: Path) -> None:
    server.pages["/f"] = Page(CONTENT, pause=0.5)
    with pytest.raises(DataError, match="broke off"):
        get(RetryPolicy(attempts=2, first_delay=0.0, read_timeout=0.1))
    server.pages["/f"].pause = 0.001
    get()
    assert_only(target)


def test_nobody_listens(get: Get, entry: Callable[..., Any], server: FileServer, target: Path) -> None:
    with pytest.raises(DataError, match=r"no connection to 127.0.0.1 \(Connection refused\), 4 times") as caught:
        get(url="http://127.0.0.1:9/f")
    assert "\n" not in str(caught.value)
    assert names(target.parent) == []


def test_through_a_proxy(server: FileServer, get: Get, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", server.address)
    server.pages["/f"] = Page(CONTENT, cuts=[BLOCK])
    get(url="http://data.invalid/f")
    assert_only(target)
    assert all(item.proxied for item in server.asked)
    assert [item.start for item in server.got("/f")] == [0, BLOCK]


def test_a_proxy_that_is_down(get: Get, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with pytest.raises(DataError, match=r"the proxy that the environment names for data.invalid does not answer"):
        get(url="http://data.invalid/f")


def test_authorities_from_the_environment(get: Get, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "absent.pem"))
    with pytest.raises(DataError, match=r"absent.pem"):
        get(url="https://127.0.0.1:9/f")
    monkeypatch.delenv("REQUESTS_CA_BUNDLE")
    monkeypatch.delenv("CURL_CA_BUNDLE", raising=False)
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "other.pem"))
    with pytest.raises(DataError, match=r"other.pem"):
        get(url="https://127.0.0.1:9/f")


def test_what_is_there_is_checked(server: FileServer, get: Get, target: Path) -> None:
    server.pages["/f"] = Page(CONTENT)
    target.parent.mkdir(parents=True)
    target.write_bytes(CONTENT)
    assert get().files[0].published
    assert server.asked == []
    status = target.stat()
    target.write_bytes(OTHER)
    with pytest.raises(DataError, match=r"md5 is .* published is .*: move or delete it"):
        get()
    os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert not get().files[0].new
    with pytest.raises(DataError, match="md5 is"):
        get(more={"verify": True})
    target.write_bytes(CONTENT[:-1])
    with pytest.raises(DataError, match=f"has {SIZE - 1} bytes, published are {SIZE}"):
        get(size=SIZE)
    assert target.read_bytes() == CONTENT[:-1]


def test_what_is_there_without_a_published_checksum(server: FileServer, get: Get, target: Path) -> None:
    server.pages["/f"] = Page(CONTENT)
    get(md5=None)
    with pytest.raises(DataError, match=f"has {SIZE} bytes, published are {SIZE + 1}"):
        get(md5=None, size=SIZE + 1)
    with open(target, "r+b") as file:
        file.write(b"rot")
    with pytest.raises(DataError, match="when it was downloaded it was"):
        get(md5=None)
    target.with_name(".f.bin.verified").unlink()
    target.write_bytes(CONTENT[:100])
    with pytest.raises(DataError, match=f"has 100 bytes, published are {SIZE}"):
        get(md5=None)


def test_several_files_at_a_time(server: FileServer, card: Card, entry: Callable[..., Any], tmp_path: Path) -> None:
    contents = {f"part/{k}.bin": os.urandom(BLOCK + k) for k in range(6)}
    meeting = threading.Barrier(3)
    for name, content in contents.items():
        server.pages[f"/{name}"] = Page(content, meeting=meeting)
    made = card(
        *[
            entry(n, f"/{n}", md5=hashlib.md5(c).hexdigest(), split="ab"[k % 2])
            for k, (n, c) in enumerate(contents.items())
        ]
    )
    options: dict[str, Any] = {"root": tmp_path, "progress": False, "retries": RetryPolicy(attempts=1)}
    report = download(made, jobs=3, **options)
    assert [file.path.read_bytes() for file in report.files] == list(contents.values())
    assert len(download(made, split="a", **options).files) == 3
    assert len(download(made, files=["part/[12]*"], **options).files) == 2
    assert sum(item.method == "GET" for item in server.asked) == 6


def test_one_failure_does_not_stop_the_others(
    server: FileServer, card: Card, entry: Callable[..., Any], tmp_path: Path
) -> None:
    server.pages |= {"/f": Page(CONTENT), "/h": Page(CONTENT)}
    made = card(entry("f.bin"), entry("g.bin", "/g"), entry("h.bin", "/h"))
    with pytest.raises(DataError, match=r"g.bin: .*/g does not exist.*\(1 of 3 files failed, 2 are there\)"):
        download(made, root=tmp_path, progress=False, retries=FAST, jobs=1)
    assert (tmp_path / "made" / "h.bin").read_bytes() == CONTENT


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "val"}, r"split: made has no files of a split 'val'; its splits are test, train"),
        ({"files": ["nothing"]}, r"file: made has no 'nothing'; there are f.bin, g.bin"),
        ({"jobs": 0}, "jobs: 0"),
    ],
)
def test_wrong_choices(card: Card, entry: Callable[..., Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        download(card(entry("f.bin", split="train"), entry("g.bin", split="test")), **options)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"name": "../f"}, "no plain file name"),
        ({"name": "/etc/f"}, "no plain file name"),
        ({"name": ".f.verified"}, "no plain file name"),
        ({"name": "f.part"}, "no plain file name"),
        ({"name": "a/./b"}, "no plain file name"),
        ({"name": "g\n"}, "no plain file name"),
        ({"name": 3}, "no plain file name"),
        ({"url": "file:///etc/passwd"}, "no http or https address"),
        ({"url": None}, "no http or https address"),
        ({"md5": "abc"}, "no checksum of that kind"),
        ({"size": -1}, "whole numbers of bytes"),
        ({"size": "12"}, "whole numbers of bytes"),
    ],
)
def test_wrong_cards(card: Card, entry: Callable[..., Any], wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=rf"manifest.toml: \[\[files\]\] number 2: .*{message}"):
        download(card(entry("good"), {**entry(), **wrong}))


@pytest.mark.bad_input
def test_a_name_twice_and_no_files(card: Card, entry: Callable[..., Any]) -> None:
    with pytest.raises(DataError, match="occurs twice"):
        download(card(entry(), entry()))
    with pytest.raises(DataError, match="names no files to download"):
        download(card())


@pytest.mark.bad_input
def test_gated_files(server: FileServer, get: Get, target: Path) -> None:
    with pytest.raises(DataError, match=rf"f.bin: cannot be .* a person: accept the terms \(http.*put it at {target}"):
        get(gated=True, how="accept the terms")
    assert server.asked == []
    assert "by hand" in get(gated=True, more={"dry_run": True}).table()
    target.parent.mkdir(parents=True)
    target.write_bytes(CONTENT)
    assert get(gated=True).files[0].published


def test_dry_run(server: FileServer, card: Card, entry: Callable[..., Any], tmp_path: Path) -> None:
    server.pages |= {"/f": Page(CONTENT), "/g": Page(CONTENT), "/h": Page(CONTENT, allow_head=False)}
    folder = tmp_path / "made"
    folder.mkdir()
    (folder / "whole.bin").write_bytes(CONTENT)
    (folder / "begun.bin.part").write_bytes(CONTENT[:1000])
    made = card(
        entry("whole.bin", size=SIZE, split="train"),
        entry("begun.bin", approximate_size=3_000_000),
        entry("asked.bin", "/g"),
        entry("unknown.bin", "/h"),
    )
    report = download(made, root=tmp_path, dry_run=True)
    rows = [line.split() for line in report.table().splitlines()]
    assert rows[1] == ["whole.bin", "train", "657", "kB", "whole"]
    assert rows[2] == ["begun.bin", "-", "about", "3", "MB", "1", "kB"]
    assert rows[3] == ["asked.bin", "-", "657", "kB", "-"]
    assert rows[4] == ["unknown.bin", "-", "?", "-"]
    assert report.needed == 3_000_000 - 1000 + SIZE
    assert "1 files of unknown size" in report.table()
    assert {item.method for item in server.asked} == {"HEAD"}
    assert names(folder) == ["begun.bin.part", "whole.bin"]


def usage(free: int) -> Callable[[Any], Any]:
    return lambda path: shutil._ntuple_diskusage(10**12, 0, free)


@pytest.mark.bad_input
def test_a_disk_too_small_is_refused_before_anything(
    server: FileServer, get: Get, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.pages["/f"] = Page(CONTENT)
    monkeypatch.setattr(shutil, "disk_usage", usage(SIZE - 1))
    with pytest.raises(DataError, match=r"657 kB are needed and 657 kB are free, 1 B too little.*--root"):
        get(size=SIZE)
    assert server.asked == []
    assert "1 B too little" in get(size=SIZE, more={"dry_run": True}).table()
    server.pages["/f"].allow_head = False
    with pytest.raises(DataError, match=r"f.bin: needs 657 kB, 657 kB are free"):  # known once the file comes
        get()
    server.pages["/f"].cuts = [2 * BLOCK]
    monkeypatch.setattr(shutil, "disk_usage", usage(SIZE))
    with pytest.raises(DataError, match="broke off"):
        get(RetryPolicy(attempts=1), size=SIZE)
    monkeypatch.setattr(shutil, "disk_usage", usage(SIZE - 2 * BLOCK))  # what is there is not needed again
    get(size=SIZE)
    assert_only(target)


def test_unpacking_needs_space_too(server: FileServer, get: Get, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", usage(2 * SIZE))
    more = {"extract": True, "dry_run": True}
    assert get(name="f.tar", size=SIZE, more=more).needed == 2 * SIZE
    assert get(name="f.tar.gz", size=SIZE, more=more).needed == 4 * SIZE
    with pytest.raises(DataError, match="too little"):
        get(name="f.tar.gz", size=SIZE, more={"extract": True})


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_keeps_the_part(
    server: FileServer, get: Get, target: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    server.pages["/f"] = Page(CONTENT)
    real, part = os.write, target.with_name("f.bin.part")

    def full(descriptor: int, data: Any) -> int:
        if part.exists() and os.path.samestat(os.fstat(descriptor), part.stat()):
            if os.fstat(descriptor).st_size >= 2 * BLOCK:
                raise OSError(number, os.strerror(number))
            return real(descriptor, data[: BLOCK // 2])  # a disk that is nearly full writes what it can
        return real(descriptor, data)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(DataError, match=r"f.bin: the disk is full; what was received is kept"):
            get()
    assert part.read_bytes() == CONTENT[: 2 * BLOCK]
    get()
    assert_only(target)
    assert [item.start for item in server.got("/f")] == [0, 2 * BLOCK]


@pytest.mark.bad_input
def test_a_folder_that_cannot_be_written(server: FileServer, get: Get, tmp_path: Path, target: Path) -> None:
    server.pages["/f"] = Page(CONTENT)
    (tmp_path / "data").write_text("a file")
    with pytest.raises(DataError, match=r"f.bin: cannot be written"):
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


def test_a_part_renamed_before_the_lock_is_not_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    part, done = tmp_path / "f.part", tmp_path / "f"
    part.write_bytes(b"whole")
    real = fcntl.flock
    calls: list[int] = []

    def late(descriptor: int, how: int) -> None:
        if not calls:
            part.rename(done)  # the other process was quicker
        calls.append(descriptor)
        real(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with transfer_disk.locked(part, "f") as descriptor:
        os.ftruncate(descriptor, 0)
    assert done.read_bytes() == b"whole"
    assert len(calls) == 2


SCRIPT = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have set it aside
import json, sys
from pathlib import Path
from escaip.data.download import download
from escaip.data.transfer_http import RetryPolicy
from escaip.files import DatasetCard
files, root = json.loads(sys.argv[1]), sys.argv[2]
card = DatasetCard("made", "made", {"dataset": {}, "files": files}, Path("card"))
download(card, root=root, progress=False, retries=RetryPolicy(first_delay=0.01))
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


def test_killed_without_warning(server: FileServer, entry: Callable[..., Any], target: Path) -> None:
    server.pages["/f"] = Page(CONTENT, pause=0.01)
    part = target.with_name("f.bin.part")
    kept: list[int] = []
    for kill in range(3):
        process = start(entry(md5=None), target.parents[1])
        wait_for(part, (kill + 1) * BLOCK)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kept.append(part.stat().st_size)
        assert part.read_bytes() == CONTENT[: kept[-1]]
        assert not target.exists()
    process = start(entry(md5=None), target.parents[1])
    assert process.communicate()[1] == ""
    assert_only(target)
    asked = server.got("/f")
    assert [item.start for item in asked] == [0, *kept]
    for item, size in zip(asked, kept):
        assert item.start + item.sent - size <= BLOCK + 8 * (1 << 14)  # the block and what the system holds


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
for place, name in ((os, "replace"), (os, "fsync"), (os, "ftruncate"), (pathlib.Path, "unlink")):
    setattr(place, name, dying(getattr(place, name)))
"""


@pytest.mark.parametrize("published", [True, False])
def test_killed_at_every_step(
    server: FileServer, entry: Callable[..., Any], get: Get, target: Path, published: bool
) -> None:
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


def test_ctrl_c_says_how_to_go_on(server: FileServer, entry: Callable[..., Any], target: Path) -> None:
    server.pages["/f"] = Page(CONTENT, pause=0.02)
    process = start(entry(), target.parents[1])
    wait_for(target.with_name("f.bin.part"), BLOCK)
    process.send_signal(signal.SIGINT)
    text = process.communicate(timeout=20)[1]
    assert "what was received is kept: run the same command again to continue" in text.splitlines()
    server.pages["/f"].pause = 0.0
    assert start(entry(), target.parents[1]).communicate()[1] == ""
    assert_only(target)
    assert server.got("/f")[1].start >= BLOCK


def tar_of(files: dict[str, bytes], mode: str = "w") -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode=mode) as archive:  # type: ignore[call-overload]
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
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
    facts = {"name": f"set{suffix}", "md5": hashlib.md5(content).hexdigest(), "more": {"extract": True}}
    report = get(**facts)
    folder = target.parent / "set"
    assert report.files[0].folder == folder
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
    facts = {"name": "set.tar", "md5": None, "more": {"extract": True}}
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
        get(name="set.tar", md5=None, more={"extract": True})
    assert names(target.parent / "set") == ["mine"]


def special_tar(kind: bytes, link: str) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as archive:
        member = tarfile.TarInfo("odd")
        member.type, member.linkname = kind, link
        archive.addfile(member)
    return made.getvalue()


def zip_with(mode: int = 0, encrypted: bool = False) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        info = zipfile.ZipInfo("odd")
        info.external_attr = mode << 16
        archive.writestr(info, "target")
    content = bytearray(made.getvalue())
    if encrypted:
        content[content.index(b"PK\x01\x02") + 8] |= 1
    return bytes(content)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("set.tar", tar_of({"../out": b"x"}), "outside"),
        ("set.tar", tar_of({"a/../../out": b"x"}), "outside"),
        ("set.tar", tar_of({"/out": b"x"}), "leads outside its folder"),
        ("set.tar", special_tar(tarfile.SYMTYPE, "/etc/passwd"), "'odd' is a link or a device"),
        ("set.tar", special_tar(tarfile.LNKTYPE, "top"), "'odd' is a link or a device"),
        ("set.tar", special_tar(tarfile.CHRTYPE, ""), "'odd' is a link or a device"),
        ("set.zip", zip_of({"../out": b"x"}), "leads outside its folder"),
        ("set.zip", zip_of({"/out": b"x"}), "leads outside its folder"),
        ("set.zip", zip_of({"a\\..\\out": b"x"}), "leads outside its folder"),
        ("set.zip", zip_with(mode=0o120777), "'odd' is a link or a device"),
        ("set.zip", zip_with(encrypted=True), "'odd' is encrypted"),
        ("set.tar", CONTENT, "cannot be unpacked"),
        ("set.tar.gz", tar_of(FILES, "w:gz")[:-300], "cannot be unpacked"),
        ("set.tar.gz", tar_of(FILES, "w:gz")[:-8] + b"\0" * 8, "cannot be unpacked"),
        ("set.zip", zip_of(FILES)[:-300], "cannot be unpacked"),
        ("set.tar.xz", tar_of(FILES, "w:xz")[:600], "cannot be unpacked"),
        ("set.tar", tar_of({"a": b"x", "a/b": b"y"}), "cannot be written"),
    ],
)
def test_hostile_archives(
    server: FileServer, get: Get, target: Path, tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    server.pages["/f"] = Page(content)
    with pytest.raises(DataError, match=message) as caught:
        get(name=name, md5=None, more={"extract": True})
    assert "\n" not in str(caught.value)
    assert names(target.parent) == [f".{name}.verified", name]
    assert names(tmp_path) == ["data"]


def test_an_archive_that_is_too_large_for_the_disk(
    server: FileServer, get: Get, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = zip_of({"bomb": bytes(10**7)})
    server.pages["/f"] = Page(content)
    monkeypatch.setattr(shutil, "disk_usage", usage(10**6))
    with pytest.raises(DataError, match="bomb needs 10 MB, 1 MB are free"):
        get(name="set.zip", md5=None, more={"extract": True})
    assert names(target.parent) == [".set.zip.verified", "set.zip"]


def test_the_root_comes_from_the_environment(
    server: FileServer, get: Get, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.pages["/f"] = Page(CONTENT)
    monkeypatch.setenv("ESCAIP_DATA", str(tmp_path / "elsewhere"))
    get(more={"root": None})
    assert_only(tmp_path / "elsewhere" / "made" / "f.bin")
    monkeypatch.delenv("ESCAIP_DATA")
    monkeypatch.chdir(tmp_path)
    get(more={"root": None})
    assert_only(tmp_path / "data" / "made" / "f.bin")


def test_every_card_can_be_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from escaip.data import download_plan
    from escaip.files import list_datasets

    monkeypatch.setattr(download_plan, "remote_size", lambda remote, policy: None)
    for found in list_datasets():
        if found.manifest.get("files"):
            assert found.name in download(found, root=tmp_path, dry_run=True).table()
    assert names(tmp_path) == []
