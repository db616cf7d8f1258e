"""A web server on 127.0.0.1 with every fault that a download must survive, and a count of what it sent."""

from __future__ import annotations

import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

PIECE = 1 << 14


@dataclass
class Page:
    """Behaviour of one path; ``None`` leaves a header out, entries of lists are used up one request each.

    ``cuts`` break the connection after so many bytes, ``statuses`` (a code, or a code and headers) and ``sent_before``
    are sent instead, ``length`` is the Content-Length claimed ("none" sends none and closes, "chunked" sends chunks),
    ``wrong_range`` answers with as many bytes of another range, ``if_range`` is whether If-Range is understood,
    ``pause`` is seconds between pieces, ``meeting`` waits for other answers.
    """

    content: bytes = b""
    etag: str | None = '"one"'
    modified: str | None = None
    ranges: bool = True
    if_range: bool = True
    cuts: list[int] = field(default_factory=list)
    statuses: list[int | tuple[int, dict[str, str]]] = field(default_factory=list)
    redirect: tuple[int, str] | None = None
    content_type: str = "application/octet-stream"
    headers: dict[str, str] = field(default_factory=dict)
    length: int | str | None = None
    wrong_range: bool = False
    pause: float = 0.0
    meeting: threading.Barrier | None = None
    sent_before: list[bytes] = field(default_factory=list)


@dataclass
class Asked:
    """A request and what was sent in answer."""

    path: str
    start: int
    headers: dict[str, str]
    proxied: bool
    status: int = 0
    sent: int = 0


class FileServer:
    """Pages by path, and what was asked for, in order."""

    def __init__(self) -> None:
        self.pages: dict[str, Page] = {}
        self.asked: list[Asked] = []
        self.lock = threading.Lock()
        self.address = ""

    def got(self, path: str) -> list[Asked]:
        """Requests for a path."""
        with self.lock:
            return [item for item in self.asked if item.path == path]

    def sent(self, path: str) -> int:
        """Bytes of a path that were sent, all requests together."""
        return sum(item.sent for item in self.got(path))


@contextmanager
def file_server() -> Iterator[FileServer]:
    """A running server."""
    owner = FileServer()
    with ThreadingHTTPServer(("127.0.0.1", 0), _handler(owner)) as server:
        server.daemon_threads = True
        owner.address = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield owner
        finally:
            server.shutdown()
            thread.join()


def _handler(owner: FileServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def setup(self) -> None:
            super().setup()
            # What is sent should be what is on its way, not what a large buffer holds.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, PIECE)

        def log_message(self, format: str, *args: Any) -> None:
            pass

        def do_GET(self) -> None:
            self.close_connection = True
            proxied = self.path.startswith("http://")
            path = urlsplit(self.path).path
            asked = Asked(path, 0, {k.lower(): v for k, v in self.headers.items()}, proxied)
            with owner.lock:
                owner.asked.append(asked)
                page = owner.pages.get(path)
                instead = page.statuses.pop(0) if page and page.statuses else None
                cut = page.cuts.pop(0) if page and page.cuts and not instead else None
                content = page.sent_before.pop(0) if page and page.sent_before else page.content if page else b""
            if page is None:
                self._head(asked, 404, {})
            elif instead is not None:
                code, headers = (instead, {}) if isinstance(instead, int) else instead
                self._head(asked, code, headers)
            elif page.redirect is not None:
                self._head(asked, page.redirect[0], {"Location": page.redirect[1]})
            else:
                self._file(asked, page, content, cut)

        def _file(self, asked: Asked, page: Page, content: bytes, cut: int | None) -> None:
            match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
            condition = self.headers.get("If-Range")
            current = condition is None or condition in (page.etag, page.modified) or not page.if_range
            headers = {"Content-Type": page.content_type, **page.headers}
            if page.etag:
                headers["ETag"] = page.etag
            if page.modified:
                headers["Last-Modified"] = page.modified
            status = 200
            if match and page.ranges and current:
                asked.start = int(match[1])
                if asked.start >= len(content):
                    headers = {"Content-Range": f"bytes */{len(content)}", "Content-Type": "text/html"}
                    self._head(asked, 416, headers)
                    return
                size = len(content)
                if page.wrong_range:
                    content, asked.start = content[: size - asked.start + asked.start // 2], asked.start // 2
                status = 206
                headers["Content-Range"] = f"bytes {asked.start}-{len(content) - 1}/{size}"
            if page.length == "chunked":
                headers["Transfer-Encoding"] = "chunked"
            elif page.length != "none":
                claimed = page.length if isinstance(page.length, int) else len(content)
                headers["Content-Length"] = str(claimed - asked.start)
            self._head(asked, status, headers)
            try:
                if page.meeting is not None:
                    page.meeting.wait(timeout=10.0)
                self._send(asked, content[asked.start :], cut, page)
            except (OSError, threading.BrokenBarrierError):  # the client has gone, or nobody else came
                pass

        def _head(self, asked: Asked, status: int, headers: dict[str, str]) -> None:
            asked.status = status
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            if status not in (200, 206):
                self.send_header("Content-Length", "0")
            self.send_header("Connection", "close")
            self.end_headers()

        def _send(self, asked: Asked, content: bytes, cut: int | None, page: Page) -> None:
            for begin in range(0, len(content) if cut is None else min(cut, len(content)), PIECE):
                piece = content[begin : begin + PIECE] if cut is None else content[begin : min(begin + PIECE, cut)]
                self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece) if page.length == "chunked" else piece)
                asked.sent += len(piece)
                if page.pause:
                    time.sleep(page.pause)
            if page.length == "chunked" and cut is None:
                self.wfile.write(b"0\r\n\r\n")

    return Handler
