"""Train and fine-tune CLIP models on your own pictures and captions, on Hugging Face Accelerate."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = [
    "EVALUATORS",
    "HOOKS",
    "LOSSES",
    "OPTIMIZERS",
    "SCHEDULES",
    "SOURCES",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "EvalConfig",
    "LossConfig",
    "ModelConfig",
    "OptimConfig",
    "SourceConfig",
    "StopConfig",
    "TrackConfig",
    "TrainConfig",
    "evaluate",
    "train",
]

HOMES = {
    "EVALUATORS": "evaluation.base",
    "HOOKS": "run.hooks",
    "LOSSES": "losses.base",
    "OPTIMIZERS": "optim.optimizers",
    "SCHEDULES": "optim.schedules",
    "SOURCES": "data.sources.base",
    "evaluate": "commands.evaluate",
    "train": "commands.train",
}  # the rest is in config


def __getattr__(name: str) -> Any:
    """Import a public name from its module when it is first asked for, so that `import accel_clip` is quick."""
    if name not in __all__:
        raise AttributeError(f"module 'accel_clip' has no attribute '{name}'")
    return getattr(importlib.import_module(f"accel_clip.{HOMES.get(name, 'config')}"), name)


if TYPE_CHECKING:
    from accel_clip.commands.evaluate import evaluate
    from accel_clip.commands.train import train
    from accel_clip.config import (
        CheckpointConfig,
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
    from accel_clip.evaluation.base import EVALUATORS
    from accel_clip.losses.base import LOSSES
    from accel_clip.optim.optimizers import OPTIMIZERS
    from accel_clip.optim.schedules import SCHEDULES
    from accel_clip.run.hooks import HOOKS
