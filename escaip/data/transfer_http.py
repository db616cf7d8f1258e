"""Asking a server for a file: redirects, refusals, what a response is and whether it is still the same file."""

from __future__ import annotations

import email.utils
import os
import random
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urljoin, urlsplit

from escaip import __version__
from escaip.errors import DataError

if TYPE_CHECKING:
    from requests import Response, Session

MAX_REDIRECTS = 10
# 202: what figshare's front answers while it makes up its mind about a client.
_PASSING = (202, 408, 425, 429, 500, 502, 503, 504)


@dataclass(frozen=True)
class RemoteFile:
    """A published file, as a data card names it.

    Attributes:
        name: path below the folder of the data set.
        url: http or https.
        size: exact, in bytes.
        approximate_size: where the exact size is not known, in bytes.
        algorithm: of the checksum: md5, or sha256, which is also computed where none was published.
        digest: the checksum published; None where there is none.
        split: it belongs to.
        gated: has conditions that a person must accept first.
        how: to get a gated file.
        homepage: of the data set.
    """

    name: str
    url: str
    size: int | None = None
    approximate_size: int | None = None
    algorithm: str = "sha256"
    digest: str | None = None
    split: str = ""
    gated: bool = False
    how: str = ""
    homepage: str = ""


@dataclass(frozen=True)
class RetryPolicy:
    """Patience with servers and networks.

    Attributes:
        attempts: failures in a row, without a byte of progress between them, before giving up; and how often a file
            may start over.
        first_delay: seconds before the second attempt; each further wait is twice as long.
        longest_delay: seconds.
        longest_wait: seconds that a server may ask for (``Retry-After``) before giving up.
        connect_timeout: seconds.
        read_timeout: seconds without a byte.
    """

    attempts: int = 6
    first_delay: float = 1.0
    longest_delay: float = 60.0
    longest_wait: float = 600.0
    connect_timeout: float = 20.0
    read_timeout: float = 60.0

    def delay(self, failures: int) -> float:
        """Seconds to wait after so many failures, scattered so that parallel downloads do not come back at once."""
        scatter = random.SystemRandom().uniform(0.75, 1.25)
        return min(self.longest_delay, self.first_delay * 2 ** (failures - 1)) * scatter


