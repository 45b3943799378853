"""The evaluations of a run: measured with the weights that count, shown, recorded, and told to the hooks."""

from __future__ import annotations

from dataclasses import dataclass

from accel_clip.checkpoint.run_state import RunState
from accel_clip.evaluation.evaluator import Evaluator
from accel_clip.process.waiting import Lookout
from accel_clip.run.health import warn_of_collapse
from accel_clip.run.hooks import Hooks
from accel_clip.run.logbook import Logbook
from accel_clip.run.tracking import Tracking
from accel_clip.step.learner import Learner


@dataclass(frozen=True)
class Evaluations:
    """What takes part in an evaluation in the course of a run."""

    evaluator: Evaluator
    """what measures"""
    learner: Learner
    """whose model is measured"""
    logbook: Logbook
    """where the metrics are told"""
    hooks: Hooks
    """who else is told them"""

    def run(self, state: RunState, epoch: float, tracking: Tracking, lookout: Lookout) -> None:
        """Evaluate the model as it is after a step, and take down what was measured; collective. Raises `StopAsked`."""
        with self.logbook.rate.paused(), self.learner.evaluated():
            state.metrics = self.evaluator.run(lookout)
            state.evaluated_step = state.step
            self.logbook.progress.report(state.step, state.metrics)
            warn_of_collapse(state.step, self.evaluator.mean_cosines)
            tracking.log_picture(state.step, "retrieval", self.evaluator.picture_grid)
            self.logbook.record(tracking, state, state.metrics)
            self.hooks.after_evaluation(state, epoch)
