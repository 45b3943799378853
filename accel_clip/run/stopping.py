"""Early stopping, and which model is the best."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from accel_clip.faults import ConfigError, nearest

SMALLER_IS_BETTER = ("loss", "rank", "time", "grad_norm")


@dataclass(frozen=True)
class Verdict:
    """What one point says."""

    is_best: bool
    """whether its metric is the best so far"""
    should_stop: bool
    """whether it is time to stop"""


class EarlyStopping:
    """Watches one metric: its best value so far, and for how many points there was none better; None watches nothing.

    `mode` is `min`, `max` or None (by the metric's name). A value counts as better when it beats the best by more than
    `min_delta`; one that is not finite never does. `patience` is the number of points in a row without a better value
    after which to stop, None for never.
    """

    def __init__(
        self, metric: str | None, mode: str | None = None, patience: int | None = None, min_delta: float = 0.0
    ) -> None:
        self.metric = metric
        self.mode = mode or default_mode(metric or "")
        self.patience = patience
        self.min_delta = min_delta
        self.best: float | None = None
        self.best_step: int | None = None
        self.num_worse = 0

    @property
    def should_stop(self) -> bool:
        """Whether the last `patience` points had no better value."""
        return self.patience is not None and self.num_worse >= self.patience

    def update(self, metrics: Mapping[str, float], step: int) -> Verdict:
        """Take in the point of a step; points without the metric change nothing."""
        if self.metric is None or self.metric not in metrics:
            return Verdict(False, self.should_stop)
        value = float(metrics[self.metric])
        is_best = self.is_better(value)
        if is_best:
            self.best, self.best_step, self.num_worse = value, step, 0
        else:
            self.num_worse += 1
        return Verdict(is_best, self.should_stop)

    def is_better(self, value: float) -> bool:
        """Return whether a value beats the best one so far."""
        if not math.isfinite(value):
            return False
        if self.best is None:
            return True
        gain = self.best - value if self.mode == "min" else value - self.best
        return gain > self.min_delta

    def state_dict(self) -> dict[str, float | int | None]:
        """Return what a resumed run needs, as plain numbers."""
        return {"best": self.best, "best_step": self.best_step, "num_worse": self.num_worse}

    def load_state_dict(self, state: Mapping[str, float | int | None]) -> None:
        """Go on from a state saved by `state_dict`."""
        best, best_step = state["best"], state["best_step"]
        self.best = None if best is None else float(best)
        self.best_step = None if best_step is None else int(best_step)
        self.num_worse = int(state["num_worse"] or 0)


def default_mode(metric: str) -> str:
    """Return `min` for losses, ranks, times and the gradient norm, else `max`."""
    return "min" if any(word in metric for word in SMALLER_IS_BETTER) else "max"


def check_metric(metric: str, known_names: Collection[str]) -> None:
    """Raise `ConfigError` unless the run logs the metric."""
    if metric not in known_names:
        listed = ", ".join(sorted(known_names))
        raise ConfigError(f"stop.metric: '{metric}' is not logged by this run ({listed}){nearest(metric, known_names)}")
