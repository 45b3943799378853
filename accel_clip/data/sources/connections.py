"""Requests to servers that are not trusted: waited for in short pieces, and given up when too little comes.

1. Every wait for bytes is cut into pieces of a second, between which a signal is heard.
2. What counts is the file itself: unless `least_bytes` of it have come in `window_seconds` of waiting, the attempt has
   failed. So a server gains nothing by headers, by notes that it is still at it, or by single bytes. Time in which
   nobody waits, since the step takes long, does not count.
3. Beside the file no more than `MOST_BESIDE_BYTES` are read in a row, however fast they come.
"""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any
from urllib.request import getproxies, proxy_bypass

import httpcore2
import httpx2

from accel_clip.data.sources.answers import LeadsNowhere, address_in

PIECE_SECONDS = 1.0
MOST_BESIDE_BYTES = 1 << 18
MOST_REDIRECTS = 20
REDIRECTS = frozenset((301, 302, 303, 307, 308))
BROKEN = (
    *(httpcore2.TimeoutException, httpcore2.NetworkError, httpcore2.ProtocolError, httpcore2.ProxyError),
    *(ValueError, OverflowError),  # of what the libraries make of an answer that they did not expect
)
"""What another attempt may better."""


@dataclass(frozen=True)
class Patience:
    """How long a server is waited for."""

    waits_seconds: tuple[float, ...] = (1.0, 4.0, 15.0, 30.0)
    """before the second attempt and those after it"""
    longest_wait_seconds: float = 120.0
    """at most, where the server itself names how long (Retry-After)"""
    connect_seconds: float = 10.0
    """in which a connection must be there"""
    read_seconds: float = 60.0
    """without a single byte"""
    window_seconds: float = 60.0
    """in which `least_bytes` of the file must come"""
    least_bytes: int = 1 << 14
    """a line of 20 KiB/s feeds 75 readers so, and one of them needs four days for a shard of 100 MB: less is no data"""
    sleep: Callable[[float], None] = time.sleep
    """waits for so many seconds"""
    tell: Callable[[str], object] | None = None
    """called with a line about every attempt that has failed and is followed by another"""


class TryAgain(Exception):
    """What another attempt may better, and how many seconds the server wants to be left alone."""

    def __init__(self, detail: str, wait_seconds: float = 0.0) -> None:
        super().__init__(detail)
        self.wait_seconds = wait_seconds


