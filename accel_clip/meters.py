"""Meters: what is measured between two log lines, on one process and over all of them."""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from accelerate import Accelerator

Value = float | Tensor


class AverageMeter:
    """The last value and the weighted mean of all since the last reset, printed as `Loss 0.2346 (0.1605)`.

    Values may be one-element tensors on any device: they stay there, and the device is waited for only on reading.
    """

    def __init__(self, name: str, fmt: str = ":.4f") -> None:
        self.name = name
        self.fmt = fmt
        self.reset()

    def reset(self) -> None:
        """Forget all values."""
        self._val: Value = 0.0
        self._sum: Value = 0.0
        self.count: float = 0

    def update(self, val: Value, n: float = 1) -> None:
        """Take in the mean `val` of `n` samples; of none, it changes nothing."""
        if not n:
            return
        self._val = detached(val)
        self._sum = self._sum + self._val * n
        self.count += n

    @property
    def val(self) -> float:
        """The last value."""
        return float(self._val)

    @property
    def sum(self) -> float:
        """The sum over samples."""
        return float(self._sum)

    @property
    def avg(self) -> float:
        """The mean over samples, 0 before the first."""
        return self.sum / self.count if self.count else 0.0

    def __str__(self) -> str:
        spec = self.fmt.lstrip(":")
        return f"{self.name} {format(self.val, spec)} ({format(self.avg, spec)})"


class RateMeter:
    """How many per second since the last reset, on this process; `clock` returns seconds."""

    def __init__(self, name: str, fmt: str = ":.1f", clock: Callable[[], float] = time.perf_counter) -> None:
        self.name = name
        self.fmt = fmt
        self.clock = clock
        self.reset()

    def reset(self) -> None:
        """Count from zero, from now."""
        self.count: float = 0
        self._start = self.clock()

    def update(self, n: float = 1) -> None:
        """Count `n` more."""
        self.count += n

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time of a block (an evaluation, a checkpoint) out."""
        begin = self.clock()
        try:
            yield
        finally:
            self._start += self.clock() - begin

    @property
    def seconds(self) -> float:
        """Seconds since the last reset, without pauses."""
        return self.clock() - self._start

    @property
    def rate(self) -> float:
        """Count per second, 0 before any time has passed."""
        seconds = self.seconds
        return self.count / seconds if seconds > 0 else 0.0

    def __str__(self) -> str:
        return f"{self.name} {format(self.rate, self.fmt.lstrip(':'))}"


class MeterGroup:
    """Named means and totals that are brought together over all processes in one collective.

    Every process must have used the same names by the time it calls `reduce`; the order does not matter.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget all values and names."""
        self._means: dict[str, AverageMeter] = {}
        self._totals: dict[str, Value] = {}

    def update(self, name: str, value: Value, n: float = 1) -> None:
        """Take in the mean `value` of `n` samples under `name`, to be averaged."""
        assert name not in self._totals, f"'{name}' is a total"
        self._means.setdefault(name, AverageMeter(name)).update(value, n)

    def update_all(self, values: Mapping[str, Value], n: float = 1) -> None:
        """Take in several means of the same `n` samples."""
        for name, value in values.items():
            self.update(name, value, n)

    def add(self, name: str, value: Value) -> None:
        """Add a count under `name`, to be summed over updates and processes."""
        assert name not in self._means, f"'{name}' is a mean"
        self._totals[name] = self._totals.get(name, 0.0) + detached(value)

    def reduce(self, accelerator: Accelerator) -> dict[str, float]:
        """Return the means over all samples and the totals of all processes by name, and start anew.

        Collective: every process calls it. It costs one reduction and waits for the device once. A name that took in
        no samples is NaN.
        """
        packed = accelerator.reduce(self.pack(accelerator.device), reduction="sum")
        values = self.unpack(packed.tolist(), accelerator.num_processes)
        self.reset()
        return values

    def mean(self, name: str) -> AverageMeter:
        """Return the meter of a mean as it is until the group starts anew."""
        return self._means[name]

    def last(self) -> dict[str, float]:
        """Return the last value of every mean by name; no collective."""
        return {name: meter.val for name, meter in self._means.items()}

    def averages(self) -> dict[str, float]:
        """Return the means and totals of this process alone by name, and start anew; no collective."""
        values = self.unpack(self.pack(torch.device("cpu")).tolist(), 1)
        self.reset()
        return values

    def state_dict(self) -> dict[str, dict[str, list[float]]]:
        """Return what was taken in since the last reset, as plain numbers that lose no bit in JSON."""
        means = {name: [meter.val, meter.sum, meter.count] for name, meter in self._means.items()}
        return {"means": means, "totals": {name: [float(total)] for name, total in self._totals.items()}}

    def load_state_dict(self, state: Mapping[str, Mapping[str, list[float]]]) -> None:
        """Go on from a state saved by `state_dict`."""
        self.reset()
        for name, (value, total, count) in state["means"].items():
            meter = self._means[name] = AverageMeter(name)
            meter._val, meter._sum, meter.count = value, total, count
        self._totals = {name: total for name, (total,) in state["totals"].items()}

    def pack(self, device: torch.device) -> Tensor:
        """Return sums, counts, totals and a fingerprint of the names as one vector that adds up over processes."""
        dtype = widest_float(device)
        meters = [self._means[name] for name in sorted(self._means)]
        totals = [self._totals[name] for name in sorted(self._totals)]
        numbers = [meter._sum for meter in meters] + [meter.count for meter in meters] + totals
        return torch.stack([scalar(number, dtype, device) for number in [*numbers, self.fingerprint()]])

    def unpack(self, packed: list[float], num_processes: int) -> dict[str, float]:
        """Return means and totals by name from the sum of what `num_processes` processes packed."""
        *numbers, fingerprints = packed
        assert fingerprints == self.fingerprint() * num_processes, "the processes measured under different names"
        num_means = len(self._means)
        sums, counts, totals = numbers[:num_means], numbers[num_means : 2 * num_means], numbers[2 * num_means :]
        means = [total / count if count else math.nan for total, count in zip(sums, counts, strict=True)]
        names = [*sorted(self._means), *sorted(self._totals)]
        return dict(zip(names, [*means, *totals], strict=True))

    def fingerprint(self) -> int:
        """Return 16 bits that depend on all names, few enough to stay exact in the sum of 256 float32 numbers."""
        names = "\x1f".join([*sorted(self._means), "", *sorted(self._totals)])
        return zlib.crc32(names.encode()) & 0xFFFF


def detached(value: Value) -> Value:
    """Return a number, or a scalar copy of a tensor in the widest float of its device, without waiting for it."""
    if isinstance(value, Tensor):
        return value.detach().reshape(()).to(widest_float(value.device), copy=True)
    return float(value)


def scalar(number: Value, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a number or a tensor as a scalar of that dtype on that device."""
    if isinstance(number, Tensor):
        return number.to(device, dtype)
    return torch.full((), number, dtype=dtype, device=device)  # a fill; torch.tensor would wait for the device


def widest_float(device: torch.device) -> torch.dtype:
    """Return float64, or float32 on MPS, which has no other."""
    return torch.float32 if device.type == "mps" else torch.float64
