"""What an evaluator is: a class, found by name, that measures a model by the features of pictures and captions."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from accelerate.utils import broadcast_object_list

from accel_clip.evaluation.encoders import Encoders
from accel_clip.faults import ConfigError
from accel_clip.models.reading import only_read, with_own_descriptions
from accel_clip.models.towers import evaluation_mode
from accel_clip.plugins import own_code
from accel_clip.randomness import derive_seed, guarded
from accel_clip.registry import Registry

SETTING = "eval.also"
EVALUATORS = Registry("evaluator", setting=SETTING)
GIVEN = ("held_out", "zero_shot", "loss", "eval_config")
"""What an evaluator that names it is built with, which therefore is no option of it: the source of held-out pairs and
that of labelled pictures, None where there is none, the run's loss, and the `eval` section of the settings."""


class Measures(Protocol):
    """What an entry of the registry builds."""

    def metric_names(self) -> Collection[str]:
        """Return the names of what `evaluate` will return, known before anything is measured."""

    def evaluate(self, encoders: Encoders) -> Mapping[str, float]:
        """Return the metrics of the model as it is now; every process calls it."""


@dataclass(frozen=True)
class BoundEvaluator:
    """A registered evaluator with its options bound."""

    name: str
    """the one that it is registered under"""
    evaluator: Any
    """what the entry has built, see `Measures`"""

    @property
    def title(self) -> str:
        """Return what messages call the evaluator."""
        return f"{SETTING}: '{self.name}'"

    def metric_names(self) -> list[str]:
        """Return the names of what `measure` will return, as the evaluator says them."""
        with own_code(self.title, self.evaluator):
            return list(self.evaluator.metric_names())

    def measure(self, encoders: Encoders) -> dict[str, float]:
        """Return the metrics by name, the same on every process; collective.

        What draws random numbers draws the same ones in every evaluation, and leaves the generators as they were.
        Raises `ConfigError` for other names than the evaluator said before, for what is no number, and where weights
        have changed.
        """
        clip, seed = encoders.model.clip, derive_seed("evaluator", self.name)
        encoders = replace(encoders, asked_by=self.name, model=with_own_descriptions(encoders.model))
        with only_read(clip, self.title), evaluation_mode(clip), guarded(seed, encoders.accelerator.device):
            with own_code(self.title, self.evaluator), torch.no_grad():
                found = self.evaluator.evaluate(encoders)
            [found] = broadcast_object_list([found])  # processes that differ in a bit would not stop together
        self.require_as_said(found)
        return {name: number(self.title, name, value) for name, value in found.items()}

    def require_as_said(self, found: Any) -> None:
        """Raise `ConfigError` unless what was measured has the names that `metric_names` gives."""
        if not isinstance(found, Mapping):
            raise ConfigError(
                f"{self.title}: evaluate returned {type(found).__name__}: it must return {{name: number}}"
            )
        said, came = set(self.metric_names()), set(found)
        if said != came:
            parts = {"did not come": said - came, "came unannounced": came - said}
            told = "; ".join(f"{', '.join(sorted(map(str, names)))} {what}" for what, names in parts.items() if names)
            raise ConfigError(f"{self.title}: {told}: evaluate must return the names that metric_names gives")


def number(title: str, name: str, value: Any) -> float:
    """Return a metric as a float, which may be infinite or NaN; raises `ConfigError` for what is no number."""
    try:
        if not isinstance(value, (str, bytes, bool)):
            return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # RuntimeError: a tensor of several numbers
        pass
    raise ConfigError(f"{title}: {name} is {type(value).__name__}: evaluate must return one number a name")


def bind(name: str, options: Mapping[str, Any], given: Mapping[str, Any]) -> BoundEvaluator:
    """Return an evaluator, built with its options and with what it names of `GIVEN`; raises `ConfigError`."""
    target = EVALUATORS.get(name)
    taken = inspect.signature(target).parameters
    passed = {key: value for key, value in given.items() if key in taken}
    with own_code(f"{SETTING}: '{name}'", target):
        return BoundEvaluator(name, target(**passed, **options))
