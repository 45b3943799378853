"""What learns in a run: model, loss, optimizer and schedule as one, and the exact step that brings them together.

An optimizer step has two halves. `add_gradients` leaves the average gradient of its contrastive batches in the
parameters; then the processes agree on what they measured, and the step ends by `take_step` or `leave_step_out`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from accel_clip.config import Config, TrainConfig
from accel_clip.data.batch import Batch
from accel_clip.losses.base import Loss, total
from accel_clip.meters import MeterGroup
from accel_clip.models.build import ClipModel
from accel_clip.models.export import copy_of_weights
from accel_clip.models.training_model import clamp_logit_scale, share_running_statistics
from accel_clip.optim.optimizers import set_learning_rate
from accel_clip.optim.schedules import Schedule
from accel_clip.step.assembly import Assembly
from accel_clip.step.contrastive import ContrastiveStep
from accel_clip.step.plan import plan_for_stage, plan_state


class Learner:
    """Model, loss, optimizer, schedule and contrastive step; built when the weights of a checkpoint are back.

    stage: the number of the one that the batch is cut for; saved_plan: what the checkpoint says of that, None for a run
    that begins. Collective where it makes a plan: here, and in `begin_stage`.
    """

    def __init__(
        self,
        config: Config,
        model: ClipModel,
        loss: Loss,
        assembly: Assembly,
        schedule: Schedule,
        stage: int,
        saved_plan: Mapping[str, Any] | None,
    ) -> None:
        self.model, self.loss, self.assembly, self.schedule = model, loss, assembly, schedule
        self.parallel, self.optimizer = assembly.parallel, assembly.optimizer
        self.accelerator = self.parallel.accelerator
        self.largest_norm = config.optim.grad_clip or math.inf
        self.largest_logit_scale = config.train.max_logit_scale
        self.config, self.stage = config.train, stage
        plan = plan_for_stage(assembly.trial, self.config, stage, saved_plan)
        self.contrastive_step = ContrastiveStep(self.parallel, loss, assembly.anatomy, plan)

    def begin_stage(self, stage: int, config: TrainConfig, saved_plan: Mapping[str, Any] | None) -> None:
        """Plan how a batch is cut anew where another stage than before begins."""
        if stage != self.stage:
            self.config, self.stage = config, stage
            self.contrastive_step.plan = plan_for_stage(self.assembly.trial, config, stage, saved_plan)

    def add_gradients(self, step: int, batches: Sequence[Batch], report: MeterGroup) -> float:
        """Add the average gradient of a step's batches to the parameters and clip it; return the learning rate.

        step: optimizer steps taken before; report: takes in the loss, its terms and the gradient's norm before it is
        clipped.
        """
        self.parallel.model.train()
        rate = set_learning_rate(self.optimizer, self.schedule.multiplier(step))
        for batch in batches:
            with self.parallel.accumulating():
                terms = self.contrastive_step(batch)
            report.update("loss", total(terms))
            report.update_all({f"loss/{name}": value for name, value in terms.items()})
        norm = self.accelerator.clip_grad_norm_(self.assembly.trained, self.largest_norm)
        report.update("grad_norm", norm)
        return rate

    def take_step(self) -> None:
        """Change the weights by the gradient that was added."""
        self.optimizer.step()
        self.end_step()

    def leave_step_out(self) -> None:
        """Leave the weights as they are; in fp16 the scale of the gradients is lowered."""
        if self.accelerator.scaler is not None:
            self.optimizer.step()  # which leaves a step that is not finite out itself
        self.end_step()

    def abandon_step(self) -> None:
        """Forget the gradient of a step that comes to no end; fp16's scaler forgets that it has unscaled it."""
        if (scaler := self.accelerator.scaler) is not None:
            scaler.update(scaler.get_scale())
        self.forget_gradients()

    def end_step(self) -> None:
        """Forget the gradient, and keep the logit scale where it may be."""
        self.forget_gradients()
        clamp_logit_scale(self.model.clip, self.largest_logit_scale)

    def forget_gradients(self) -> None:
        """Leave no gradient in the parameters."""
        self.optimizer.zero_grad()

    @contextmanager
    def evaluated(self) -> Iterator[None]:
        """Let the model hold the weights that are measured and exported, in a block: those it trains; collective."""
        self.share_statistics()
        yield

    def share_statistics(self) -> None:
        """Let every process hold the first one's statistics of batch norm, before they are read; collective."""
        share_running_statistics(self.model.clip)

    def exported_weights(self) -> dict[str, Tensor]:
        """Return a copy of the weights that an export holds, on the CPU, by open_clip's names."""
        return copy_of_weights(self.model)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint holds beside weights and optimizer, as plain JSON."""
        model, trial = self.model, self.assembly.trial
        return {
            "model": {
                "model_config": model.model_config,
                "preprocess_config": model.preprocess_config,
                "towers": model.towers,
            },
            "plan": plan_state(trial, self.config, self.stage, self.contrastive_step.plan),
        }

    @property
    def logit_scale(self) -> float:
        """Return what cosines are multiplied by (after exp)."""
        return float(self.model.clip.logit_scale.detach().exp().item())

    @property
    def context_length(self) -> int:
        """Return how many tokens of a caption the model reads."""
        return int(self.model.tokenizer.context_length)  # type: ignore[attr-defined]
