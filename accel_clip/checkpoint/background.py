"""Checkpoints written beside the training, one at a time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import psutil

from accel_clip.checkpoint.snapshot import Snapshot
from accel_clip.checkpoint.write import write
from accel_clip.process.container import memory_left

MEMORY_FACTOR = 2  # times the snapshot's size that must be available beside it


class Writer:
    """Writes snapshots in a thread, or on the spot when memory is short. For the first process.

    blocking_seconds: what checkpoints have cost the training thread so far (snapshots and waiting).
    background_seconds: what they have cost the writing thread. finished_step: the last checkpoint that is complete.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self.keep = keep
        self.blocking_seconds = 0.0
        self.background_seconds = 0.0
        self.finished_step: int | None = None
        self.pending: Future[int] | None = None

    def submit(self, snapshot: Snapshot) -> None:
        """Start writing a snapshot; waits for one in flight first. Raises the `StorageError` that one met."""
        self.wait()
        self.blocking_seconds += snapshot.seconds
        if has_memory_for(snapshot):
            thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
            self.pending = thread.submit(self.write_in_background, snapshot)
            thread.shutdown(wait=False)  # it ends with its write, and no run leaves one
        else:
            with self.blocking():
                write(snapshot, self.folder, self.keep)
            self.finished_step = snapshot.step

    def poll(self) -> int | None:
        """Return the step of a checkpoint that has become complete since the last look; never waits.

        Raises the `StorageError` that the thread met.
        """
        return self.wait() if self.pending is not None and self.pending.done() else None

    def wait(self) -> int | None:
        """Wait for the write in flight and return its step, None when there is none; raises its `StorageError`."""
        if self.pending is None:
            return None
        pending, self.pending = self.pending, None
        with self.blocking():
            self.finished_step = pending.result()
        return self.finished_step

    def write_in_background(self, snapshot: Snapshot) -> int:
        """Write a snapshot and return its step (in the thread)."""
        begin = time.perf_counter()
        try:
            write(snapshot, self.folder, self.keep)
        finally:
            self.background_seconds += time.perf_counter() - begin
        return snapshot.step

    @contextmanager
    def blocking(self) -> Iterator[None]:
        """Count the time of a block as taken from the training."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.blocking_seconds += time.perf_counter() - begin


def has_memory_for(snapshot: Snapshot) -> bool:
    """Return whether training may go on while a snapshot is held in memory."""
    return min(psutil.virtual_memory().available, memory_left()) >= MEMORY_FACTOR * snapshot.num_bytes
