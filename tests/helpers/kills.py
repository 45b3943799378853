"""Kills a process at one of its changes of a folder, counted, so that every single one of them can be tried."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from helpers.patience import HANG_SECONDS

CHANGING = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink"}
fork = multiprocessing.get_context("fork")


def run_forked(action: Callable[[], object], **environment: str) -> int:
    """Run an action in a process of its own and return its exit code, negative for a signal."""

    def child() -> None:
        os.environ.update(environment)
        action()

    process = fork.Process(target=child)
    process.start()
    process.join(HANG_SECONDS)
    if process.exitcode is None:
        process.kill()
        raise AssertionError("the process hangs")
    return process.exitcode


def watch(folder: Path, meet: Callable[[str, int], object]) -> None:
    """Call `meet` before every change of what is in a folder, with the path and the flags it would be opened with."""
    here, meeting = str(folder), False

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal meeting
        if meeting or event not in CHANGING or not str(arguments[0]).startswith(here):
            return
        flags = arguments[2] if event == "open" and isinstance(arguments[2], int) else 0
        if event == "open" and not flags & (os.O_WRONLY | os.O_RDWR):
            return
        meeting = True
        meet(str(arguments[0]), flags)
        meeting = False

    sys.addaudithook(hook)


def count_changes(folder: Path, action: Callable[[], object]) -> int:
    """Return how often an action, run to its end in a process of its own, changes something in a folder."""
    reading, writing = os.pipe()

    def child() -> None:
        watch(folder, lambda path, flags: os.write(writing, b"."))
        action()

    assert run_forked(child) == 0
    os.close(writing)
    with os.fdopen(reading, "rb") as counted:
        return len(counted.read())


def killed_at(number: int, folder: Path, action: Callable[[], object], opened: bool = False) -> bool:
    """Run an action in a process that is killed before its change of a folder with this number; return whether it was.

    opened: where that change opens a file, the kill comes right after it: the file is there, and empty if it is new.
    """

    def kill(path: str, flags: int) -> None:
        nonlocal number
        number -= 1
        if number < 0:
            if opened and flags:
                with suppress(OSError):  # of a file that is looked for in vain
                    os.open(path, flags)
            os.kill(os.getpid(), signal.SIGKILL)

    def child() -> None:
        watch(folder, kill)
        action()

    return run_forked(child) == -signal.SIGKILL
