"""How long tests have patience: in processor time, which other programs on the machine hardly change."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

HANG_SECONDS = 300.0  # whatever takes so long hangs, on however busy a machine


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Fail once this process has computed for so many seconds in the block, or has waited until it hangs."""

    def too_late(number: int, frame: Any) -> None:
        raise AssertionError(f"still {'waiting' if number == signal.SIGALRM else 'busy'}, and {seconds} s were enough")

    before = {number: signal.signal(number, too_late) for number in (signal.SIGPROF, signal.SIGALRM)}
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, HANG_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)
