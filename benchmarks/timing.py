"""Two things timed against each other, and what they ran on."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version

import torch

PACKAGES = ("torch", "accelerate", "open_clip_torch")


@dataclass(frozen=True)
class Timing:
    """Seconds of pairs of runs, each pair one after the other; `other` is the name of the other side."""

    ours: list[float]
    theirs: list[float]
    other: str = "open_clip"

    @property
    def ratios(self) -> list[float]:
        """Ours divided by theirs, pair by pair."""
        return [ours / theirs for ours, theirs in zip(self.ours, self.theirs, strict=True)]

    def __str__(self) -> str:
        low, middle, high = statistics.quantiles(self.ratios, n=4, method="inclusive")
        ours, theirs = statistics.median(self.ours), statistics.median(self.theirs)
        return (
            f"ratio {middle:.3f} (IQR {low:.3f} to {high:.3f}, {len(self.ratios)} pairs), "
            f"ours {ours:.2f} s, {self.other} {theirs:.2f} s"
        )


def interleaved(
    ours: Callable[[], object], theirs: Callable[[], object], num_pairs: int, other: str = "open_clip"
) -> Timing:
    """Time both in the order A B, B A, A B, …, so that what drifts on the machine meets both alike.

    With one thread the clock is the processor time of this process, which other programs hardly touch; else it is the
    time that passes.
    """
    timing = Timing([], [], other)
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    for number in range(num_pairs):
        order = [(ours, timing.ours), (theirs, timing.theirs)]
        for run, seconds in order if number % 2 == 0 else reversed(order):
            start = clock()
            run()
            seconds.append(clock() - start)
    return timing


def describe_machine(*more_packages: str) -> str:
    """Return versions, processor, threads and the load before the measurement, on one line."""
    versions = ", ".join(f"{name} {version(name)}" for name in (*PACKAGES, *more_packages))
    load = os.getloadavg()[0]
    return f"{versions}; {processor()}, {torch.get_num_threads()} thread(s), float32; load before {load:.2f}"


def processor() -> str:
    """Return the name of the processor where the system tells it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
