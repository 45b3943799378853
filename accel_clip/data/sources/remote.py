"""A file at an address, read from front to back; a connection that breaks is made anew, and goes on where it broke."""

from __future__ import annotations

import re
import ssl
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from functools import cache
from types import TracebackType

import httpx2

from accel_clip.data.bad_samples import UnusableSample
from accel_clip.redaction import masked

WORTH_ANOTHER_ATTEMPT = frozenset((408, 425, 429, 500, 502, 503, 504))
BYTES_OF_A_GOOD_CONNECTION = 1 << 16  # after so many, attempts count anew: servers end those that read slowly
CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")


@dataclass(frozen=True)
class Patience:
    """How long a server is waited for."""

    waits_seconds: tuple[float, ...] = (1.0, 4.0, 15.0, 30.0)
    """before the second attempt and those after it"""
    longest_wait_seconds: float = 120.0
    """at most, where the server itself names how long (Retry-After)"""
    connect_seconds: float = 10.0
    read_seconds: float = 60.0
    """without a single byte"""
    sleep: Callable[[float], None] = time.sleep


@cache
def trusted_certificates() -> ssl.SSLContext:
    """Return the certificates that servers are known by, read once: that takes as long as a small shard."""
    return httpx2.create_ssl_context()


class TryAgain(Exception):
    """An answer that another attempt may better, and how many seconds the server wants to be left alone."""

    def __init__(self, detail: str, wait_seconds: float = 0.0) -> None:
        super().__init__(detail)
        self.wait_seconds = wait_seconds


@dataclass(frozen=True)
class Version:
    """By what a server tells one state of a file from another; what it does not say is None."""

    entity_tag: str | None
    changed: str | None
    num_bytes: int | None

    def validator(self) -> str | None:
        """Return what a request for a part may be tied to: tags of the weak kind do not count."""
        tag = self.entity_tag
        return tag if tag is not None and not tag.startswith("W/") else self.changed

    def differs(self, other: Version) -> bool:
        """Return whether two answers are surely not of one state of the file."""
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return any(one != two for one, two in pairs if one is not None and two is not None)


