"""The parts of a run, built as the trainer does, with every setting that does not fit and without a run folder."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from accel_clip.config import Config, OptimConfig, TrainConfig
from accel_clip.data.feed import Feed, build_feed
from accel_clip.data.order import check_divisible
from accel_clip.data.pairs import PairsOfRun, open_training
from accel_clip.data.sources.base import Source
from accel_clip.data.sources.resolve import open_item, open_labelled, open_source
from accel_clip.evaluation.evaluator import Evaluator
from accel_clip.faults import AccelClipError
from accel_clip.losses.base import Loss, build_loss
from accel_clip.models.anatomy import Anatomy
from accel_clip.models.build import ClipModel
from accel_clip.models.freezing import freeze
from accel_clip.optim.optimizers import parameter_groups
from accel_clip.optim.schedules import Schedule, build_schedule
from accel_clip.process.accelerator import build_accelerator, choose_workers
from accel_clip.randomness import derive_seed
from accel_clip.run.problems import Problems
from accel_clip.run.rebuilding import build_for_run
from accel_clip.run.stopping import check_metric
from accel_clip.run.tracking import TRAINING_METRICS
from accel_clip.step.assembly import assemble
from accel_clip.step.chunks import Plan
from accel_clip.step.plan import ModelTrial, choose_plan


@dataclass(frozen=True)
class DataParts:
    """Where the pairs of a run come from and how long it is; num_shared: of held-out ones, how many are trained on."""

    feed: Feed
    held_out: Source | None
    schedule: Schedule
    num_shared: int

    @property
    def num_pairs(self) -> int | None:
        """Return how many pairs there are to train on, None where streams bring some."""
        return None if self.feed.source is None else len(self.feed.source)


@dataclass(frozen=True)
class Parts:
    """What a run is made of; `wrapped` and `optimizer` are prepared by the accelerator."""

    config: Config
    num_processes: int
    accelerator: Accelerator
    loss: Loss
    data: DataParts
    model: ClipModel
    anatomy: Anatomy
    wrapped: nn.Module
    optimizer: Any
    plan: Plan
    num_workers: int

    @property
    def place(self) -> ModelTrial:
        """Return what a trial of the model needs."""
        return ModelTrial(self.accelerator, self.wrapped, self.model, self.anatomy)

    @property
    def pairs_per_process(self) -> int:
        """Return one process's part of a contrastive batch."""
        return self.config.train.batch_size // self.num_processes


def build_parts(config: Config, num_processes: int, problems: Problems, index_folder: Path) -> Parts | None:
    """Return the parts of a run, or None after taking in everything that keeps them from being built.

    index_folder: where the indexes of shards are kept that are not there yet.
    """
    loss = problems.attempt(partial(build_loss, config.loss))
    accelerator = problems.attempt(partial(build_accelerator, config.train))
    labelled = open_zero_shot(config, problems, index_folder)
    opened = open_everything(config, () if loss is None else loss.data_columns(), problems, index_folder)
    data = build_data(opened, config, num_processes, problems)
    model = build_frozen_model(config, loss, problems)
    if model is not None:
        check_rates(config.optim, model, problems)
    if problems or loss is None or accelerator is None or data is None or model is None:
        return None
    check_evaluation(config, accelerator, loss, data, model, labelled, problems)
    assemble = partial(assembled, config, num_processes, accelerator, loss, data, model)
    return None if problems else problems.attempt(assemble)


def build_data(opened: PairsOfRun | None, config: Config, num_processes: int, problems: Problems) -> DataParts | None:
    """Return the pairs, their order and the schedule."""
    if problems.concern("train.batch_size"):
        return None
    train = config.train
    problems.attempt(partial(check_divisible, train.batch_size, num_processes))
    if opened is None:
        return None
    if train.batch_size % num_processes:
        num_processes = 1  # what else is wrong shows with any number
    feed = problems.attempt(partial(build_feed, opened, config, num_processes))
    num_steps = None if feed is None else problems.attempt(partial(feed.num_steps, train))
    if feed is None or num_steps is None:
        return None
    schedule = problems.attempt(partial(build_schedule, config.optim, num_steps))
    return None if schedule is None else DataParts(feed, opened.held_out, schedule, opened.num_shared)


