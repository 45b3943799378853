"""What a loss is: a function of the features of a whole batch that returns named terms, found by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from accel_clip.config import LossConfig
from accel_clip.faults import ConfigError
from accel_clip.process.transfer import to_device
from accel_clip.registry import Registry, check_options

if TYPE_CHECKING:
    from accelerate import Accelerator

    from accel_clip.data.batch import Batch
    from accel_clip.models.build import ClipModel

LOSSES = Registry("loss", setting="loss.name")
OUTPUTS = (
    *("image_features", "text_features", "logit_scale", "logit_bias", "logits", "labels"),
    *("caption_hash", "picture_hash", "output_dict"),
)
"""What the step passes to a loss, which therefore is no option of it."""


@dataclass(frozen=True)
class Loss:
    """A registered loss with its options bound.

    Its function has open_clip's signature: it takes outputs of the model by name (`image_features` and
    `text_features` [B, D], `logit_scale`, `logit_bias`, …) and `output_dict=True`, and returns named terms; those whose
    names end in `_loss` are summed. Where it is an object it may also have these methods:

    `gradient(accelerator, outputs)`: its own way to the gradient of the global batch (`gradient.py`);
    `pair_terms(output, …)`: terms that are sums over pairs, computed chunk by chunk from outputs that it names and the
    global loss does not see, and `pair_count(batch)`: what the sums of this process's batch are divided by, in part;
    `columns(batch, device)`: further columns by name, one row a pair, that it takes beside the model's outputs;
    `data_columns()`: the columns of numbers that the data must have for it, which come in `Batch.extra`;
    `prepare(model, accelerator)`: called once before training with the model that is trained.
    """

    name: str
    """that it is registered by"""
    function: Any
    """a callable; what methods it has beside is asked for"""

    def __call__(self, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the terms of the loss of a whole batch; outputs that the function does not name are left out."""
        given = {**outputs, "output_dict": True}
        parameters = inspect.signature(self.signature_of()).parameters
        takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        terms = self.function(**(given if takes_all else {key: given[key] for key in given if key in parameters}))
        if isinstance(terms, Tensor):
            terms = {f"{self.name}_loss": terms}
        if not any(key.endswith("_loss") for key in terms):
            raise ConfigError(
                f"loss.name: '{self.name}' returned {sorted(terms)}: at least one term must have a name ending in _loss"
            )
        return terms

    def total(self, outputs: dict[str, Tensor]) -> Tensor:
        """Return the sum of the terms that count, of a whole batch."""
        return total(self(outputs))

    def pair_terms(self, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the sums over the pairs of a chunk by name, empty for a loss without such terms."""
        names = self.pair_outputs()
        return self.function.pair_terms(**{name: outputs[name] for name in names}) if names else {}

    def pair_outputs(self) -> list[str]:
        """Return the outputs that pair terms are computed from."""
        method = getattr(self.function, "pair_terms", None)
        return [] if method is None else list(inspect.signature(method).parameters)

    def columns(self, batch: Batch, device: torch.device) -> dict[str, Tensor]:
        """Return the columns of a batch that the loss takes by name, one row a pair."""
        wanted = self.wanted()
        columns = {
            name: to_device(each, device) for name, each in batch.columns().items() if wanted is None or name in wanted
        }
        own = getattr(self.function, "columns", None)
        return columns if own is None else {**columns, **own(batch, device)}

    def data_columns(self) -> tuple[str, ...]:
        """Return the columns of numbers that the loss asks of the data."""
        asked = getattr(self.function, "data_columns", None)
        return () if asked is None else tuple(asked())

    def prepare(self, model: ClipModel, accelerator: Accelerator) -> None:
        """Let the loss build what it needs beside the model that is trained; raises `ConfigError` where it cannot."""
        if hasattr(self.function, "prepare"):
            self.function.prepare(model, accelerator)

    def wanted(self) -> set[str] | None:
        """Return the outputs of which the global loss needs every row; None when it takes whatever there is."""
        parameters = inspect.signature(self.signature_of()).parameters
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            return None
        return set(parameters) - set(self.pair_outputs())

    def signature_of(self) -> Callable[..., Any]:
        """Return the callable whose signature says what the loss takes; a module's own is in its `forward`."""
        return self.function.forward if isinstance(self.function, nn.Module) else self.function

    def requires_bias(self) -> bool:
        """Return whether the loss cannot do without a logit bias, as the sigmoid loss."""
        parameter = inspect.signature(self.signature_of()).parameters.get("logit_bias")
        return parameter is not None and parameter.default is parameter.empty

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the loss's own trainable parameters."""
        if isinstance(self.function, nn.Module):
            yield from (parameter for parameter in self.function.parameters() if parameter.requires_grad)

    def to(self, device: torch.device) -> None:
        """Move the loss's own parameters."""
        if isinstance(self.function, nn.Module):
            self.function.to(device)


def total(terms: dict[str, Tensor]) -> Tensor:
    """Return the sum of the terms that count."""
    return torch.stack([value for key, value in terms.items() if key.endswith("_loss")]).sum()


def build_loss(config: LossConfig) -> Loss:
    """Return the loss that the settings name: a class is built with the options, a function gets them bound.

    Raises `ConfigError` for an unknown name or option.
    """
    target: Any = LOSSES.get(config.name)
    check_options("loss.options", f"the loss '{config.name}'", target, config.options, given=OUTPUTS)
    bind: Any = target if inspect.isclass(target) else partial(partial, target)
    return Loss(config.name, bind(**config.options))
