"""Train and fine-tune CLIP models on your own pictures and captions, on Hugging Face Accelerate."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

HOMES = {
    "Config": "accel_clip.config",
    "DataConfig": "accel_clip.config",
    "SourceConfig": "accel_clip.config",
    "ModelConfig": "accel_clip.config",
    "LossConfig": "accel_clip.config",
    "OptimConfig": "accel_clip.config",
    "TrainConfig": "accel_clip.config",
    "EvalConfig": "accel_clip.config",
    "TrackConfig": "accel_clip.config",
    "StopConfig": "accel_clip.config",
    "train": "accel_clip.trainer",
    "evaluate": "accel_clip.evaluation.command",
    "LOSSES": "accel_clip.losses.base",
    "SOURCES": "accel_clip.data.sources.base",
    "OPTIMIZERS": "accel_clip.optim.optimizers",
    "SCHEDULES": "accel_clip.optim.schedules",
}

__all__ = ["__version__", *HOMES]


def __getattr__(name: str) -> Any:
    """Import a public name from its module when it is first asked for, so that `import accel_clip` is quick."""
    if name not in HOMES:
        raise AttributeError(f"module 'accel_clip' has no attribute '{name}'")
    return getattr(importlib.import_module(HOMES[name]), name)


if TYPE_CHECKING:
    from accel_clip.config import (
        Config,
        DataConfig,
        EvalConfig,
        LossConfig,
        ModelConfig,
        OptimConfig,
        SourceConfig,
        StopConfig,
        TrackConfig,
        TrainConfig,
    )
    from accel_clip.data.sources.base import SOURCES
    from accel_clip.evaluation.command import evaluate
    from accel_clip.losses.base import LOSSES
    from accel_clip.optim.optimizers import OPTIMIZERS
    from accel_clip.optim.schedules import SCHEDULES
    from accel_clip.trainer import train
