"""``escaip data download``: the published files of a data card, in parallel, resumed after an interruption, checked.

A file arrives as ``NAME.part``, described by ``NAME.part.json``, and takes its name once its length and checksum are
right; ``.NAME.verified`` then remembers the checksum. Resuming follows RFC 9110, sections 13.1.5 and 14.
"""

from __future__ import annotations

import errno
import fnmatch
import hashlib
import json
import logging
import os
import re
import shutil
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from lzma import LZMAError
from multiprocessing.pool import ThreadPool
from pathlib import Path, PurePosixPath
from threading import Event
from typing import IO, TYPE_CHECKING, Any
from urllib.parse import urlsplit

from tqdm import tqdm

from escaip import __version__
from escaip.errors import ConfigError, DataError, EscaipError
from escaip.files import DatasetCard, aligned, dataset_card, first_line, try_lock

if TYPE_CHECKING:
    from requests import Response

BLOCK = 1 << 17
"""Bytes read at once from the network; a kill loses at most these."""
ARCHIVES = {".tar.gz": 3, ".tgz": 3, ".tar.bz2": 3, ".tar.xz": 3, ".tar": 1, ".zip": 3}
"""Suffixes of archives, and how many times its size an archive's contents are assumed to take."""
_PASSING = (202, 408, 425, 429, 500, 502, 503, 504)  # 202: figshare while it prepares a file
_TIMEOUT, _LONGEST_WAIT = 60.0, 600.0
"""Seconds without a byte that count as a failure, and seconds a server may ask to wait (``Retry-After``)."""
_BOOT = Path("/proc/sys/kernel/random/boot_id")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RemoteFile:
    """A published file as its card describes it.

    ``size`` is an estimate unless ``exact``; ``digest`` is None where no checksum is published; ``gated`` says how to
    get a file whose conditions a person has to accept; ``page`` is a web page about the set.
    """

    name: str
    url: str
    path: Path
    size: int | None
    exact: bool
    algorithm: str
    digest: str | None
    split: str
    gated: str
    page: str

    def beside(self, pattern: str) -> Path:
        """Returns the path of an attendant file, such as ``{}.part``."""
        return self.path.with_name(pattern.format(self.path.name))

    @property
    def whole(self) -> bool:
        """Whether the file is on disk."""
        return self.path.exists()

    @property
    def there(self) -> int:
        """Bytes on disk."""
        return next((path.stat().st_size for path in (self.path, self.beside("{}.part")) if path.exists()), 0)

    @property
    def archive(self) -> str | None:
        """Suffix by which the file is known as an archive; None for other files."""
        return next((suffix for suffix in ARCHIVES if self.name.lower().endswith(suffix)), None)

    @property
    def unpacked(self) -> Path:
        """Folder of the name without suffix, for the contents of an archive."""
        return self.path.with_name(self.path.name[: -len(self.archive or "")])