def open_zero_shot(config: Config, problems: Problems, index_folder: Path) -> Source | None:
    """Return the labelled pictures, None without any or where they cannot be opened, which is taken in."""
    named = config.eval.zero_shot
    if named is None:
        return None
    return problems.attempt(partial(open_labelled, named, config.data, config.eval.label_key, index_folder))


def open_everything(
    config: Config, extra: tuple[str, ...], problems: Problems, index_folder: Path
) -> PairsOfRun | None:
    """Return the training and the held-out pairs; where that fails each source is opened alone to find every reason."""
    data = config.data
    try:
        return open_training(data, extra, index_folder)
    except AccelClipError as error:
        before = len(problems)
        for item in data.train:
            problems.attempt(partial(open_item, item, data, extra, index_folder))
        for item in data.val or []:
            problems.attempt(partial(open_source, item, data, index_folder=index_folder))
        if len(problems) == before:
            problems.add(error)
        return None


def build_frozen_model(config: Config, loss: Loss | None, problems: Problems) -> ClipModel | None:
    """Return the model with what the settings freeze frozen; every pattern without a match is taken in."""
    torch.manual_seed(derive_seed(config.seed, "weights"))
    needs_bias = loss is not None and loss.requires_bias()
    built = problems.attempt(partial(build_for_run, config, needs_logit_bias=needs_bias))
    model = None if built is None else built[0]
    if model is not None:
        for pattern in config.model.freeze:
            problems.attempt(partial(freeze, model.clip, [pattern]))
    return model


def check_rates(config: OptimConfig, model: ClipModel, problems: Problems) -> None:
    """Take in every pattern of `optim.lr_by_name` that decides nothing."""
    named = list(model.clip.named_parameters())
    for pattern, rate in config.lr_by_name.items():
        problems.attempt(partial(parameter_groups, named, OptimConfig(lr_by_name={pattern: rate})))


def check_evaluation(
    config: Config,
    accelerator: Accelerator,
    loss: Loss,
    data: DataParts,
    model: ClipModel,
    labelled: Source | None,
    problems: Problems,
) -> None:
    """Take in what keeps held-out pairs and labelled pictures from being measured, and a metric that is not."""
    evaluator = problems.attempt(
        lambda: Evaluator(
            accelerator,
            model,
            config.eval,
            held_out=data.held_out,
            zero_shot=labelled,
            loss=loss,
            max_pixels=config.data.max_pixels,
            num_workers=0,
        )
    )
    metric = config.stop.metric
    if evaluator is not None and metric is not None and not metric.startswith("loss/"):
        problems.attempt(partial(check_metric, metric, {*TRAINING_METRICS, *evaluator.metric_names()}))


def assembled(
    config: Config, num_processes: int, accelerator: Accelerator, loss: Loss, data: DataParts, model: ClipModel
) -> Parts:
    """Return the parts, put together in the trainer's order; raises what does not fit."""
    put = assemble(config, accelerator, loss, model)
    plan = choose_plan(put.place, own_part(config.train, num_processes))
    workers = choose_workers(config.data.workers, accelerator.device)
    if config.data.workers is None:
        workers = max(1, workers // num_processes)
    wrapped, optimizer = put.wrapped, put.optimizer
    return Parts(
        config,
        num_processes,
        accelerator,
        loss,
        data,
        model,
        put.anatomy,
        wrapped,
        optimizer,
        plan,
        num_workers=workers,
    )


def own_part(config: TrainConfig, num_processes: int) -> TrainConfig:
    """Return the settings of one process of several, as they are for a process alone."""
    return replace(config, batch_size=config.batch_size // num_processes)
