"""What a run is made of, built in one order: by training, which ends at the first error, and by a check of them all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator

from accel_clip.config import Config, OptimConfig, require
from accel_clip.data.feed import Feed, build_feed
from accel_clip.data.order import check_divisible
from accel_clip.data.pairs import PairsOfRun, open_training
from accel_clip.data.sources.base import Source
from accel_clip.data.sources.resolve import open_item, open_labelled, open_source
from accel_clip.evaluation.evaluator import Evaluator
from accel_clip.faults import AccelClipError
from accel_clip.losses.base import Loss, build_loss
from accel_clip.models.build import ClipModel
from accel_clip.models.freezing import freeze, require_trained
from accel_clip.optim.optimizers import parameter_groups
from accel_clip.optim.schedules import Schedule, build_schedule
from accel_clip.process.accelerator import build_accelerator, choose_workers
from accel_clip.randomness import derive_seed
from accel_clip.run.health import rate_warning
from accel_clip.run.hooks import Hooks
from accel_clip.run.preconditions import Start
from accel_clip.run.problems import Attempts
from accel_clip.run.rates import describe_lengthening
from accel_clip.run.rebuilding import build_for_run
from accel_clip.run.resume import LENGTHENS
from accel_clip.run.stopping import check_metric
from accel_clip.run.timetable import Timetable
from accel_clip.run.tracking import OWN_CLOCK, TRAINING_METRICS
from accel_clip.step.assembly import Assembly, assemble
from accel_clip.step.plan import settle_reduction


@dataclass(frozen=True)
class RunData:
    """Where the pairs of a run come from, in which order, and how long it is."""

    pairs: PairsOfRun
    """the sources, with those that are held out"""
    labelled: Source | None
    """pictures for zero-shot classification, None without any"""
    feed: Feed
    """what batches are loaded from, in the order of the run"""
    timetable: Timetable
    """which batch belongs to which step, epoch and stage"""
    schedule: Schedule
    """the learning rate of each step, and how many steps there are"""

    @property
    def held_out(self) -> Source | None:
        """Return the pairs that the run is measured on, None without any."""
        return self.pairs.held_out

    @property
    def num_pairs(self) -> int | None:
        """Return how many pairs there are to train on, None where streams bring some."""
        return None if self.feed.source is None else len(self.feed.source)

    @property
    def named(self) -> Mapping[str, Source | None]:
        """Return the sources that know their pairs by the setting that names them first."""
        return {"data.train": self.pairs.source, "data.val": self.pairs.held_out, "eval.zero_shot": self.labelled}


@dataclass(frozen=True)
class RunModel:
    """The model of a run, frozen as the settings say."""

    model: ClipModel
    """what is trained"""
    lacks_weights: AccelClipError | None
    """why it lacks its first weights, where the checkpoint of a run that goes on described it"""


@dataclass(frozen=True)
class RunParts:
    """What a run is made of, as it is before its first step or before a checkpoint is put back."""

    config: Config
    """the settings"""
    num_processes: int
    """those that train, of which a check is none"""
    loss: Loss
    """what is made smaller"""
    accelerator: Accelerator
    """device, precision and processes"""
    data: RunData
    """pairs, their order, and the length of the run"""
    model: ClipModel
    """what is trained"""
    lacks_weights: AccelClipError | None
    """as in `RunModel`"""
    assembly: Assembly
    """model, loss and optimizer as a step uses them"""
    evaluator: Evaluator
    """what measures the model"""
    hooks: Hooks
    """the user's own code that looks at the run"""
    num_workers: int
    """processes that load for each process that trains"""

    def described(self) -> Iterator[str]:
        """Yield what a run says of its data and its rates before it begins."""
        if (mixed := self.data.feed.describe()) is not None:
            yield mixed
        if self.data.feed.streams and self.data.held_out is None:
            yield "nothing is held out of a stream: name data.val to see how good the model gets"
        if (high := rate_warning(self.config)) is not None:
            yield f"warning: {high}"


def build_run(start: Start) -> RunParts:
    """Return the parts of a run of the processes that are there; collective. Raises for the first that does not fit."""
    parts = build_parts(start, None, Attempts())
    assert parts is not None, "what keeps them from being built rises"
    return parts


def build_parts(
    start: Start, num_processes: int | None, attempts: Attempts, index_folder: Path | None = None
) -> RunParts | None:
    """Return the parts of a run, or None where `attempts` has gathered what keeps them from being built.

    num_processes: those that will train, None for those that are there; index_folder: as in `SourceOptions`.
    """
    config, attempt = start.config, attempts.attempt
    loss = attempt(partial(build_loss, config.loss))
    accelerator = attempt(partial(build_accelerator, config.train))
    number = num_processes or (1 if accelerator is None else accelerator.num_processes)
    data = build_data(start, loss, number, attempts, index_folder)
    built = build_frozen_model(start, loss, attempts)
    if attempts or loss is None or accelerator is None or data is None or built is None:
        check_rates(config.optim, built, attempts)
        return None
    model, num_workers = built.model, workers_of(config, accelerator, number)
    assembly = attempt(partial(assembled, config, accelerator, loss, model))
    if assembly is None:
        check_rates(config.optim, built, attempts)
    sources = (data.held_out, data.labelled)
    evaluator = attempt(partial(build_evaluator, config, accelerator, model, loss, *sources, num_workers))
    if evaluator is not None:
        attempt(partial(check_watched, config, evaluator, number))
    hooks = attempt(partial(Hooks, config, model, accelerator))
    if attempts or assembly is None or evaluator is None or hooks is None:
        return None
    parts = (loss, accelerator, data, model, built.lacks_weights, assembly, evaluator, hooks)
    return RunParts(config, number, *parts, num_workers)