class _Passing(Exception):
    """A failure that another attempt may overcome, after ``wait`` seconds where the server asks for them."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


class _Stopped(EscaipError):
    """The user pressed Ctrl-C, or another file met a full disk."""


@dataclass(frozen=True)
class _Run:
    """Settings that the files of one download share."""

    attempts: int
    delay: float
    extract: bool
    verify: bool
    bar: tqdm
    stop: Event


def download(
    name_or_card: str | DatasetCard,
    *,
    split: str | None = None,
    files: Sequence[str] | None = None,
    root: str | os.PathLike[str] | None = None,
    jobs: int = 4,
    dry_run: bool = False,
    extract: bool = False,
    verify: bool = False,
    progress: bool = True,
    attempts: int = 6,
    delay: float = 1.0,
) -> str:
    """Downloads the files of a data set that are not on disk yet; the same call continues after any interruption.

    ``http_proxy``, ``https_proxy``, ``no_proxy``, ``REQUESTS_CA_BUNDLE`` and ``SSL_CERT_FILE`` are obeyed.

    Args:
        name_or_card: data set.
        split: only files of this split.
        files: only these files, by name or pattern (``train/*``).
        root: folder of all data sets; default ``$ESCAIP_DATA``, else ``data`` in the current folder.
        jobs: files at the same time, one connection each.
        dry_run: return the table of files and download nothing.
        extract: unpack archives, each into a folder of its name without suffix.
        verify: compute the checksums of files on disk again, instead of trusting unchanged size and time.
        progress: show a bar on a terminal.
        attempts: failures of a file in a row, without progress between them, before giving it up.
        delay: seconds before the second attempt; each further delay is twice as long, up to a minute.

    Returns:
        A line for each file and one for all; for a dry run the table of files, sizes and free space.

    Raises:
        ConfigError: an unknown data set, split or file.
        DataError: a gated file, too little space, or a file that cannot be had or is wrong.
        KeyboardInterrupt: received bytes are kept.
    """
    if jobs < 1:
        raise ConfigError(f"jobs: {jobs} is not a positive number")
    card = name_or_card if isinstance(name_or_card, DatasetCard) else dataset_card(name_or_card)
    folder = Path(root or os.environ.get("ESCAIP_DATA") or "data") / card.name
    plan = _choose(card, _read_files(card, folder), split, files)
    todo = [item for item in plan if not item.whole]
    missing = sum(max(0, (item.size or 0) - item.there) for item in todo)
    needed = missing + (sum(map(_unpacked_size, plan)) if extract else 0)
    free = shutil.disk_usage(next(place for place in (folder, *folder.absolute().parents) if place.exists())).free
    if dry_run:
        return _table(plan, folder, needed, free)
    for item in todo:
        if item.gated:
            how = f"{item.gated} ({item.url}), and put it at {item.path}"
            raise DataError(f"{item.name}: cannot be downloaded without a person: {how}")
    if needed > free:
        remedy = "choose files with --split or --file, free space, or name another disk with --root"
        raise DataError(f"{folder}: {_bytes(needed)} are needed and {_bytes(free)} are free: {remedy}")
    # None hides the bar where there is no terminal.
    bar = tqdm(total=missing, unit="B", unit_scale=True, dynamic_ncols=True, disable=None if progress else True)
    results = _get_all(plan, jobs, _Run(attempts, delay, extract, verify, bar, Event()))
    lines = [result for result in results if isinstance(result, str)]
    errors = [result for result in results if not isinstance(result, str | _Stopped)]
    if errors:
        more = f" ({len(errors)} of {len(plan)} files failed, {len(lines)} are there)" if len(plan) > 1 else ""
        raise DataError(f"{errors[0]}{more}") from errors[0]
    return "\n".join([*lines, f"{folder}: {len(todo)} files downloaded, {len(plan) - len(todo)} were there"])


def _get_all(plan: Sequence[RemoteFile], jobs: int, run: _Run) -> list[str | EscaipError]:
    # Daemon threads: after Ctrl-C nobody waits for a silent server.
    with run.bar, ThreadPool(min(jobs, len(plan))) as pool:
        try:
            return list(pool.imap(lambda item: _get(item, run), plan))
        except KeyboardInterrupt:
            run.stop.set()
            print("received bytes are kept: run the same command again to continue", file=sys.stderr)
            raise


def _table(plan: Sequence[RemoteFile], folder: Path, needed: int, free: int) -> str:
    rows = [("file", "split", "size", "there")]
    for item in plan:
        there = "whole" if item.whole else _bytes(item.there) if item.there else "-"
        note = " (by hand: conditions)" if item.gated and not item.whole else ""
        size = _bytes(item.there if item.whole else item.size)
        rows.append((item.name, item.split or "-", size if item.exact else f"about {size}", there + note))
    unknown = sum(item.size is None and not item.whole for item in plan)
    more = f" and {unknown} files of unknown size" if unknown else ""
    short = f": {_bytes(needed - free)} too little" if needed > free else ""
    total = f"{len(plan)} files into {folder}; needed {_bytes(needed)}{more}"
    return "\n".join([*aligned(rows), total, f"free on that disk {_bytes(free)}{short}"])


def _read_files(card: DatasetCard, folder: Path) -> list[RemoteFile]:
    """Returns the files that a card names."""
    page = card.manifest["dataset"].get("homepage")
    found = []
    for entry in card.manifest.get("files", []):
        path, algorithm = folder / entry["name"], "md5" if "md5" in entry else "sha256"
        if path.is_dir():
            raise DataError(f"{path}: is a folder, where a file should go: move it away")
        found.append(
            RemoteFile(
                name=entry["name"],
                url=entry["url"],
                path=path,
                size=entry.get("size", entry.get("approximate_size")),
                exact="size" in entry or "approximate_size" not in entry,
                algorithm=algorithm,
                digest=entry.get(algorithm),
                split=entry.get("split", ""),
                gated=entry.get("how", "see the page") if entry.get("gated") else "",
                page=page or entry["url"],
            )
        )
    if not found:
        raise DataError(f"{card.path / 'manifest.toml'}: names no files to download")
    return found


def _choose(
    card: DatasetCard, plan: Sequence[RemoteFile], split: str | None, patterns: Sequence[str] | None
) -> list[RemoteFile]:
    """Returns the files of a split that have one of these names or patterns; None means all."""
    splits = sorted({item.split for item in plan if item.split})
    if split is not None and split not in splits:
        raise ConfigError(f"split: {card.name} has no split {split!r}; it has {', '.join(splits) or 'none'}")
    chosen = [item for item in plan if split in (None, item.split)]
    names = [item.name for item in chosen]
    for pattern in patterns or ():
        if not fnmatch.filter(names, pattern):
            raise ConfigError(f"file: {card.name} has no {pattern!r}; there are {', '.join(names)}")
    return [item for item in chosen if patterns is None or any(fnmatch.fnmatch(item.name, p) for p in patterns)]


def _get(item: RemoteFile, run: _Run) -> str | EscaipError:
    """Downloads, checks and unpacks one file; returns its line or its error, so that the other files go on."""
    try:
        state = "was there" if item.whole else "downloaded"
        digest = _check(item, run) if item.whole else _fetch(item, run)
        for leftover in ("{}.part", "{}.part.json"):  # of a kill right after the renaming
            item.beside(leftover).unlink(missing_ok=True)
        folder = f", unpacked into {_unpack(item, digest)}" if run.extract and item.archive else ""
        published = "no checksum published" if item.digest is None else "as published"
        return f"{item.path}: {_bytes(item.there)}, {state}, {item.algorithm}:{digest} ({published}){folder}"
    except EscaipError as error:
        return error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return DataError(f"{item.name}: cannot be written ({error}): check its folder")
        run.stop.set()  # there is no point in going on with the other files
        kept = "received bytes are kept: free space and run the same command again"
        return DataError(f"{item.name}: the disk is full ({error.strerror}); {kept}")


def _check(item: RemoteFile, run: _Run) -> str:
    """Returns the checksum of a file on disk, remembered or computed; raises DataError for a wrong one."""
    status, known = item.path.stat(), _read_json(item.beside(".{}.verified"))
    remedy = "move or delete it and run the same command again"
    if item.size not in (None, status.st_size) and item.exact:
        raise DataError(f"{item.path}: has {status.st_size} bytes, published are {item.size}: {remedy}")
    before = known.get("digest") if known.get("algorithm") == item.algorithm else None
    expected = item.digest or before
    unchanged = (known.get("size"), known.get("mtime_ns")) == (status.st_size, status.st_mtime_ns)
    if expected and before == expected and unchanged and not run.verify:
        return str(expected)
    digest = _digest(item.path, item.algorithm, run.stop)
    if expected not in (None, digest):
        origin = "published is" if item.digest else "when it was downloaded it was"
        raise DataError(f"{item.path}: {item.algorithm} is {digest}, {origin} {expected}: {remedy}")
    _remember(item, item.path, digest)
    return digest


def _fetch(item: RemoteFile, run: _Run) -> str:
    """Downloads a file, or the rest of it, gives it its name and returns its checksum."""
    item.path.parent.mkdir(parents=True, exist_ok=True)
    part, state = item.beside("{}.part"), item.beside("{}.part.json")
    with _locked(item, part) as file:
        if item.whole:
            raise DataError(f"{item.name}: {item.path} appeared meanwhile: run the same command again")
        for _ in range(2):
            try:
                _receive(item, file, state, run)
            except BaseException:
                if not part.stat().st_size:
                    state.unlink(missing_ok=True)
                    part.unlink()
                raise
            os.fsync(file.fileno())
            digest = _digest(part, item.algorithm, run.stop)
            if item.digest in (None, digest):
                # The record comes first: a kill in between leaves a complete part, never an unknown file.
                _remember(item, part, digest)
                os.replace(part, item.path)
                return digest
            _log.warning("%s: the checksum of the received bytes is wrong", item.name)
            state.unlink(missing_ok=True)
        part.unlink()
    raise DataError(
        f"{item.name}: {item.algorithm} is {digest}, published is {item.digest}, after two attempts: see whether the "
        f"published file has changed: {item.page}"
    )


def _receive(item: RemoteFile, file: IO[bytes], state: Path, run: _Run) -> None:
    """Makes attempts until every byte is there."""
    failures = best = 0
    while True:
        try:
            return _attempt(item, file, state, run)
        except _Passing as error:
            there = os.fstat(file.fileno()).st_size
            failures, best = (1, there) if there > best else (failures + 1, best)
            if failures >= run.attempts:
                kept = f"{_bytes(there)} are kept: run the same command again to continue"
                raise DataError(f"{item.name}: {error}, {run.attempts} times; {kept}") from error
            wait = min(60.0, run.delay * 2 ** (failures - 1)) if error.wait is None else error.wait
            _log.warning("%s: %s; next attempt in %.3g s", item.name, error, wait)
            if run.stop.wait(wait):
                raise _Stopped from error


def _attempt(item: RemoteFile, file: IO[bytes], state: Path, run: _Run) -> None:
    """Asks the server for what is missing; bytes of uncertain origin are dropped, never continued."""

    def drop() -> int:
        # Emptied before anything is said about new bytes: never old bytes under a new state.
        os.ftruncate(file.fileno(), 0)
        state.unlink(missing_ok=True)
        return 0

    known, offset = _read_json(state), os.fstat(file.fileno()).st_size
    size, version = known.get("size"), known.get("version")
    version = version if isinstance(version, str) else None
    boot = _BOOT.read_text() if _BOOT.exists() else ""
    # Bytes can be trusted when a checksum will tell, or the file has a version and the machine did not crash since.
    sure = item.digest is not None or (version is not None and known.get("boot") == boot)
    sizes = [value for value in (size, item.size if item.exact else None) if value is not None]
    fits = all(type(value) is int and offset <= value == sizes[0] for value in sizes)
    if known.get("url") != item.url or not sure or not fits:
        offset, size, version = drop(), None, None
    if offset and offset == size:
        return
    headers = {"Range": f"bytes={offset}-", **({"If-Range": version} if version else {})} if offset else {}
    with _request(item, headers) as response:
        if response.status_code not in ((206, 416, 200) if offset else (200,)):
            raise _refusal(item, response)
        if response.status_code == 416:  # its body is a page about the error, not the file
            drop()
            raise _Passing("the file changed on the server", wait=0.0)
        now, span = _version(response), response.headers.get("Content-Range", "")
        total = _length(item, response)
        if response.status_code == 200:
            if offset:
                _log.warning("%s: starting over, the server cannot continue or the file changed", item.name)
            offset = drop()
            free = shutil.disk_usage(state.parent).free
            if total is not None and total > free:
                raise OSError(errno.ENOSPC, f"{_bytes(total)} are needed and {_bytes(free)} are free")
            # A torn state, like a torn record, counts as none.
            state.write_text(json.dumps({"url": item.url, "version": now, "size": total, "boot": boot}))
        else:
            match = re.fullmatch(rf"bytes {offset}-\d+/(\d+|\*)", span)
            total = size if match is None or match[1] == "*" else int(match[1])
            changed = None not in (version, now) and version != now
            if match is None or changed or size not in (None, total):
                drop()
                raise _Passing("the file changed on the server, or another range came than was asked for", wait=0.0)
        for block in _blocks(response):
            if total is not None and offset + len(block) > total:
                drop()
                raise _Passing("more bytes came than were announced")
            file.write(block)
            file.flush()
            offset += len(block)
            run.bar.update(len(block))
            if run.stop.is_set():
                raise _Stopped
    if total is not None and offset < total:
        raise _Passing("the connection broke off")


def _blocks(response: Response) -> Iterator[bytes]:
    from urllib3.exceptions import HTTPError

    try:
        yield from response.raw.stream(BLOCK, decode_content=False)
    except (HTTPError, ConnectionError, TimeoutError) as error:
        raise _Passing(f"the connection broke off ({_reason(error)})") from error


def _length(item: RemoteFile, response: Response) -> int | None:
    """Returns the size of the whole file, or refuses a response that is not the file although it is a success."""
    kind = response.headers.get("Content-Type", "").partition(";")[0].strip().lower()
    if kind in ("text/html", "application/xhtml+xml") and not item.name.endswith((".html", ".htm")):
        raise DataError(f"{item.name}: a web page came instead of the file: open {item.page} in a browser")
    coding = response.headers.get("Content-Encoding", "identity").strip().lower()
    # Some servers call the compression of the file itself a coding.
    if coding not in ("", "identity") and not item.name.endswith((".gz", ".tgz", ".xz", ".bz2", ".zip")):
        raise DataError(f"{item.name}: the server sends it compressed ({coding}) although it was asked not to")
    framed = "chunked" in response.headers.get("Transfer-Encoding", "").lower()
    text = response.headers.get("Content-Length", "")
    if response.status_code == 206:
        text, framed = response.headers.get("Content-Range", "").rpartition("/")[2], False
    size = int(text) if text.isdecimal() and not framed else None
    if item.exact and None not in (size, item.size) and size != item.size:
        offer = f"the server offers {size} bytes, the card says {item.size}"
        raise DataError(f"{item.name}: {offer}: the published file has changed; see {item.page}")
    size = item.size if size is None and item.exact else size
    if size is None and not framed and item.digest is None and response.status_code == 200:
        where = f"see {item.page}"
        raise DataError(f"{item.name}: neither the server nor the card states a length or checksum; {where}")
    return size


@contextmanager
def _request(item: RemoteFile, headers: dict[str, str]) -> Iterator[Response]:
    """Yields the response at the end of the redirects, its body unread."""
    import requests

    # Compressed on the way, the bytes and their count would be others.
    headers = {"User-Agent": f"escaip/{__version__}", "Accept-Encoding": "identity", **headers}
    authorities = os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("SSL_CERT_FILE") or True
    host = urlsplit(item.url).hostname
    try:
        response = requests.get(item.url, headers=headers, stream=True, timeout=_TIMEOUT, verify=authorities)
    except (requests.ConnectionError, requests.Timeout) as error:
        proxy = "the proxy for " if isinstance(error, requests.exceptions.ProxyError) else ""
        reason = f"no answer from {proxy}{host} ({_reason(error)})"
        if isinstance(error, requests.exceptions.SSLError):
            remedy = "if a proxy replaces certificates, name its authorities in REQUESTS_CA_BUNDLE or SSL_CERT_FILE"
            raise DataError(f"{item.name}: {reason}: {remedy}") from error
        raise _Passing(reason) from error
    except (OSError, ValueError) as error:  # bad addresses and files of authorities
        raise DataError(f"{item.name}: {item.url} cannot be asked for ({first_line(error)})") from error
    with response:
        hops = [hop.url for hop in (*response.history, response)]
        if item.url.startswith("https:") and not all(hop.startswith("https:") for hop in hops):
            raise DataError(f"{item.name}: {host} redirects to an address without encryption; see {item.page}")
        yield response


def _refusal(item: RemoteFile, response: Response) -> Exception:
    """Returns the exception that a status other than success means."""
    status = f"the server answers {response.status_code} {response.reason or ''}".strip()
    if response.status_code not in _PASSING:
        return DataError(f"{item.name}: {status} to {item.url}: see {item.page} for where it is or how to get access")
    text = response.headers.get("Retry-After", "").strip()
    wait = float(text) if text.isdecimal() else None
    if wait is not None and wait > _LONGEST_WAIT:
        return DataError(f"{item.name}: {status} and asks to wait {wait:.0f} s: run it later")
    return _Passing(status, wait)


def _version(response: Response) -> str | None:
    """Returns the header that names this version of the file: its strong ETag, else its date."""
    tag = response.headers.get("ETag", "").strip()
    return tag if tag.startswith('"') else response.headers.get("Last-Modified")


def _reason(error: BaseException) -> str:
    """Returns the innermost cause in a few words; outer ones repeat addresses, which may hold tokens."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return getattr(error, "strerror", None) or type(error).__name__


@contextmanager
def _locked(item: RemoteFile, part: Path) -> Iterator[IO[bytes]]:
    """Yields the open part, which no other process writes to."""
    while (file := try_lock(part)) is not None:
        with file:
            # Between opening and locking another process may have renamed the part: never write to that file.
            if part.exists() and os.path.samestat(os.fstat(file.fileno()), part.stat()):
                yield file
                return
    raise DataError(f"{item.name}: another process is downloading it; wait for that one")


def _digest(path: Path, algorithm: str, stop: Event) -> str:
    total = hashlib.new(algorithm, usedforsecurity=False)
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            if stop.is_set():
                raise _Stopped
            total.update(block)
    return total.hexdigest()


def _remember(item: RemoteFile, path: Path, digest: str) -> None:
    facts = {"size": path.stat().st_size, "mtime_ns": path.stat().st_mtime_ns}
    item.beside(".{}.verified").write_text(json.dumps({**facts, "algorithm": item.algorithm, "digest": digest}))


def _read_json(path: Path) -> dict[str, Any]:
    """Returns the entries of a file; none where it is absent or damaged."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _bytes(count: int | None) -> str:
    return "?" if count is None else f"{tqdm.format_sizeof(count)}B"


def _unpacked_size(item: RemoteFile) -> int:
    """Returns the bytes that an archive's contents may take; 0 where they are there."""
    if item.archive is None or item.unpacked.exists():
        return 0
    return ARCHIVES[item.archive] * ((item.there if item.whole else item.size) or 0)


def _unpack(item: RemoteFile, digest: str) -> Path:
    """Unpacks an archive into its folder, whole or not at all, and returns that folder."""
    archive, target, aside = item.path, item.unpacked, item.beside(".{}.unpacking")
    marker, before = {"archive": archive.name, "digest": digest}, _read_json(target / ".unpacked.json")
    if before == marker:
        return target
    if target.exists() and before.get("archive") != archive.name:
        raise DataError(f"{target}: is there already and was not unpacked from {archive.name}: move it away")
    if (lock := try_lock(archive)) is None:
        raise DataError(f"{archive.name}: another process is unpacking it; wait for that one")
    with lock:
        shutil.rmtree(aside, ignore_errors=True)  # of a killed run
        try:
            aside.mkdir()
            _unpack_into(archive, aside)
            (aside / ".unpacked.json").write_text(json.dumps(marker), encoding="utf-8")
            os.sync()
            shutil.rmtree(target, ignore_errors=True)  # of an archive that was published anew
            os.replace(aside, target)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return target


def _unpack_into(archive: Path, folder: Path) -> None:
    try:
        if archive.suffix.lower() == ".zip":
            with zipfile.ZipFile(archive) as content:
                for name in content.namelist():  # shutil leaves such members out without a word
                    if name.startswith("/") or "\\" in name or ".." in PurePosixPath(name).parts:
                        raise DataError(f"{archive.name}: holds {name!r}, which leads outside its folder")
            shutil.unpack_archive(archive, folder)
        else:
            shutil.unpack_archive(archive, folder, filter="data")
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, LZMAError, EOFError, RuntimeError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # of the disk; damage has no number
            raise
        raise DataError(f"{archive}: cannot be unpacked ({first_line(error)}): run it with --verify") from error
