"""Standard output and standard error that outlive whoever reads them: a closed terminal, a dead pager or `tee`."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

GONE = (errno.EPIPE, errno.EIO, errno.EBADF, errno.ENXIO, errno.ECONNRESET)  # pipe or socket, terminal, descriptor


class LastingStream:
    """A text stream whose failures to write are nobody's error: what cannot be written is dropped.

    is_lost: whether its reader is gone. From then on the null device takes everything, also what libraries write past
    this stream, and what is buffered: it could not be emptied when the program ends. A full disk may be emptied.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.is_lost = stream, False

    def write(self, text: str) -> int:
        """Write a text where somebody reads it."""
        self.attempt("write", text)
        return len(text)

    def writelines(self, lines: Any) -> None:
        """Write lines where somebody reads them."""
        self.write("".join(lines))

    def flush(self) -> None:
        """Send on what is buffered, where somebody reads it."""
        self.attempt("flush")

    def attempt(self, method: str, *arguments: str) -> None:
        """Call a method of the stream, and give the stream up where its reader is gone."""
        try:
            getattr(self.stream, method)(*arguments)
        except OSError as error:
            if error.errno in GONE:
                self.is_lost = True
                self.redirect()

    def redirect(self) -> None:
        """Let the null device take what is buffered, and what comes."""
        with suppress(OSError, ValueError):  # a stream that is no file has no descriptor
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.stream.fileno())
            os.close(null)
            self.stream.flush()

    def settle(self) -> None:
        """Flush for the last time; Python would end with an error where that fails."""
        try:
            self.stream.flush()
        except (OSError, ValueError):
            self.redirect()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def lasting_output() -> Iterator[None]:
    """Let standard output and error be `LastingStream`s during a block; one that was closed is the null device."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = lasting(sys.stdout), lasting(sys.stderr)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, LastingStream):
                stream.settle()
        sys.stdout, sys.stderr = before


def lasting(stream: TextIO | None) -> Any:
    """Return a stream that lasts."""
    if isinstance(stream, LastingStream):
        return stream
    return LastingStream(stream or open(os.devnull, "w", encoding="utf-8"))
