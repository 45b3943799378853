"""Model, loss and optimizer put together for training on this machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator
from torch import nn

from accel_clip.config import Config
from accel_clip.losses.base import Loss
from accel_clip.losses.gradient import warn_of_dense_logits
from accel_clip.models.anatomy import Anatomy, examine
from accel_clip.models.blocks import compile_blocks, recompute_activations
from accel_clip.models.build import ClipModel
from accel_clip.models.data_parallel import DataParallel, data_parallel
from accel_clip.models.freezing import freeze_unused
from accel_clip.models.training_model import TrainingModel, no_decay_names
from accel_clip.optim.optimizers import build_optimizer
from accel_clip.step.plan import ModelTrial


@dataclass(frozen=True)
class Assembly:
    """What a step works on."""

    anatomy: Anatomy
    """what may be done with the model's towers"""
    trained: list[nn.Parameter]
    """the parameters that get a gradient, the loss's own among them"""
    parallel: DataParallel
    """the model as the accelerator has prepared it"""
    optimizer: Any
    """the optimizer as the accelerator has prepared it"""
    trial: ModelTrial
    """what a trial of the model needs"""


def assemble(config: Config, accelerator: Accelerator, loss: Loss, model: ClipModel) -> Assembly:
    """Return the parts in the order that each needs; parameters are frozen as the settings say already.

    Raises `ConfigError` for what does not suit the model.
    """
    freeze_unused(model, loss)
    anatomy = examine(model.clip, model.tokenizer)
    loss.to(accelerator.device)
    loss.prepare(model, accelerator)
    if config.train.activation_checkpointing:
        recompute_activations(model.clip)
    if config.train.compile:
        compile_blocks(model.clip, accelerator.device)
    named = [*model.clip.named_parameters(), *((f"loss.{i}", each) for i, each in enumerate(loss.parameters()))]
    optimizer = build_optimizer(named, config.optim, no_decay_names(model.clip))
    parallel, optimizer = data_parallel(accelerator, TrainingModel(model, anatomy.separate), optimizer)
    warn_of_dense_logits(loss, config.train.batch_size, model.model_config["embed_dim"])
    trained = [parameter for _, parameter in named if parameter.requires_grad]
    return Assembly(anatomy, trained, parallel, optimizer, ModelTrial(parallel, model, anatomy, optimizer))
