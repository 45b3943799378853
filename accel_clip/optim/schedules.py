"""Learning rate schedules: pure functions of the step, so there is nothing to save and nothing to resume."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from accel_clip import typed
from accel_clip.config import OptimConfig, require
from accel_clip.registry import Registry, check_options

# A schedule is `(step, num_steps, min_ratio, **options) -> multiplier of the highest rate`. `step`, in [0, num_steps),
# counts from the end of the warm-up, and `num_steps` is what the warm-up leaves of the run.
SCHEDULES = Registry("schedule", setting="optim.schedule")
OPTIONS = "optim.schedule_options"


@SCHEDULES.register("cosine")
def cosine(step: int, num_steps: int, min_ratio: float) -> float:
    """Half a cosine from 1 down to the lowest rate (SGDR, arXiv 1608.03983, equation 5 without restarts)."""
    return between(min_ratio, 0.5 * (1 + math.cos(math.pi * step / num_steps)))


@SCHEDULES.register("constant")
def constant(step: int, num_steps: int, min_ratio: float) -> float:
    """The highest rate to the end."""
    return 1.0


@SCHEDULES.register("linear")
def linear(step: int, num_steps: int, min_ratio: float) -> float:
    """A straight line from 1 down to the lowest rate."""
    return between(min_ratio, 1 - step / num_steps)


@SCHEDULES.register("cosine_restarts")
def cosine_restarts(step: int, num_steps: int, min_ratio: float, *, period: float, multiplier: float = 1) -> float:
    """Cosines that start again, each longer than the last (SGDR, arXiv 1608.03983, section 3).

    The first takes `period` steps, each other `multiplier` times as many as the one before it.
    """
    require(is_real(period) and period >= 1, f"{OPTIONS}.period", period, "it must be at least 1 step")
    grows = is_real(multiplier) and (multiplier == 1 or 1.01 <= multiplier <= 1000)  # one restart after the other
    require(grows, f"{OPTIONS}.multiplier", multiplier, "it must be 1, or at least 1.01, at most 1,000")
    position, length = (step, period) if multiplier > 1 else (step % period, period)
    while position >= length:
        position, length = position - length, length * multiplier
    return between(min_ratio, 0.5 * (1 + math.cos(math.pi * position / length)))


@SCHEDULES.register("wsd")
def wsd(step: int, num_steps: int, min_ratio: float, *, decay: float = 0.2) -> float:
    """Warm-up, stable, decay: the highest rate, then a straight line down (MiniCPM, arXiv 2404.06395, section 4).

    `decay`, the length of the line, is a fraction of the steps after the warm-up when below 1, else steps.
    """
    num_decay_steps = whole_steps(f"{OPTIONS}.decay", decay, num_steps)
    rule = f"it must be above 0 and at most the {num_steps} steps after the warm-up"
    require(decay > 0 and num_decay_steps <= num_steps, f"{OPTIONS}.decay", decay, rule)
    num_decay_steps = max(1, num_decay_steps)
    return between(min_ratio, min(1.0, (num_steps - step) / num_decay_steps))


@dataclass(frozen=True)
class Schedule:
    """A schedule with its warm-up, for a run of a known length; see `optim.length`."""

    decline: Callable[[int, int, float], float]
    """from step, number of steps and lowest ratio, counted after the warm-up, to the multiplier"""
    num_steps: int
    """optimizer steps of the run"""
    num_warmup_steps: int
    """optimizer steps in which the rate rises"""
    min_ratio: float
    """the lowest rate, as a share of the highest"""
    num_curve_steps: int
    """optimizer steps after which the rate stays as it is: those of the run, or `optim.length`"""

    def multiplier(self, step: int) -> float:
        """Return what the highest rate is multiplied by in optimizer step `step`, which is in [0, num_steps)."""
        assert 0 <= step < self.num_steps, f"step {step} of a run of {self.num_steps}"
        if step < self.num_warmup_steps:
            return (step + 1) / self.num_warmup_steps
        place = min(step, self.num_curve_steps - 1) - self.num_warmup_steps
        return self.decline(place, self.num_curve_steps - self.num_warmup_steps, self.min_ratio)


def build_schedule(config: OptimConfig, num_steps: int) -> Schedule:
    """Return the schedule of a run of `num_steps` optimizer steps.

    Raises `ConfigError` as `check_schedule` does, for option values that cannot work, and for too long a warm-up.
    """
    decline = partial(check_schedule(config), **config.schedule_options)
    length = config.length or num_steps
    schedule = Schedule(decline, num_steps, num_warmup_steps(config.warmup, length), config.min_lr_ratio, length)
    first = min(schedule.num_warmup_steps, num_steps - 1)
    schedule.multiplier(first)  # a value that cannot work is found here, not hours into the run
    return schedule


def check_schedule(config: OptimConfig) -> Callable[..., float]:
    """Return the function of the schedule; raise `ConfigError` when it is unknown, or for wrong or missing options."""
    target = SCHEDULES.get(config.schedule)
    given = list(inspect.signature(target).parameters)[:3]
    check_options(OPTIONS, config.schedule, target, config.schedule_options, given)
    return target


def num_warmup_steps(warmup: float, num_steps: int) -> int:
    """Return the optimizer steps of warm-up in a run of `num_steps`, fewer than those."""
    steps = whole_steps("optim.warmup", warmup, num_steps)
    rule = f"it must be shorter than the run, which has {num_steps} steps (below 1 it is a fraction of the run)"
    require(steps < num_steps, "optim.warmup", warmup, rule)
    return steps


def whole_steps(setting: str, amount: float, num_steps: int) -> int:
    """Return `amount` in steps: a fraction of `num_steps`, rounded down, when below 1, else steps."""
    whole = is_real(amount) and amount >= 0 and (amount < 1 or amount == int(amount))
    require(whole, setting, amount, "it must be a fraction below 1 or a whole number of steps")
    # 0.29 * 100 is 28.999999999999996: rounding to 9 digits first gives the 29 that was meant.
    return math.floor(round(amount * num_steps, 9)) if amount < 1 else int(amount)


def between(min_ratio: float, share: float) -> float:
    """Return the multiplier that lies `share` of the way from the lowest rate up to the highest."""
    return min_ratio + (1 - min_ratio) * share


def is_real(value: Any) -> bool:
    """Return whether an option is a finite number."""
    return typed.is_number(value) and math.isfinite(value)
