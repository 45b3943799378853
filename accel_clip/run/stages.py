"""The stages of a run, by the number of the contrastive batch: what changes in its middle changes where one begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from accel_clip.config import Config


@dataclass(frozen=True)
class Stage:
    """A part of a run in which nothing changes from batch to batch but the learning rate."""

    number: int
    """from 0"""
    first_batch: int
    """the contrastive batch of the run that it begins with, which is the first of an optimizer step"""
    end_batch: int | None
    """the one that the next stage begins with, None in the last stage"""
    config: Config
    """the settings in force: what pairs go through, and how a batch is cut, is asked of these"""


def stages_of(config: Config) -> tuple[Stage, ...]:
    """Return the stages of a run in their order: one, since no setting tells of more."""
    return (Stage(0, 0, None, config),)


def stage_at(stages: Sequence[Stage], batch: int) -> Stage:
    """Return the stage that a contrastive batch of the run belongs to, counted from 0."""
    return next(stage for stage in reversed(stages) if stage.first_batch <= batch)
