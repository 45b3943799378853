"""Ends a process that hangs, or waits for one that does, and says where it stood.

How long is too long? What counts is the stretch between two beats, and a beat comes where all processes have met (after
the reduction of a step, after a round of an evaluation), so that every process waits for the slowest and all lose
patience together.

1. Until the first step is done, and after `patient()`: `LONG_SECONDS`. Models are downloaded and blocks compiled there,
   or the first process writes a checkpoint while the others wait in the next collective. All processes call
   `patient()` alike, also those that have nothing to do.
2. Else `timeout_seconds`, or five times the longest of the last 100 stretches where that is longer. A run whose steps
   take below nine seconds ends within the default of 45; one with slower steps, or blocks that are compiled anew for
   other shapes (the first step shows how long that takes), is given what it has shown to need.

Time in which the process itself is stopped (Ctrl-Z, a suspended machine) does not count.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import NoReturn

LONG_SECONDS = 1800.0
TIMES_LONGEST = 5
NUM_RECENT = 100
GRACE_SECONDS = 3.0  # for the other processes, whose launcher ends them when this one has ended: they report too


class Watchdog:
    """A thread that ends the process with exit code 1 when the beats stay out, after it wrote all stacks to stderr.

    timeout_seconds: the shortest patience after the first step; None = no thread, nothing is ended.
    on_hang: called with the message, from a thread, and not waited for longer than a few seconds.
    """

    def __init__(self, timeout_seconds: float | None, on_hang: Callable[[str], object] | None = None) -> None:
        self.timeout_seconds = timeout_seconds
        self.on_hang = on_hang
        self.last_done = "start"
        self.limit = LONG_SECONDS
        self.began = time.monotonic()
        self.num_beats = 0
        self.has_stepped = self.is_patient = False
        self.recent: deque[float] = deque(maxlen=NUM_RECENT)
        self.over = threading.Event()

    def __enter__(self) -> Watchdog:
        if self.timeout_seconds is not None:
            threading.Thread(target=self.watch, args=(self.timeout_seconds,), name="watchdog", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.over.set()

    def beat_step(self, step: int) -> None:
        """Say that an optimizer step is done. Beat before the first one too: how long it takes is looked at."""
        self.has_stepped = True
        self.beat(f"step {step}")

    def beat(self, done: str) -> None:
        """Say what is done, where all processes have got to."""
        if self.has_stepped and not self.is_patient:
            self.recent.append(time.monotonic() - self.began)
        self.is_patient = False
        self.begin_stretch(done, self.patience() if self.has_stepped else LONG_SECONDS)

    def patient(self, done: str) -> None:
        """Say what is done, and that it may be long until the next beat; for all processes alike."""
        self.is_patient = self.has_stepped
        self.begin_stretch(done, LONG_SECONDS)

    def begin_stretch(self, done: str, limit: float) -> None:
        """Count from zero, up to a limit in seconds."""
        self.began = time.monotonic()
        self.last_done, self.limit = done, limit
        self.num_beats += 1

    def patience(self) -> float:
        """Return how many seconds the next beat may take."""
        return max(self.timeout_seconds or 0.0, TIMES_LONGEST * max(self.recent, default=0.0))

    def watch(self, timeout_seconds: float) -> None:
        """Count the seconds without a beat (in the thread), as far as this process was running in them."""
        interval = min(1.0, timeout_seconds / 10)
        num_beats, silence, looked = 0, 0.0, time.monotonic()
        while not self.over.wait(interval):
            now = time.monotonic()
            silence += min(now - looked, 2 * interval)
            looked = now
            if num_beats != self.num_beats:
                num_beats, silence = self.num_beats, 0.0
            elif silence > self.limit:
                self.end(silence)

    def end(self, silence: float) -> NoReturn:
        """Say what is known and end the process, whatever goes wrong with saying it."""
        rank = os.environ.get("RANK", "0")
        message = f"rank {rank}: no progress for {silence:.0f} s, last done: {self.last_done}"
        try:
            self.tell(message)
            way_out = "the stacks below show where it stands; if it was only slow, raise train.timeout"
            write_at_once(f"accel-clip: error: {message}; {way_out}\n" + prefixed(stacks(), f"rank {rank} | "))
            time.sleep(GRACE_SECONDS)
        finally:
            os._exit(1)

    def tell(self, message: str) -> None:
        """Call `on_hang`; it may hang itself, since storage that hangs is a reason to be here."""
        if self.on_hang is not None:
            call = threading.Thread(target=self.on_hang, args=(message,), daemon=True)
            call.start()
            call.join(GRACE_SECONDS)


def stacks() -> str:
    """Return the stacks of all threads of this process."""
    with tempfile.TemporaryFile() as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read().decode(errors="replace")


def prefixed(text: str, prefix: str) -> str:
    """Return a text with a prefix before each line, so that those of several processes can be told apart."""
    return "".join(f"{prefix}{line}\n" for line in text.splitlines() if line)


def write_at_once(text: str) -> None:
    """Write to standard error in one go, since other processes write at the same time."""
    sys.stderr.write(text)
    sys.stderr.flush()
