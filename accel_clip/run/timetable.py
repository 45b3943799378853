"""What is due when in a run: points, evaluations, the end of an epoch, the end of all."""

from __future__ import annotations

from math import ceil

from accel_clip.checkpoint.run_state import RunState
from accel_clip.config import Config
from accel_clip.run.stages import Stage, stage_at, stages_of

PARTS_WITHOUT_EPOCHS = 10
"""of a run whose data has no known length, after each of which is done what else is done once an epoch"""


class Timetable:
    """Says of a run, as it stands after a step, what is due; `batches_per_epoch` is None where nobody knows it."""

    def __init__(self, config: Config, num_steps: int, batches_per_epoch: int | None) -> None:
        self.num_steps, self.accumulate, self.eval_every = num_steps, config.train.accumulate, config.eval.every
        self.stages = stages_of(config)
        self.batches_per_epoch = batches_per_epoch or ceil(num_steps * self.accumulate / PARTS_WITHOUT_EPOCHS)

    def ends_epoch(self, state: RunState) -> bool:
        """Return whether the last step was the first to reach another epoch's end, or that of another tenth."""
        before = max(0, state.next_batch - self.accumulate)
        return state.next_batch // self.batches_per_epoch > before // self.batches_per_epoch

    def evaluation_is_due(self, state: RunState) -> bool:
        """Return whether the model is evaluated after this step."""
        if state.evaluated_step == state.step:
            return False
        if state.step == 0 or self.is_over(state):
            return True
        return self.ends_epoch(state) if self.eval_every is None else self.is_due(state, self.eval_every)

    def is_over(self, state: RunState) -> bool:
        """Return whether no step is left."""
        return state.step >= self.num_steps or state.stop_asked

    def is_due(self, state: RunState, every: int) -> bool:
        """Return whether something done every so many steps, and at the end, is done after this one."""
        return state.step % every == 0 or state.step >= self.num_steps

    def stage(self, state: RunState) -> Stage:
        """Return the stage that the next batch belongs to."""
        return stage_at(self.stages, state.next_batch)

    def batches_left(self, state: RunState) -> range:
        """Return the contrastive batches that the rest of the stage takes."""
        end = state.next_batch + (self.num_steps - state.step) * self.accumulate
        end_of_stage = self.stage(state).end_batch
        return range(state.next_batch, end if end_of_stage is None else min(end, end_of_stage))
