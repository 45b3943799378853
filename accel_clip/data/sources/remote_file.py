"""A file at an address, read from front to back; a connection that breaks is made anew, and goes on where it broke."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import ExitStack
from http import HTTPStatus
from types import TracebackType

from accel_clip.data.bad_samples import UnusableSample
from accel_clip.data.sources.answers import LeadsNowhere, Version, seconds_of, start_of_range, version_of
from accel_clip.data.sources.connections import BROKEN, Answer, Pace, Patience, TryAgain, asked
from accel_clip.faults import one_line
from accel_clip.redaction import masked

WORTH_ANOTHER_ATTEMPT = frozenset((408, 425, 429, 500, 502, 503, 504))
BYTES_OF_A_GOOD_CONNECTION = 1 << 16  # after so many, attempts count anew: servers end those that read slowly


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
        self.pace = Pace(self.patience)
        self.connection = ExitStack()

    def __enter__(self) -> RemoteFile:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.connection.close()

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
                with self.pace.waiting():
                    if self.chunks is None:
                        self.chunks = self.connect()
                    chunk = next(self.chunks, b"")
            except LeadsNowhere as error:
                raise self.unusable(f"the address leads nowhere: {error}") from error
            except BROKEN as error:
                self.wait(f"{type(error).__name__}: {one_line(error)}", 0.0)
            except TryAgain as error:
                self.wait(str(error), error.wait_seconds)
            else:
                self.received += len(chunk)
                return chunk

    def wait(self, problem: str, wait_seconds: float) -> None:
        """Wait before another attempt; raises `UnusableSample` after the last."""
        patience = self.patience
        self.connection.close()
        self.chunks = None
        if self.received >= BYTES_OF_A_GOOD_CONNECTION:
            self.num_failed = 0
        self.received = 0
        self.num_failed += 1
        if self.num_failed > len(patience.waits_seconds):
            raise self.unusable(f"{self.num_failed} attempts have failed, the last by {problem}")
        wait = max(wait_seconds, patience.waits_seconds[self.num_failed - 1])
        wait = min(wait, max(patience.longest_wait_seconds, *patience.waits_seconds))
        if patience.tell:
            patience.tell(f"{self.address}: {problem}: another attempt in {wait:.0f} s")
        patience.sleep(wait)

    def connect(self) -> Iterator[bytes]:
        """Ask for the file from `place` on and return its bytes; raises `TryAgain`, and as `asked` does."""
        self.pace.begin()
        answer = self.connection.enter_context(asked(self.address, self.headers(), self.pace))
        self.was_answered = True
        if answer.status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            return iter(())  # the file ends before, or right there
        self.require_success(answer)
        start = self.start_of(answer)
        version = version_of(answer.headers)
        if self.version is not None and version.differs(self.version):
            raise UnusableSample("truncated_shard", "the file has changed since it was begun", masked(self.address))
        self.version = self.version or version
        return passed_over(answer.content, self.place - start)

    def headers(self) -> dict[str, str]:
        """Return what a request says beside the address: from where on, and of which state of the file."""
        headers = {"Accept-Encoding": "identity"}
        if self.place:
            headers["Range"] = f"bytes={self.place}-"
            if self.version and (validator := self.version.validator()):
                headers["If-Range"] = validator
        return headers

    def require_success(self, answer: Answer) -> None:
        """Raise `TryAgain` for an answer that may become better, `UnusableSample` for one that will not."""
        status = f"{answer.status} {answer.reason}".strip()
        if answer.status in WORTH_ANOTHER_ATTEMPT:
            raise TryAgain(f"the answer {status}", seconds_of(answer.headers.get("Retry-After", "")))
        if answer.status not in (HTTPStatus.OK, HTTPStatus.PARTIAL_CONTENT):
            raise self.unusable(f"the server answers {status}")

    def start_of(self, answer: Answer) -> int:
        """Return the place of the first byte of an answer: 0 from a server that knows no parts."""
        if answer.status == HTTPStatus.OK:
            return 0
        if start_of_range(answer.headers) != self.place:
            raise TryAgain(f"an answer with another part of the file than from byte {self.place:,}")
        return self.place

    def unusable(self, detail: str) -> UnusableSample:
        """Return the error for a file that cannot be read; credentials in it are masked."""
        return UnusableSample("missing_file", masked(detail), masked(self.address))


def passed_over(chunks: Iterator[bytes], num_bytes: int) -> Generator[bytes, None, None]:
    """Yield what follows the first bytes."""
    for chunk in chunks:
        if len(chunk) > num_bytes:
            yield chunk[num_bytes:]
        num_bytes = max(num_bytes - len(chunk), 0)
