"""The evaluation of a run: which evaluators measure its model, and in which order."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import numpy
from accelerate import Accelerator

from accel_clip.config import EvalConfig
from accel_clip.data.sources.base import Source
from accel_clip.evaluation.base import EVALUATORS, GIVEN, SETTING, BoundEvaluator, bind
from accel_clip.evaluation.built_in import Retrieval
from accel_clip.evaluation.encoders import Encoders
from accel_clip.evaluation.examples import RetrievalExamples
from accel_clip.faults import ConfigError
from accel_clip.losses.base import Loss
from accel_clip.models.build import ClipModel
from accel_clip.process.waiting import UNWATCHED, Lookout
from accel_clip.registry import check_options, name_of, options_of

BUILT_IN = {"retrieval": "held_out", "zero_shot": "zero_shot"}
"""Evaluators that always measure, where there is what they measure on."""
METRIC = re.compile(r"(?!(?:loss|pairs|val|zero_shot)/)[\w.@+-]+(?:/[\w.@+-]+)+")
RULE = "a name is a group of your own, a slash and a word, such as mine/accuracy; loss, pairs, val, zero_shot are taken"


class Evaluator:
    """Measures a model by retrieval, zero-shot classification and what `eval.also` names; every process must call it.

    held_out, zero_shot: what is None is not measured. Their captions and labels are read once, here. Raises
    `ConfigError` for an evaluator in `eval.also` that is unknown or cannot be built, or whose metrics are named wrong.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: ClipModel,
        config: EvalConfig,
        held_out: Source | None,
        zero_shot: Source | None,
        loss: Loss,
        max_pixels: float,
        num_workers: int,
    ) -> None:
        self.accelerator = accelerator
        self.encoders = Encoders(accelerator, model, config.batch_size, max_pixels, num_workers)
        given = {"held_out": held_out, "zero_shot": zero_shot, "loss": loss, "eval_config": config}
        built_in = [bind(name, {}, given) for name, needed in BUILT_IN.items() if given[needed] is not None]
        also = [evaluator_named_by(item, given) for item in config.also]
        require_own_names(also)
        self.evaluators = [*built_in, *also]

    def metric_names(self) -> set[str]:
        """Return the names of what `run` will return."""
        return {name for each in self.evaluators for name in each.metric_names()}

    def run(self, lookout: Lookout = UNWATCHED) -> dict[str, float]:
        """Return all metrics of the model as it is now; leaves its training mode and the random state as they were.

        Pictures that cannot be used are left out, which is said once. Raises `DataError` when no other is left, or when
        most are missing files, and `StopAsked` when a process is asked to stop.
        """
        metrics: dict[str, float] = {}
        for each in self.evaluators:
            metrics |= each.measure(replace(self.encoders, lookout=lookout))
        return metrics

    @property
    def examples(self) -> RetrievalExamples | None:
        """Return what the last `run` found for a few captions, None without any."""
        retrievals = [each.evaluator for each in self.evaluators if isinstance(each.evaluator, Retrieval)]
        return retrievals[0].examples if retrievals else None

    @property
    def mean_cosines(self) -> dict[str, float]:
        """Return how alike the features of pictures, and those of captions, were in the last `run`."""
        return {} if self.examples is None else self.examples.mean_cosines

    def picture_grid(self) -> numpy.ndarray | None:
        """Return the nearest pictures of a few captions as found by the last `run`, uint8 [H, W, 3]; None without any.

        No collective: call it where it is shown.
        """
        return None if self.examples is None else self.examples.picture_grid()


def check_evaluator(item: str | Mapping[str, Any]) -> None:
    """Raise `ConfigError` for an item of `eval.also` with an unknown name, or wrong or missing options."""
    name, options = name_of(item, SETTING), options_of(item, SETTING)
    target = EVALUATORS.get(name)
    if name in BUILT_IN:
        raise ConfigError(f"{SETTING}: '{name}' measures without being named, where it can: leave it away")
    check_options(SETTING, f"the evaluator '{name}'", target, options, GIVEN)


def evaluator_named_by(item: str | Mapping[str, Any], given: Mapping[str, Any]) -> BoundEvaluator:
    """Return the evaluator that an item of `eval.also` names, with what it asks for of `GIVEN`.

    Raises `ConfigError` as `check_evaluator` does, and for one that cannot be built.
    """
    check_evaluator(item)
    return bind(name_of(item, SETTING), options_of(item, SETTING), given)


def require_own_names(evaluators: Collection[BoundEvaluator]) -> None:
    """Raise `ConfigError` for a metric of a user's evaluators whose name is taken, or is none."""
    taken: set[str] = set()
    for each in evaluators:
        for name in each.metric_names():
            if not isinstance(name, str) or METRIC.fullmatch(name) is None:
                raise ConfigError(f"{each.title}: {name!r} cannot be the name of a metric: {RULE}")
            if name in taken:
                raise ConfigError(f"{each.title}: {name} is measured already: give yours another name")
            taken.add(name)
