"""A model that somebody else's code may read and not change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from itertools import chain

from torch import nn

from accel_clip.faults import ConfigError
from accel_clip.models.build import ClipModel


def with_own_descriptions(model: ClipModel) -> ClipModel:
    """Return a model of the same weights whose descriptions may be written into: no export is made of them."""
    described = ("model_config", "preprocess_config", "towers")
    return replace(model, **{name: deepcopy(getattr(model, name)) for name in described})


@contextmanager
def only_read(module: nn.Module, reader: str) -> Iterator[None]:
    """Let a block read a module, and put every part of it back into the mode that it was in.

    Raises `ConfigError` naming the reader where a weight or buffer was written to, a gradient is left, or a weight is
    frozen or trained that was not. Torch counts what it writes into a tensor; writes past that count, as through
    `.data`, are not seen.
    """
    modes = [(part, part.training) for part in module.modules()]
    before = traces(module)
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
    changed = [name for name, trace in traces(module).items() if trace != before.get(name)]
    if changed:
        raise ConfigError(f"{reader}: it has changed {changed[0]} of the model, which it may only read")


def traces(module: nn.Module) -> dict[str, tuple[int, int, bool, bool]]:
    """Return what tells of each weight and buffer whether it was changed: who it is, its writes, and its gradient."""
    named = chain(module.named_parameters(), module.named_buffers())
    return {name: (id(each), each._version, each.requires_grad, each.grad is None) for name, each in named}