@dataclass
class Pace:
    """How much of a file has come while it was waited for."""

    patience: Patience
    """what must come in which time"""
    num_bytes: int = 0
    """of the file, in the window that is open"""
    seconds: float = 0.0
    """of waiting, in the window that is open"""
    since: float | None = None
    """when the wait began that is going on, None without one"""
    num_beside: int = 0
    """bytes since the last one of the file itself"""

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time of a block."""
        self.since = time.monotonic()
        try:
            yield
        finally:
            self.seconds, self.since = self.waited(), None

    def waited(self) -> float:
        """Return for how long bytes of the window that is open have been waited for."""
        return self.seconds + (0.0 if self.since is None else time.monotonic() - self.since)

    def begin(self) -> None:
        """Open another window."""
        self.num_bytes, self.seconds, self.num_beside = 0, 0.0, 0
        self.since = None if self.since is None else time.monotonic()

    def take(self, num_bytes: int) -> None:
        """Count bytes of the file."""
        self.num_bytes += num_bytes
        self.num_beside = 0 if num_bytes else self.num_beside

    def receive(self, num_bytes: int) -> None:
        """Count bytes of whatever kind; raises `TryAgain` for too many that are none of the file."""
        self.num_beside += num_bytes
        if self.num_beside > MOST_BESIDE_BYTES:
            raise TryAgain(f"an answer with {self.num_beside:,} bytes in a row that are none of the file")

    def look(self) -> None:
        """Raise `TryAgain` when a window has passed with too little in it; called at least once a second."""
        seconds = self.waited()
        if seconds < self.patience.window_seconds:
            return
        if self.num_bytes < self.patience.least_bytes:
            least = f"{self.patience.least_bytes:,} in {self.patience.window_seconds:g} s"
            raise TryAgain(f"{self.num_bytes:,} bytes of the file in {seconds:.1f} s, where the least is {least}")
        self.begin()


class PacedStream(httpcore2.NetworkStream):
    """A connection whose reads are waited for in pieces."""

    def __init__(self, stream: httpcore2.NetworkStream, pace: Pace) -> None:
        self.stream, self.pace = stream, pace

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        """Return what has come, nothing at the end; raises `ReadTimeout` and `TryAgain`."""
        start = time.monotonic()
        while True:
            self.pace.look()
            try:
                content = self.stream.read(max_bytes, PIECE_SECONDS)
            except httpcore2.ReadTimeout:
                if timeout is not None and time.monotonic() - start >= timeout:
                    raise
            else:
                self.pace.receive(len(content))
                return content

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        """Send bytes."""
        self.stream.write(buffer, timeout)

    def close(self) -> None:
        """Close the connection."""
        self.stream.close()

    def get_extra_info(self, info: str) -> Any:
        """Return what else is known of the connection."""
        return self.stream.get_extra_info(info)

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore2.NetworkStream:
        """Return the connection, encrypted."""
        return PacedStream(self.stream.start_tls(ssl_context, server_hostname, timeout), self.pace)


class PacedBackend(httpcore2.NetworkBackend):
    """Opens connections whose reads are waited for in pieces."""

    def __init__(self, pace: Pace) -> None:
        self.pace, self.sockets = pace, httpcore2.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore2.NetworkStream:
        """Return a connection."""
        return PacedStream(self.sockets.connect_tcp(host, port, timeout, local_address, socket_options), self.pace)


@dataclass(frozen=True)
class Answer:
    """What a server answers."""

    status: int
    """its number"""
    reason: str
    """the words beside it"""
    headers: httpx2.Headers
    """by name, in any case"""
    content: Iterator[bytes]
    """the bytes that follow"""

    @property
    def redirect(self) -> str | None:
        """Return where an answer leads on to, None for one that does not."""
        return self.headers.get("Location") if self.status in REDIRECTS else None


@contextmanager
def asked(address: str, headers: Mapping[str, str], pace: Pace) -> Iterator[Answer]:
    """Yield what is answered at an address or at the last one that it redirects to, until the block ends.

    Raises `LeadsNowhere` for addresses that are none, `TryAgain` and the errors in `BROKEN`.
    """
    place = address_in(address)
    for _ in range(MOST_REDIRECTS + 1):
        with pool_for(place, pace) as pool, pool.stream("GET", core_url(place), **request(place, headers, pace)) as got:
            answer = answer_of(got, pace)
            if answer.redirect is None:
                yield answer
                return
        place = address_in(answer.redirect, place)
    raise LeadsNowhere(f"it redirects more than {MOST_REDIRECTS} times")


def pool_for(address: httpx2.URL, pace: Pace) -> httpcore2.ConnectionPool:
    """Return what connects to an address, through the proxy that the environment names for it."""
    return httpcore2.ConnectionPool(
        ssl_context=trusted_certificates(), proxy=proxy_for(address), network_backend=PacedBackend(pace)
    )


@cache
def trusted_certificates() -> ssl.SSLContext:
    """Return the certificates that servers are known by, read once: that takes as long as a small shard."""
    return httpx2.create_ssl_context()


def proxy_for(address: httpx2.URL) -> httpcore2.Proxy | None:
    """Return the proxy of http_proxy, https_proxy or all_proxy, None without one or where no_proxy says so.

    Raises `LeadsNowhere` for one that speaks SOCKS where the package for that is missing.
    """
    proxies = getproxies()
    written = proxies.get(address.scheme) or proxies.get("all")
    if not written or proxy_bypass(address.host):
        return None
    proxy = httpx2.Proxy(written if "://" in written else f"http://{written}")
    if proxy.url.scheme.startswith("socks") and find_spec("socksio") is None:
        raise LeadsNowhere("the proxy that the environment names speaks SOCKS: pip install socksio")
    return httpcore2.Proxy(core_url(proxy.url), auth=proxy.raw_auth)


def core_url(address: httpx2.URL) -> httpcore2.URL:
    """Return an address as the lower library takes it."""
    return httpcore2.URL(scheme=address.raw_scheme, host=address.raw_host, port=address.port, target=address.raw_path)


def request(address: httpx2.URL, headers: Mapping[str, str], pace: Pace) -> dict[str, Any]:
    """Return what a request says beside its address, and how long each part of it is waited for."""
    patience = pace.patience
    timeout = {"connect": patience.connect_seconds, "read": patience.read_seconds, "write": patience.read_seconds}
    said = {"Host": address.netloc.decode("ascii"), "Accept": "*/*", "User-Agent": "accel-clip", **headers}
    return {"headers": said, "extensions": {"timeout": timeout}}


def answer_of(response: httpcore2.Response, pace: Pace) -> Answer:
    """Return an answer, the bytes of which are counted as they come."""
    reason = response.extensions.get("reason_phrase", b"").decode("ascii", "replace")
    return Answer(
        response.status, reason, httpx2.Headers(response.headers), counted_bytes(response.iter_stream(), pace)
    )


def counted_bytes(chunks: Iterable[bytes], pace: Pace) -> Iterator[bytes]:
    """Yield the bytes of a file, and count them."""
    for chunk in chunks:
        pace.take(len(chunk))
        yield chunk
