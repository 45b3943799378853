"""Evaluation of a model on its own, outside a training run."""

from __future__ import annotations

from accel_clip.config import Config
from accel_clip.data.pairs import open_held_out, open_training
from accel_clip.data.sources.base import Source
from accel_clip.data.sources.resolve import open_labelled
from accel_clip.evaluation.evaluator import Evaluator
from accel_clip.losses.base import build_loss
from accel_clip.models.build import build_model
from accel_clip.process.accelerator import build_accelerator, choose_workers, process_as_found
from accel_clip.run.preconditions import check_sources


@process_as_found()
def evaluate(config: Config) -> dict[str, float]:
    """Return the metrics of the model that the settings name on `data.val` and `eval.zero_shot`."""
    check_sources(config)
    held_out = None if config.data.val is None else open_held_out(config.data.val, config.data)
    evaluator = build_evaluator(config, held_out)
    metrics = evaluator.run()
    evaluator.accelerator.end_training()
    return metrics


@process_as_found()
def evaluate_run(config: Config) -> Evaluator:
    """Return an evaluator that has measured a model on what a run with these settings held out."""
    check_sources(config)
    data = config.data
    held_out = open_training(data).held_out if data.val is None else open_held_out(data.val, data)
    evaluator = build_evaluator(config, held_out)
    evaluator.run()
    evaluator.accelerator.end_training()
    return evaluator


def build_evaluator(config: Config, held_out: Source | None) -> Evaluator:
    """Return an evaluator with an `Accelerator` and a model of its own."""
    loss = build_loss(config.loss)
    accelerator = build_accelerator(config.train)
    model = build_model(config.model, needs_logit_bias=loss.requires_bias())
    model.clip.to(accelerator.device)
    loss.to(accelerator.device)
    labelled = config.eval.zero_shot
    return Evaluator(
        accelerator,
        model,
        config.eval,
        held_out=held_out,
        zero_shot=None if labelled is None else open_labelled(labelled, config.data, config.eval.label_key),
        loss=loss,
        max_pixels=config.data.max_pixels,
        num_workers=choose_workers(config.data.workers, accelerator.device),
    )
