"""Signals that ask a process to stop: taken note of while a run can stop at a step, an interruption everywhere else."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
SECONDS_BEFORE_INSISTING = 1.0  # a group gets one Ctrl-C from the terminal and another from its launcher
SECONDS_BETWEEN_LOOKS = 0.5
LAUNCHED_BY = ("TORCHELASTIC_RUN_ID", "ACCELERATE_DYNAMO_BACKEND")  # set by torchrun; by accelerate launch, always


class StopSignals:
    """Takes note of SIGTERM and SIGINT during a block instead of dying of them.

    asked: the name of the first one, `SIGTERM` or `SIGINT`; None as long as nobody asked. Whoever runs the block looks
    at it where it can stop.

    A SIGINT more than a second after that is a person who insists: it ends the process at once. A later SIGTERM is
    not: torchrun, interrupted itself, sends one after the SIGINT that the terminal sent to the whole group.

    Handlers can be set in the main thread alone; in another one the block runs as if this were not here. A signal that
    was ignored before (SIGINT of a background job) stays ignored. What was there before is back after the block.
    """

    def __init__(self) -> None:
        self.asked: str | None = None
        self.asked_at = 0.0
        self.process = 0
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        self.process = os.getpid()
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self.previous[number] = signal.signal(number, self.meet)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, previous in self.previous.items():
            if signal.getsignal(number) == self.meet:
                signal.signal(number, signal.SIG_DFL if previous is None else previous)
        self.previous.clear()

    def meet(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal; a process forked from this one inherits the handler, and dies of SIGTERM as usual."""
        now = time.monotonic()
        if os.getpid() != self.process:
            if number == signal.SIGTERM:
                end_by(number)
        elif self.asked is None:
            self.asked, self.asked_at = signal.Signals(number).name, now
            self.answer()
        elif number == signal.SIGINT and now - self.asked_at > SECONDS_BEFORE_INSISTING:
            end_by(number)

    def answer(self) -> None:
        """Do what the first signal asks for here: nothing, the flag is enough."""


class Interruptible(StopSignals):
    """Lets SIGTERM end a block as Ctrl-C does, by `KeyboardInterrupt`; its cleaning up is left in peace for a second.

    For whatever cannot stop at a step: start-up and the short commands.
    """

    def answer(self) -> None:
        """Raise `KeyboardInterrupt`."""
        raise KeyboardInterrupt


def end_by(number: int) -> None:
    """End this process as a signal does that nobody handles."""
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def has_launcher(environment: Mapping[str, str]) -> bool:
    """Return whether `accelerate launch` or torchrun is the parent of this process."""
    return any(name in environment for name in LAUNCHED_BY)


@contextmanager
def following_launcher() -> Iterator[None]:
    """Send SIGTERM to this process when its launcher dies during a block.

    `accelerate launch` with one process does not pass signals on: killed, it would leave a training nobody can see.
    Without a launcher nothing is followed, so that `nohup python train.py &` outlives its shell.
    """
    over = threading.Event()
    if has_launcher(os.environ):
        thread = threading.Thread(target=follow, args=(os.getppid(), over), name="launcher", daemon=True)
        thread.start()
    try:
        yield
    finally:
        over.set()


def follow(parent: int, over: threading.Event) -> None:
    """Wait until another process is the parent of this one, and ask the main thread to stop."""
    while not over.wait(SECONDS_BETWEEN_LOOKS):
        if os.getppid() != parent:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)  # also wakes it from a wait
            return
