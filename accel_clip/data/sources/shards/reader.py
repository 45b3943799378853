"""Bytes from the middle of shards, through few open files, with patience for disks that fail for a moment."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from accel_clip.data.bad_samples import UnusableSample

MOST_OPEN_FILES = 64
# without O_NONBLOCK, opening a pipe that has taken a shard's place would wait forever; to files it means nothing
FLAGS = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0)
WAITS_SECONDS = (0.05, 0.2, 0.8)
"""before the second attempt to read and those after it"""


class OpenFile:
    """A file that is open for reading until nobody refers to it."""

    def __init__(self, path: str, num_bytes: int, mtime_ns: int) -> None:
        self.descriptor, self.indexed = -1, (num_bytes, mtime_ns)
        self.descriptor = os.open(path, FLAGS)
        self.require_unchanged()

    def read(self, offset: int, num_bytes: int) -> bytes:
        """Return bytes from a place on; raises `ShardChanged`, also when the file has been written to while open."""
        content = read_fully(self.descriptor, offset, num_bytes)
        self.require_unchanged()
        return content

    def require_unchanged(self) -> None:
        """Raise `ShardChanged` unless the file has the size and the time of change that were indexed."""
        status = os.fstat(self.descriptor)
        if (status.st_size, status.st_mtime_ns) != self.indexed:
            raise ShardChanged

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)


class ShardChanged(Exception):
    """A shard that is not the one that was indexed."""


class ShardReader:
    """Reads bytes of shards by place. Each process opens files of its own, and keeps the 64 that it used last.

    Threads may share a reader: a file that another thread let go of stays open until it has been read. Once a shard has
    failed in spite of all attempts, one attempt must do until it is back.
    """

    def __init__(self, paths: Sequence[Path], num_bytes: Sequence[int], mtime_ns: Sequence[int]) -> None:
        self.paths = [os.path.abspath(path) for path in paths]
        self.num_bytes, self.mtime_ns = list(num_bytes), list(mtime_ns)
        self.start()

    def start(self) -> None:
        """Begin without open files."""
        self.process = os.getpid()
        self.failed: set[int] = set()
        self.file = lru_cache(MOST_OPEN_FILES)(self.open_file)

    def __getstate__(self) -> dict[str, Any]:
        return {"paths": self.paths, "num_bytes": self.num_bytes, "mtime_ns": self.mtime_ns}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.start()

    def open_file(self, shard: int) -> OpenFile:
        """Return a shard, opened; raises `OSError`, and `ShardChanged` when it is another file than was indexed."""
        return OpenFile(self.paths[shard], self.num_bytes[shard], self.mtime_ns[shard])

    def read(self, shard: int, offset: int, num_bytes: int) -> bytes:
        """Return bytes of a shard; raises `UnusableSample` when they are not there or cannot be read."""
        path = self.paths[shard]
        if offset + num_bytes > self.num_bytes[shard]:
            raise UnusableSample("truncated_shard", "the shard ends before the data does", path)
        if os.getpid() != self.process:
            self.start()
        for wait in (0.0,) if shard in self.failed else (0.0, *WAITS_SECONDS):
            if wait:
                time.sleep(wait)
            try:
                content = self.file(shard).read(offset, num_bytes)
            except ShardChanged:
                problem = UnusableSample("truncated_shard", "the shard has changed since this run began", path)
                break
            except FileNotFoundError as error:
                problem = UnusableSample("missing_file", error.strerror or "no such file", path)
            except OSError as error:
                problem = UnusableSample("missing_file", f"the shard cannot be read: {error.strerror}", path)
            else:
                if len(content) == num_bytes:
                    self.failed.discard(shard)
                    return content
                problem = UnusableSample("truncated_shard", "the shard has become shorter since this run began", path)
            self.file.cache_clear()  # another attempt opens the file anew, as network disks need it
        self.failed.add(shard)
        raise problem


def read_fully(descriptor: int, offset: int, num_bytes: int) -> bytes:
    """Return bytes of an open file, fewer only at its end."""
    content = os.pread(descriptor, num_bytes, offset)
    while 0 < len(content) < num_bytes:
        more = os.pread(descriptor, num_bytes - len(content), offset + len(content))
        if not more:
            break
        content += more
    return content
