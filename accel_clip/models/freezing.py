"""Which parts are trained: what the user freezes, and what the loss does not reach, stays as it is."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from accel_clip.console import say
from accel_clip.faults import ConfigError, some_of
from accel_clip.models.build import ClipModel
from accel_clip.models.names import matches
from accel_clip.randomness import seeded

MOST_NAMED = 5  # parameters, in a message


class HasTotal(Protocol):
    """What is needed of `losses.base.Loss`: losses use models, so models do not import losses."""

    @property
    def name(self) -> str:
        """Return the name in the registry."""
        ...

    def total(self, outputs: dict[str, Tensor]) -> Tensor:
        """Return the loss of a whole batch from the model's outputs and the columns of equal pairs."""
        ...


def freeze(clip: nn.Module, pattern: str) -> None:
    """Freeze the parameters that match `image`, `text` or a name pattern; raises `ConfigError` where there are none."""
    matched = [parameter for name, parameter in clip.named_parameters() if matches(pattern, name)]
    if not matched:
        examples = ", ".join([name for name, _ in clip.named_parameters()][:5])
        raise ConfigError(f"model.freeze: '{pattern}' matches no parameter; names look like {examples}, …")
    for parameter in matched:
        parameter.requires_grad_(False)


def require_trained(clip: nn.Module, patterns: list[str]) -> None:
    """Raise `ConfigError` where the patterns that were frozen leave nothing to train."""
    if not any(parameter.requires_grad for parameter in clip.parameters()):
        raise ConfigError(f"model.freeze: {patterns} leaves nothing to train")


def rest_frozen(module: nn.Module) -> None:
    """Put every part whose parameters are all frozen into evaluation mode: its statistics stay and nothing drops out.

    So a frozen part gives the same features in every step, whether it is a tower, a block or one batch norm.
    """
    parameters = list(module.parameters())
    if parameters and not any(parameter.requires_grad for parameter in parameters):
        module.eval()
        return
    for part in module.children():
        rest_frozen(part)


def freeze_unused(model: ClipModel, loss: HasTotal) -> None:
    """Freeze parameters that get no gradient from the loss, and say which: DDP would wait for them for ever.

    One forward and backward of two made-up pairs finds them, without a trace in weights, statistics or randomness.
    """
    clip = model.clip
    trainable = {name: parameter for name, parameter in clip.named_parameters() if parameter.requires_grad}
    was_training = clip.training
    clip.eval()
    with seeded(0), torch.enable_grad():
        outputs = clip(image=blank_pictures(model), text=model.tokenizer(["one", "two"]))
        columns = {"caption_hash": torch.arange(2), "picture_hash": torch.arange(2)}
        value = loss.total({**columns, **{key: value for key, value in outputs.items() if value is not None}})
        gradients = torch.autograd.grad(value, list(trainable.values()), allow_unused=True)
    clip.train(was_training)
    unused = [name for name, gradient in zip(trainable, gradients, strict=True) if gradient is None]
    for name in unused:
        trainable[name].requires_grad_(False)
    if unused:
        say(f"the loss '{loss.name}' does not use {some_of(unused, MOST_NAMED)}: frozen")


def blank_pictures(model: ClipModel) -> Tensor:
    """Return two different made-up pictures of the model's size, float32 [2, 3, H, W]."""
    height, width = model.picture_size
    return torch.stack([torch.zeros(3, height, width), torch.ones(3, height, width)])
