"""Ends a process that hangs, or waits for one that does, and says where it stood.

How long is too long? What counts is the stretch between two beats, and a beat comes where all processes have met (after
the reduction of a step, after a round of an evaluation or of what is computed once), so that every process waits for
the slowest and all lose patience together.

1. Until the first step is done, and after `patient()`: `LONG_SECONDS`, or `timeout_seconds` where that is longer.
   Blocks are compiled there, pictures decoded for an evaluation, or the first process writes a checkpoint while the
   others wait in the next collective. All processes call `patient()` alike, also those that have nothing to do.
2. Else `timeout_seconds`, or five times the longest of the last 100 stretches where that is longer. A run whose steps
   take below nine seconds ends within the default of 45; one with slower steps, or blocks that are compiled anew for
   other shapes (the first step shows how long that takes), is given what it has shown to need.

Time in which the process itself is stopped (Ctrl-Z, a suspended machine) does not count. Of a process that runs alone,
time in which it computes does not count either (`computed`): nobody waits for it, and it may take hours for a step on a
laptop. What is left is waiting: for loader workers, a disk or a server that never answer.
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

from accel_clip.process.signals import leave

LONG_SECONDS = 1800.0
A_YEAR = 365 * 86400.0
TIMES_LONGEST = 5
NUM_RECENT = 100
SHARE_OF_WORK = 0.02  # of a core: more than a wait takes that looks around, less than a step gets on a busy machine
GRACE_SECONDS = 3.0  # for the other processes, whose launcher ends them when this one has ended: they report too


class Watchdog:
    """A thread that ends the process with exit code 1 when the beats stay out, after it wrote all stacks to stderr.

    timeout_seconds: the shortest patience after the first step; None = no thread, nothing is ended.
    on_hang: called with the message, from a thread, and not waited for longer than a few seconds; computed: the seconds
    of computing so far, whose time is not counted: `time.process_time` for a process that runs alone.
    """

    def __init__(
        self,
        timeout_seconds: float | None,
        on_hang: Callable[[str], object] | None = None,
        computed: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self.timeout_seconds = timeout_seconds
        self.on_hang = on_hang
        self.computed = computed
        self.last_done = "start"
        self.limit = self.long_patience = long_patience(timeout_seconds)
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
        self.begin_stretch(done, self.patience() if self.has_stepped else self.long_patience)

    def patient(self, done: str) -> None:
        """Say what is done, and that it may be long until the next beat; for all processes alike."""
        self.is_patient = self.has_stepped
        self.begin_stretch(done, self.long_patience)

    def begin_stretch(self, done: str, limit: float) -> None:
        """Count from zero, up to a limit in seconds."""
        self.began = time.monotonic()
        self.last_done, self.limit = done, limit
        self.num_beats += 1

    def patience(self) -> float:
        """Return how many seconds the next beat may take."""
        return max(self.timeout_seconds or 0.0, TIMES_LONGEST * max(self.recent, default=0.0))

    def watch(self, timeout_seconds: float) -> None:
        """Count the seconds without a beat (in the thread), as far as this process was running in them, and waiting."""
        interval = min(1.0, timeout_seconds / 10)
        num_beats, silence, looked, computed = 0, 0.0, time.monotonic(), self.computed()
        while not self.over.wait(interval):
            now, computed_now = time.monotonic(), self.computed()
            if computed_now - computed < SHARE_OF_WORK * (now - looked):
                silence += min(now - looked, 2 * interval)
            looked, computed = now, computed_now
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
            way_out = (
                "the stacks below show where it stands; if it was only slow, set train.timeout above "
                f"{self.limit:.0f} seconds, or to null for never"
            )
            write_at_once(f"accel-clip: error: {message}; {way_out}\n" + prefixed(stacks(), f"rank {rank} | "))
            time.sleep(GRACE_SECONDS)
        finally:
            leave(1)

    def tell(self, message: str) -> None:
        """Call `on_hang`; it may hang itself, since storage that hangs is a reason to be here."""
        if self.on_hang is not None:
            call = threading.Thread(target=self.on_hang, args=(message,), daemon=True)
            call.start()
            call.join(GRACE_SECONDS)


def long_patience(timeout_seconds: float | None) -> float:
    """Return how many seconds all may wait for one where much is to be done: without a limit, about for ever."""
    return A_YEAR if timeout_seconds is None else max(LONG_SECONDS, timeout_seconds)


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
