"""The parts of a run as `run.parts` builds them, with the plan of a run that begins; no run folder is touched."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from accel_clip.config import TrainConfig
from accel_clip.models.anatomy import Anatomy
from accel_clip.models.data_parallel import DataParallel
from accel_clip.run.parts import RunParts, build_parts
from accel_clip.run.preconditions import Start
from accel_clip.run.problems import Problems
from accel_clip.step.chunks import Plan
from accel_clip.step.plan import ModelTrial, choose_plan


@dataclass(frozen=True)
class PlannedParts(RunParts):
    """What a run is made of, and how a process cuts its part of a batch."""

    plan: Plan
    """micro-batches and the graphs that are kept, found by trying on this machine"""

    @property
    def trial(self) -> ModelTrial:
        """Return what a trial of the model needs."""
        return self.assembly.trial

    @property
    def anatomy(self) -> Anatomy:
        """Return what the towers of the model are."""
        return self.assembly.anatomy

    @property
    def parallel(self) -> DataParallel:
        """Return the model as the accelerator has prepared it."""
        return self.assembly.parallel

    @property
    def optimizer(self) -> Any:
        """Return the optimizer as the accelerator has prepared it."""
        return self.assembly.optimizer

    @property
    def pairs_per_process(self) -> int:
        """Return one process's part of a contrastive batch."""
        return self.config.train.batch_size // self.num_processes


def planned_parts(start: Start, num_processes: int, problems: Problems, index_folder: Path) -> PlannedParts | None:
    """Return the parts of a run, or None after taking in everything that keeps them from being built.

    index_folder: where the indexes of shards are kept that are not there yet.
    """
    parts = build_parts(start, num_processes, problems, index_folder)
    if parts is None:
        return None
    own = own_part(start.config.train, num_processes)
    plan = problems.attempt(partial(choose_plan, parts.assembly.trial, own))
    if plan is None:
        return None
    return PlannedParts(**{each.name: getattr(parts, each.name) for each in fields(parts)}, plan=plan)


def own_part(config: TrainConfig, num_processes: int) -> TrainConfig:
    """Return the settings of one process of several, as they are for a process alone."""
    return replace(config, batch_size=config.batch_size // num_processes)
