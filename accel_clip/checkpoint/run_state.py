"""Where a run stands: the numbers that, with weights and random states, make a resumed run the uninterrupted one."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from accel_clip.typed import Count


@dataclass
class RunState:
    """Counts and last results of a run, plain JSON in a checkpoint.

    step: optimizer steps taken; next_batch: the contrastive batch of the run that comes next, counted from 0;
    evaluated_step: the last step that was evaluated, None before the first; stop_asked: early stopping has ended the
    run; metrics: what the last evaluation measured; best_metrics: what was measured of the best model; num_non_finite:
    how many steps in a row were not finite; num_pairs: how many pairs of each of several sources all processes have
    seen, by the source's name; num_cut_captions: how many captions of the batches before `next_batch` had more tokens
    than the model reads.
    """

    step: Count = 0
    next_batch: Count = 0
    evaluated_step: Count | None = None
    stop_asked: bool = False
    metrics: dict[str, float] = field(default_factory=dict)
    best_metrics: dict[str, float] | None = None
    num_non_finite: Count = 0
    num_pairs: dict[str, Count] = field(default_factory=dict)
    num_cut_captions: Count = 0

    def to_dict(self) -> dict[str, Any]:
        """Return the state as plain JSON."""
        return asdict(self)
