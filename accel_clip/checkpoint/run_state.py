"""Where a run stands: the numbers that, with weights and random states, make a resumed run the uninterrupted one."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any

from accel_clip.typed import Count


@dataclass
class RunState:
    """Counts and last results of a run, plain JSON in a checkpoint."""

    step: Count = 0
    """optimizer steps taken"""
    next_batch: Count = 0
    """the contrastive batch of the run that comes next, counted from 0"""
    evaluated_step: Count | None = None
    """the last step that was evaluated, None before the first"""
    stop_asked: bool = False
    """whether early stopping has ended the run"""
    metrics: dict[str, float] = field(default_factory=dict)
    """what the last evaluation measured"""
    best_metrics: dict[str, float] | None = None
    """what was measured of the best model, None before the first evaluation"""
    num_non_finite: Count = 0
    """how many steps in a row were not finite"""
    num_pairs: dict[str, Count] = field(default_factory=dict)
    """how many pairs of each of several sources all processes have seen, by the source's name"""
    num_cut_captions: Count = 0
    """how many captions of the batches before `next_batch` had more tokens than the model reads"""

    def take_over(self, other: RunState) -> None:
        """Stand where another state stands; whoever holds this one knows."""
        for each in fields(self):
            setattr(self, each.name, getattr(other, each.name))

    def to_dict(self) -> dict[str, Any]:
        """Return the state as plain JSON."""
        return asdict(self)
