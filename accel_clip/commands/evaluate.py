"""Evaluation of a model on its own, outside a training run."""

from __future__ import annotations

from accel_clip.config import Config
from accel_clip.data.pairs import open_held_out, open_training
from accel_clip.data.sources.base import Source
from accel_clip.data.sources.resolve import Locations, open_labelled
from accel_clip.evaluation.evaluator import Evaluator, check_evaluator
from accel_clip.losses.base import build_loss
from accel_clip.models.build import build_model
from accel_clip.process.accelerator import build_accelerator, choose_workers, process_as_found
from accel_clip.run.parts import build_evaluator
from accel_clip.run.preconditions import find_sources


@process_as_found()
def evaluate(config: Config) -> dict[str, float]:
    """Return the metrics of the model that the settings name on `data.val` and `eval.zero_shot`, and by `eval.also`."""
    known, named = find_sources(config), config.data.val
    for item in config.eval.also:
        check_evaluator(item)
    held_out = None if named is None else open_held_out(named, config.data, locations=known)
    evaluator = own_evaluator(config, held_out, known)
    metrics = evaluator.run()
    evaluator.accelerator.end_training()
    return metrics


@process_as_found()
def evaluate_run(config: Config) -> Evaluator:
    """Return an evaluator that has measured a model on what a run with these settings held out."""
    known, data = find_sources(config), config.data
    if data.val is None:
        held_out = open_training(data, locations=known).held_out
    else:
        held_out = open_held_out(data.val, data, locations=known)
    evaluator = own_evaluator(config, held_out, known)
    evaluator.run()
    evaluator.accelerator.end_training()
    return evaluator


def own_evaluator(config: Config, held_out: Source | None, known: Locations) -> Evaluator:
    """Return an evaluator with an `Accelerator` and a model of its own; known: where sources were found."""
    loss = build_loss(config.loss)
    accelerator = build_accelerator(config.train)
    model = build_model(config.model, needs_logit_bias=loss.requires_bias())
    model.clip.to(accelerator.device)
    loss.to(accelerator.device)
    named, label_key = config.eval.zero_shot, config.eval.label_key
    labelled = None if named is None else open_labelled(named, config.data, label_key, locations=known)
    num_workers = choose_workers(config.data.workers, accelerator.device)
    return build_evaluator(config, accelerator, model, loss, held_out, labelled, num_workers)
