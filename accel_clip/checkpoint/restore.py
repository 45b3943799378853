"""Model, optimizer and random states put back from a checkpoint, bit for bit."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from accel_clip.checkpoint.manifest import Checkpoint
from accel_clip.checkpoint.snapshot import MODEL, OPTIMIZER, OPTIMIZER_TENSORS, random_file
from accel_clip.checkpoint.tensors import load_optimizer_state, unflatten
from accel_clip.faults import ConfigError
from accel_clip.randomness import RandomState
from accel_clip.typed_json import WrongContent, read_json


def restore(checkpoint: Checkpoint, model: Module, optimizer: Optimizer) -> dict[str, Any]:
    """Put model and optimizer into the state of a verified checkpoint and return what the run stored beside them.

    Random states are for `restore_random`, which comes last before the first step. Raises `ConfigError` when the
    checkpoint is of another model or optimizer.
    """
    tensors = load_tensors(checkpoint, OPTIMIZER_TENSORS)
    inner = optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer
    try:
        model.load_state_dict(load_weights(checkpoint))
        load_optimizer_state(inner, unflatten(load_json(checkpoint, OPTIMIZER), tensors))
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as problem:
        raise ConfigError(
            f"{checkpoint.path} is of another model or optimizer: set the model and optim settings it was made with, "
            f"or name another output_dir ({' '.join(str(problem).split())[:300]})"
        ) from problem
    return load_state(checkpoint)


def restore_random(checkpoint: Checkpoint, rank: int, device: torch.device) -> bool:
    """Put torch's generators of this process back; False when the checkpoint has no state for this rank and device."""
    if rank >= checkpoint.num_processes:
        return False
    saved = load_tensors(checkpoint, random_file(rank))
    now = RandomState(device)
    if set(saved) != {"cpu", device.type}:
        return False
    before = now.cpu
    now.cpu = saved["cpu"]
    now.on_device = None if now.on_device is None else saved[device.type]
    try:
        now.restore()
    except (RuntimeError, TypeError):  # of another version of torch, or of nothing
        torch.set_rng_state(before)
        return False
    return True


def load_weights(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Return the tensors of the model by name, on the CPU."""
    return load_tensors(checkpoint, MODEL)


def load_state(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return what the run stored beside weights and optimizer; raises `ConfigError` where it is no JSON object."""
    try:
        return checkpoint.state
    except WrongContent as error:
        raise unusable(checkpoint, error) from error


def load_tensors(checkpoint: Checkpoint, name: str) -> dict[str, Tensor]:
    """Return the tensors of a file, in memory of their own."""
    return {key: tensor.clone() for key, tensor in load_file(checkpoint.path / name).items()}


def load_json(checkpoint: Checkpoint, name: str) -> Any:
    """Return the content of a JSON file; raises `ConfigError` where it is none."""
    try:
        return read_json(checkpoint.path / name, dict)
    except WrongContent as error:
        raise unusable(checkpoint, error) from error


def unusable(checkpoint: Checkpoint, error: WrongContent) -> ConfigError:
    """Return the error that says what is wrong in a checkpoint's file."""
    return ConfigError(f"{checkpoint.path}: {error}: name another output_dir")