class Passing(Exception):
    """An attempt that failed for a reason that may pass; ``wait`` is what the server asks for, in seconds."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


@contextmanager
def request(remote: RemoteFile, method: str, headers: dict[str, str], policy: RetryPolicy) -> Iterator[Response]:
    """The response at the end of the redirects; its body is not read yet.

    Raises:
        Passing: no response.
        DataError: none that another attempt could bring.
    """
    import requests

    # Compressed on the way, the bytes and their count would be other ones.
    headers = {"User-Agent": f"escaip/{__version__}", "Accept-Encoding": "identity", **headers}
    timeouts = (policy.connect_timeout, policy.read_timeout)
    url = remote.url
    with requests.Session() as session:
        authorities = os.environ.get("SSL_CERT_FILE")
        if authorities and not {"REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"} & set(os.environ):
            session.verify = authorities
        for _ in range(MAX_REDIRECTS + 1):
            try:
                response = session.request(
                    method, url, headers=headers, stream=True, allow_redirects=False, timeout=timeouts
                )
            except (OSError, ValueError) as error:  # of which those of requests are
                raise _no_response(remote, url, error, policy) from error
            with closing(response):
                if not response.is_redirect:
                    yield response
                    return
                url = _next_address(remote, session, response, url)
    raise DataError(f"{remote.name}: more than {MAX_REDIRECTS} redirects from {remote.url}; see {remote.homepage}")


def remote_size(remote: RemoteFile, policy: RetryPolicy) -> int | None:
    """Bytes according to the server; None where it does not say."""
    try:
        with request(remote, "HEAD", {}, policy) as response:
            return length(response) if response.status_code == 200 else None
    except (Passing, DataError):
        return None


def _next_address(remote: RemoteFile, session: Session, response: Response, url: str) -> str:
    """Where a redirect leads; never from an encrypted address to one that is not."""
    try:
        address = urljoin(url, session.get_redirect_target(response) or "")
        before, scheme = urlsplit(url), urlsplit(address).scheme
    except ValueError as error:
        raise DataError(f"{remote.name}: {remote.url} redirects to what is no address ({error})") from error
    if scheme not in ("http", "https") or (scheme == "http" and before.scheme == "https"):
        raise DataError(
            f"{remote.name}: {before.hostname} redirects from {before.scheme} to {scheme}, which is not safe to "
            f"follow; see {remote.homepage or remote.url}"
        )
    return address


def _no_response(remote: RemoteFile, url: str, error: Exception, policy: RetryPolicy) -> Exception:
    """What it means that no response came."""
    import requests

    host = urlsplit(url).hostname
    if isinstance(error, requests.exceptions.SSLError) and "CERTIFICATE_VERIFY_FAILED" in str(error):
        return DataError(
            f"{remote.name}: the certificate of {host} is not trusted here: if a proxy of your network replaces "
            "certificates, name its authorities in REQUESTS_CA_BUNDLE or SSL_CERT_FILE"
        )
    if isinstance(error, requests.exceptions.ProxyError):
        return Passing(f"the proxy that the environment names for {host} does not answer ({reason_of(error)})")
    if isinstance(error, requests.exceptions.ConnectTimeout):
        return Passing(f"{host} cannot be reached within {policy.connect_timeout:.0f} s")
    if isinstance(error, requests.exceptions.Timeout):
        return Passing(f"{host} sent nothing for {policy.read_timeout:.0f} s")
    if isinstance(error, requests.exceptions.RequestException) and not isinstance(error, ValueError):
        return Passing(f"no connection to {host} ({reason_of(error)})")
    return DataError(f"{remote.name}: {url} cannot be asked for ({error}): check the address and the proxy settings")


def reason_of(error: BaseException) -> str:
    """The innermost cause in a few words; those of requests repeat addresses, which may hold tokens."""
    seen: list[BaseException] = []
    while error not in seen:
        seen.append(error)
        error = error.__cause__ or error.__context__ or error
    named = next((item for item in reversed(seen) if isinstance(item, OSError) and item.strerror), None)
    return named.strerror if named is not None and named.strerror else type(seen[-1]).__name__


def refusal(remote: RemoteFile, response: Response, policy: RetryPolicy) -> Exception:
    """The exception that a status other than success means."""
    status = f"{response.status_code} {response.reason or ''}".strip()
    page = remote.homepage or remote.url
    if response.status_code in _PASSING:
        wait = _retry_after(response.headers.get("Retry-After", ""))
        if wait is not None and wait > policy.longest_wait:
            return DataError(f"{remote.name}: the server answers {status} and asks to wait {wait:.0f} s: run it later")
        return Passing(f"the server answers {status}", wait)
    if response.status_code in (401, 403, 407):
        return DataError(f"{remote.name}: the server refuses it ({status}): see {page} for how to get access")
    if response.status_code in (404, 410):
        return DataError(f"{remote.name}: {remote.url} does not exist ({status}): see {page} for where it is now")
    return DataError(f"{remote.name}: the server answers {status} to {remote.url}: see {page}")


def _retry_after(text: str) -> float | None:
    """Seconds, from a number of them or a date; None where there is neither."""
    if text.strip().isdecimal():
        return float(text)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (TypeError, ValueError, OverflowError):
        return None


def check_kind(remote: RemoteFile, response: Response) -> None:
    """Refuses what is not the file although the server calls it a success.

    Raises:
        DataError: a web page, or bytes in a coding.
    """
    kind = response.headers.get("Content-Type", "").partition(";")[0].strip().lower()
    if kind in ("text/html", "application/xhtml+xml") and not remote.name.endswith((".html", ".htm")):
        raise DataError(
            f"{remote.name}: a web page came instead of the file: the network or the server wants a person to log in "
            f"or to confirm; open {remote.homepage or remote.url} in a browser"
        )
    coding = response.headers.get("Content-Encoding", "identity").strip().lower()
    # Some servers call the compression that the file itself has a coding.
    if coding not in ("", "identity") and not remote.name.endswith((".gz", ".tgz", ".xz", ".bz2", ".zip")):
        raise DataError(f"{remote.name}: the server sends it compressed ({coding}) although it was asked not to")


def length(response: Response) -> int | None:
    """Bytes of the body; None where the server does not say."""
    text = response.headers.get("Content-Length", "").strip()
    return int(text) if text.isdecimal() and "Transfer-Encoding" not in response.headers else None


def validator(response: Response) -> str | None:
    """What names this version of the file: its strong ETag, else its date."""
    tag = response.headers.get("ETag", "").strip()
    return tag if tag.startswith('"') else response.headers.get("Last-Modified") or None


def differ(before: str | None, now: str | None) -> bool:
    """Whether two validators name two versions; a tag and a date say nothing about each other."""
    if before is None or now is None or before.startswith('"') != now.startswith('"'):
        return False
    return before != now