def build_data(
    start: Start, loss: Loss | None, num_processes: int, attempts: Attempts, index_folder: Path | None
) -> RunData | None:
    """Return the sources, the order of their pairs, the length of the run and its schedule."""
    config, attempt = start.config, attempts.attempt
    pairs = open_pairs(start, () if loss is None else loss.data_columns(), attempts, index_folder)
    labelled = open_zero_shot(start, attempts, index_folder)
    if attempts.concern("train.batch_size"):
        return None
    attempt(partial(check_divisible, config.train.batch_size, num_processes))
    if pairs is None:
        return None
    if config.train.batch_size % num_processes:
        num_processes = 1  # what else is wrong shows with any number
    feed = attempt(partial(build_feed, pairs, config, num_processes))
    num_steps = None if feed is None else attempt(partial(feed.num_steps, config.train))
    if feed is None or num_steps is None:
        return None
    schedule = attempt(partial(build_schedule, config.optim, num_steps))
    timetable = Timetable(config, num_steps, feed.batches_per_epoch)
    return None if schedule is None else RunData(pairs, labelled, feed, timetable, schedule)


def open_pairs(
    start: Start, extra: tuple[str, ...], attempts: Attempts, index_folder: Path | None
) -> PairsOfRun | None:
    """Return the training and the held-out pairs; where that fails each source is opened alone to find every reason.

    extra: columns of numbers that the pairs to train on must bring.
    """
    data, known = start.config.data, start.locations
    pairs = attempts.attempt(partial(open_training, data, extra, index_folder, known))
    if pairs is None:
        for item in data.train:
            attempts.attempt(partial(open_item, item, data, extra, index_folder, known))
        for item in data.val or []:
            attempts.attempt(partial(open_source, item, data, None, (), index_folder, known))
    return pairs


def open_zero_shot(start: Start, attempts: Attempts, index_folder: Path | None = None) -> Source | None:
    """Return the labelled pictures, None without any or where they cannot be opened, which `attempts` has gathered."""
    config = start.config
    named, label_key = config.eval.zero_shot, config.eval.label_key
    if named is None:
        return None
    return attempts.attempt(partial(open_labelled, named, config.data, label_key, index_folder, start.locations))


def build_frozen_model(start: Start, loss: Loss | None, attempts: Attempts) -> RunModel | None:
    """Return the model with the same weights in every process, and frozen what the settings freeze."""
    config, described = start.config, start.decision.described
    torch.manual_seed(derive_seed(config.seed, "weights"))
    needs_bias = loss is not None and loss.requires_bias()
    built = attempts.attempt(partial(build_for_run, config.model, described, needs_bias))
    if built is None:
        return None
    model, lacks_weights = built
    for pattern in config.model.freeze:
        attempts.attempt(partial(freeze, model.clip, pattern))
    attempts.attempt(partial(require_trained, model.clip, config.model.freeze))
    return RunModel(model, lacks_weights)


def check_rates(config: OptimConfig, built: RunModel | None, attempts: Attempts) -> None:
    """Try every pattern of `optim.lr_by_name` alone, where no optimizer was built that would have told."""
    if built is None:
        return
    named = list(built.model.clip.named_parameters())
    for pattern, rate in config.lr_by_name.items():
        attempts.attempt(partial(parameter_groups, named, OptimConfig(lr_by_name={pattern: rate})))


def workers_of(config: Config, accelerator: Accelerator, num_processes: int) -> int:
    """Return the loader processes per process that trains; those that are not there yet will take cores too."""
    workers = choose_workers(config.data.workers, accelerator.device)
    if config.data.workers is not None:
        return workers
    return max(1, workers * accelerator.num_processes // num_processes)


def assembled(config: Config, accelerator: Accelerator, loss: Loss, model: ClipModel) -> Assembly:
    """Return the model, the loss and the optimizer put together; from here on each process draws its own dropout."""
    assembly = assemble(config, accelerator, loss, model)
    settle_reduction(assembly.trial)
    torch.manual_seed(derive_seed(config.seed, "dropout", accelerator.process_index))
    return assembly


def build_evaluator(
    config: Config,
    accelerator: Accelerator,
    model: ClipModel,
    loss: Loss,
    held_out: Source | None,
    labelled: Source | None,
    num_workers: int,
) -> Evaluator:
    """Return what measures a model on held-out pairs and labelled pictures, whose captions and labels it reads."""
    return Evaluator(
        accelerator,
        model,
        config.eval,
        held_out=held_out,
        zero_shot=labelled,
        loss=loss,
        max_pixels=config.data.max_pixels,
        num_workers=num_workers,
    )


def lengthening(start: Start, data: RunData, step: int) -> str | None:
    """Return what becomes of the learning rate where a run that goes on after `step` has another length than before."""
    changes = start.decision.changes
    former = {key.removeprefix("train."): before for key, (before, _) in changes.items() if key in LENGTHENS}
    if not former:
        return None
    former_steps = data.feed.num_steps(replace(start.config.train, **former))
    return describe_lengthening(start.config, data.schedule, former_steps, step)


def check_watched(config: Config, evaluator: Evaluator, num_processes: int) -> None:
    """Raise `ConfigError` for a metric to watch that the run does not measure, or that each process measures alone."""
    metric = config.stop.metric
    rule = "each process measures it by its own clock: watch another metric"
    require(metric not in OWN_CLOCK or num_processes == 1, "stop.metric", metric, rule)
    if metric is not None and not metric.startswith("loss/"):
        check_metric(metric, {*TRAINING_METRICS, *evaluator.metric_names()})