class RemoteFile:
    """A file at an http(s) address from byte `start` on; nothing is asked for before the first byte is read.

    Every method may raise `UnusableSample`: `missing_file` where the server refuses the file or all attempts have
    failed, `truncated_shard` where the file has changed between two of them.
    """

    def __init__(self, address: str, start: int = 0, patience: Patience | None = None) -> None:
        self.address, self.place, self.patience = address, start, patience or Patience()
        self.num_failed = 0
        self.was_answered = False
        self.version: Version | None = None
        self.chunk = memoryview(b"")
        self.chunks: Iterator[bytes] | None = None
        self.received = 0
        """bytes since the last attempt that failed"""
        timeout = httpx2.Timeout(self.patience.read_seconds, connect=self.patience.connect_seconds)
        self.client = httpx2.Client(timeout=timeout, follow_redirects=True, verify=trusted_certificates())
        self.connection = ExitStack()

    def __enter__(self) -> RemoteFile:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.connection.close()
        self.client.close()

    def tell(self) -> int:
        """Return the place of the next byte."""
        return self.place

    def read(self, num_bytes: int) -> bytes:
        """Return the next bytes, fewer at the end."""
        return b"".join(self.parts(num_bytes))

    def skip(self, num_bytes: int) -> int:
        """Pass over the next bytes and return how many they were, fewer at the end."""
        return sum(len(part) for part in self.parts(num_bytes))

    def parts(self, num_bytes: int) -> Iterator[memoryview]:
        """Yield the next bytes, piece by piece as they come."""
        while num_bytes > 0:
            if not self.chunk:
                self.chunk = memoryview(self.next_chunk())
            part, self.chunk = self.chunk[:num_bytes], self.chunk[num_bytes:]
            if not part:
                return
            self.place += len(part)
            num_bytes -= len(part)
            yield part

    def next_chunk(self) -> bytes:
        """Return the bytes that come next, none at the end, by as many attempts as it takes and may take."""
        while True:
            try:
                if self.chunks is None:
                    self.chunks = self.connect()
                chunk = next(self.chunks, b"")
            except (httpx2.UnsupportedProtocol, httpx2.TooManyRedirects, httpx2.InvalidURL) as error:
                raise self.unusable(f"the address leads nowhere: {error}") from error
            except httpx2.TransportError as error:
                self.wait(f"{type(error).__name__}: {error}", 0.0)
            except TryAgain as error:
                self.wait(str(error), error.wait_seconds)
            else:
                self.received += len(chunk)
                return chunk

    def wait(self, problem: str, wait_seconds: float) -> None:
        """Wait before another attempt; raises `UnusableSample` after the last."""
        self.connection.close()
        self.chunks = None
        if self.received >= BYTES_OF_A_GOOD_CONNECTION:
            self.num_failed = 0
        self.received = 0
        self.num_failed += 1
        if self.num_failed > len(self.patience.waits_seconds):
            raise self.unusable(f"{self.num_failed} attempts have failed, the last by {problem}")
        wait = max(wait_seconds, self.patience.waits_seconds[self.num_failed - 1])
        self.patience.sleep(min(wait, max(self.patience.longest_wait_seconds, *self.patience.waits_seconds)))

    def connect(self) -> Iterator[bytes]:
        """Ask for the file from `place` on and return its bytes; raises `TryAgain`, and as httpx does."""
        request = self.client.build_request("GET", self.address, headers=self.headers())
        response = self.client.send(request, stream=True)
        self.connection.callback(response.close)
        self.was_answered = True
        if response.status_code == httpx2.codes.REQUESTED_RANGE_NOT_SATISFIABLE:
            return iter(())  # the file ends before, or right there
        self.require_success(response)
        start = self.start_of(response)
        version = version_of(response)
        if self.version is not None and version.differs(self.version):
            raise UnusableSample("truncated_shard", "the file has changed since it was begun", masked(self.address))
        self.version = self.version or version
        return passed_over(response.iter_raw(), self.place - start)

    def headers(self) -> dict[str, str]:
        """Return what a request says beside the address: from where on, and of which state of the file."""
        headers = {"Accept-Encoding": "identity"}
        if self.place:
            headers["Range"] = f"bytes={self.place}-"
            if self.version and (validator := self.version.validator()):
                headers["If-Range"] = validator
        return headers

    def require_success(self, response: httpx2.Response) -> None:
        """Raise `TryAgain` for an answer that may become better, `UnusableSample` for one that will not."""
        status = f"{response.status_code} {response.reason_phrase}".strip()
        if response.status_code in WORTH_ANOTHER_ATTEMPT:
            raise TryAgain(f"the answer {status}", seconds_of(response.headers.get("Retry-After", "")))
        if response.status_code not in (httpx2.codes.OK, httpx2.codes.PARTIAL_CONTENT):
            raise self.unusable(f"the server answers {status}")

    def start_of(self, response: httpx2.Response) -> int:
        """Return the place of the first byte of an answer: 0 from a server that knows no parts."""
        if response.status_code == httpx2.codes.OK:
            return 0
        match = CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
        if match is None or int(match[1]) != self.place:
            raise TryAgain(f"an answer with another part of the file than from byte {self.place:,}")
        return self.place

    def unusable(self, detail: str) -> UnusableSample:
        """Return the error for a file that cannot be read; credentials in it are masked."""
        return UnusableSample("missing_file", masked(detail), masked(self.address))


def version_of(response: httpx2.Response) -> Version:
    """Return the state of the file that an answer is of."""
    headers = response.headers
    match = CONTENT_RANGE.fullmatch(headers.get("Content-Range", ""))
    size = match[2] if match else headers.get("Content-Length", "")
    return Version(headers.get("ETag"), headers.get("Last-Modified"), int(size) if size.isdigit() else None)


def passed_over(chunks: Iterator[bytes], num_bytes: int) -> Generator[bytes, None, None]:
    """Yield what follows the first bytes."""
    for chunk in chunks:
        if len(chunk) > num_bytes:
            yield chunk[num_bytes:]
        num_bytes = max(num_bytes - len(chunk), 0)


def seconds_of(retry_after: str) -> float:
    """Return for how long a server wants to be left alone: it writes seconds or a date."""
    if retry_after.strip().isdigit():
        return float(retry_after)
    with suppress(ValueError, TypeError):
        date = parsedate_to_datetime(retry_after)
        return max((date.astimezone(timezone.utc) - datetime.now(timezone.utc)).total_seconds(), 0.0)
    return 0.0
