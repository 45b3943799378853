"""Signals that ask a process to stop: taken note of while a run can stop at a step, an interruption everywhere else."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import Any, NoReturn

from accel_clip.faults import INTERRUPTED_EXIT_CODE

STOP_SIGNALS = tuple(
    getattr(signal, name)
    for name in ("SIGTERM", "SIGINT", "SIGHUP")
    if hasattr(signal, name)  # Windows lacks SIGHUP
)
SECONDS_BEFORE_INSISTING = 1.0  # a group gets one Ctrl-C from the terminal and another from its launcher
SECONDS_TO_HEAR = 10.0  # schedulers kill what has not ended half a minute after their SIGTERM
SECONDS_BETWEEN_LOOKS = 0.5
SECONDS_TO_SAY = 10.0
RUN_OF_SEVERAL = "TORCHELASTIC_RUN_ID"
LAUNCHED_BY = (RUN_OF_SEVERAL, "ACCELERATE_DYNAMO_BACKEND")  # set by torchrun; by accelerate launch, always


class StopAsked(KeyboardInterrupt):
    """Raised where work is left because somebody asked to stop, in all processes that meet there."""


class StopSignals:
    """Takes note of SIGTERM, SIGINT and SIGHUP (a closed terminal) during a block instead of dying of them.

    asked: the name of the first one, such as `SIGTERM`; None as long as nobody asked. Whoever runs the block looks at
    it where it can stop. Where it waits alone, `raising` leaves the wait.

    may_interrupt: whether nothing would be lost if the block were left anywhere, True at first. As long as it is, a
    stop that has not ended the block after ten seconds raises `KeyboardInterrupt` wherever the main thread is: in a
    library that looks at nothing, or that swallowed the first one. After ten more `on_deaf` is called, and the process
    ended.

    A SIGINT more than a second after the first signal is a person who insists: it ends the process at once. A later
    SIGTERM is not: torchrun, interrupted itself, sends one after the SIGINT that the terminal sent to the whole group.

    Handlers can be set in the main thread alone; in another one the block runs as if this were not here. A signal that
    was ignored before (SIGINT of a background job, SIGHUP under nohup) stays ignored. What was there before is back
    after the block.
    """

    def __init__(self, on_deaf: Callable[[], object] = lambda: None) -> None:
        self.on_deaf = on_deaf
        self.asked: str | None = None
        self.asked_at = 0.0
        self.may_interrupt = True
        self.is_raising = self.is_late = False
        self.process = 0
        self.previous: dict[int, Any] = {}
        self.over = threading.Event()

    def __enter__(self) -> StopSignals:
        self.process = os.getpid()
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self.previous[number] = signal.signal(number, self.handle)
            threading.Thread(target=self.insist, name="stop", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.over.set()
        for number, previous in self.previous.items():
            if signal.getsignal(number) == self.handle:
                signal.signal(number, signal.SIG_DFL if previous is None else previous)
        self.previous.clear()

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal; a process forked from this one inherits the handler, and dies of SIGTERM as usual."""
        now = time.monotonic()
        if os.getpid() != self.process:
            if number != signal.SIGINT:
                end_by(number)
        elif self.asked is None:
            self.asked, self.asked_at = signal.Signals(number).name, now
            self.answer()
        elif self.is_late:
            self.is_late = False
            if self.may_interrupt:
                raise KeyboardInterrupt
        elif number == signal.SIGINT and now - self.asked_at > SECONDS_BEFORE_INSISTING:
            end_by(number)

    def answer(self) -> None:
        """Do what the first signal asks for here: the flag is enough, unless the process waits alone."""
        if self.is_raising:
            raise StopAsked

    @contextmanager
    def raising(self) -> Iterator[None]:
        """Raise `StopAsked` in a block as soon as somebody asks, or has asked: it waits for nothing but data."""
        self.is_raising = True
        try:
            if self.asked is not None:
                raise StopAsked
            yield
        finally:
            self.is_raising = False

    def insist(self) -> None:
        """Interrupt the main thread, and later end the process, where a stop is not heard (in a thread)."""
        wait = SECONDS_TO_HEAR
        while not self.over.wait(SECONDS_BETWEEN_LOOKS):
            if self.asked is None or not self.may_interrupt or time.monotonic() - self.asked_at < wait:
                continue
            if wait > SECONDS_TO_HEAR:
                self.on_deaf()
                leave(INTERRUPTED_EXIT_CODE)
            self.is_late, wait = True, 2 * SECONDS_TO_HEAR
            wake_main_thread()


class Interruptible(StopSignals):
    """Lets SIGTERM end a block as Ctrl-C does, by `KeyboardInterrupt`; its cleaning up is left in peace for a while.

    For whatever cannot stop at a step: start-up and the short commands.
    """

    def answer(self) -> None:
        """Raise `KeyboardInterrupt`."""
        raise KeyboardInterrupt


def leave(exit_code: int) -> NoReturn:
    """End this process at once, and the loader workers with it, which may hang and would be left behind."""
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()
    os._exit(exit_code)


def leave_if_waited_for(exit_code: int, known: Collection[threading.Thread]) -> None:
    """End this process where Python would wait for threads that a library began, such as those of a download."""
    if any(not thread.daemon and thread not in known for thread in threading.enumerate()):
        leave(exit_code)


def wait_for_the_first() -> None:
    """Let the first process, which speaks for all, say why they end, before this one does.

    A launcher ends all of them with the first that ends: a quicker one would take the word from it. Where the first has
    nothing to say, as it lacks no file that is missing here, this process is still here afterwards, and says it itself.
    """
    if RUN_OF_SEVERAL in os.environ:
        with suppress(KeyboardInterrupt):
            time.sleep(SECONDS_TO_SAY)


def wake_main_thread() -> None:
    """Send SIGTERM to the main thread, which also wakes it from a wait."""
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)


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
            wake_main_thread()
            return
