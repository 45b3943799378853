"""What becomes of a step whose loss or gradient is not finite: the run stops, leaves it out, or rolls back past it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NoReturn

import torch
from accelerate import Accelerator

from accel_clip.config import TrainConfig
from accel_clip.console import say
from accel_clip.data.batch import Batch
from accel_clip.faults import NonFiniteError
from accel_clip.run.agreement import Agreement
from accel_clip.run.resumable import Resumable
from accel_clip.step.learner import Learner

SAMPLES_SHOWN = 16
WAYS_OUT = (
    "lower optim.lr, lengthen optim.warmup, set train.precision to bf16 or no, or let train.non_finite skip or "
    "rollback such steps (in another output_dir)"
)


class RolledBack(Exception):
    """A step was not finite, and the run stands at its last checkpoint again.

    saved_plan: what that says of how a batch is cut.
    """

    def __init__(self, saved_plan: Mapping[str, Any]) -> None:
        super().__init__()
        self.saved_plan = saved_plan


class NonFinitePolicy:
    """What `train.non_finite` says: stop, skip or rollback, and how often in a row."""

    def __init__(self, config: TrainConfig, learner: Learner, resumable: Resumable) -> None:
        self.config, self.learner, self.resumable = config, learner, resumable

    def accepts(self, agreed: Agreement, batches: Sequence[Batch]) -> bool:
        """Return whether a step may change the weights, False where it is left out; the same on every process.

        Raises `NonFiniteError` where the run ends here, and `RolledBack`.
        """
        accelerator, state = self.learner.accelerator, self.resumable.state
        if is_finite(agreed.means, accelerator.scaler):
            state.num_non_finite = 0
            return True
        problem = describe_non_finite(state.step + 1, agreed.means, gathered_samples(accelerator, batches))
        state.num_non_finite += 1
        if self.config.non_finite == "stop" or state.num_non_finite > self.config.non_finite_limit:
            raise NonFiniteError(f"{problem}; {WAYS_OUT}")
        if self.config.non_finite == "rollback":
            self.roll_back(problem, state.next_batch + len(batches))
        say(f"warning: {problem}; the step is left out")
        return False

    def roll_back(self, problem: str, next_batch: int) -> NoReturn:
        """Put the run back to its last checkpoint, to go on with a later batch; what it has counted stays."""
        state = self.resumable.state
        before = replace(state)
        self.learner.abandon_step()
        saved_plan = self.resumable.roll_back()
        state.next_batch, state.num_non_finite = next_batch, before.num_non_finite
        state.num_pairs, state.num_cut_captions = before.num_pairs, before.num_cut_captions
        say(f"warning: {problem}; back to step {state.step}, past that batch")
        raise RolledBack(saved_plan)


def is_finite(means: Mapping[str, float], scaler: Any | None) -> bool:
    """Return whether the loss and the gradient of a step are finite, as all processes agree.

    In fp16 a gradient that overflows is met by lowering its scale; it is lost only when the scale has no room left.
    """
    gradient_is_fine = math.isfinite(means["grad_norm"]) if scaler is None else scaler.get_scale() >= 1
    return gradient_is_fine and math.isfinite(means["loss"])


def gathered_samples(accelerator: Accelerator, batches: Sequence[Batch]) -> list[int]:
    """Return the samples of all processes in a step, by their index in the data; collective."""
    mine = torch.cat([batch.sample for batch in batches]).to(accelerator.device)
    return accelerator.gather(mine).tolist()


def describe_non_finite(step: int, means: Mapping[str, float], samples: Sequence[int]) -> str:
    """Return what was not finite, and in which samples, on one line."""
    terms = ", ".join(f"{name} {value}" for name, value in means.items() if name.startswith("loss"))
    more = f" and {len(samples) - SAMPLES_SHOWN} more" if len(samples) > SAMPLES_SHOWN else ""
    shown = ", ".join(str(sample) for sample in samples[:SAMPLES_SHOWN])
    return f"step {step} is not finite: {terms}, gradient norm {means['grad_norm']}; samples {shown}{more}"
