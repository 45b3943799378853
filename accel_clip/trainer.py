"""A training run: build the parts, then step, log and evaluate until the end."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from accel_clip.check import check_files, check_names
from accel_clip.command_line import save_config
from accel_clip.config import Config
from accel_clip.console import Progress, say
from accel_clip.data.augmentation import evaluation_pixels
from accel_clip.data.bad_samples import BadSampleLog
from accel_clip.data.batch import Batch
from accel_clip.data.feature_cache import FeatureCache
from accel_clip.data.feature_encoding import FrozenTower, open_features
from accel_clip.data.loader import BatchPlaces, TrainingPairs, iterate
from accel_clip.data.order import Order, check_divisible
from accel_clip.data.pairs import open_pairs
from accel_clip.data.sources.resolve import open_labelled
from accel_clip.evaluation.evaluator import Evaluator
from accel_clip.export import copy_of_weights, export_model
from accel_clip.faults import NonFiniteError, exit_code_of
from accel_clip.faults import describe as describe_error
from accel_clip.losses.base import build_loss, total
from accel_clip.losses.gradient import warn_of_dense_logits
from accel_clip.meters import MeterGroup, RateMeter
from accel_clip.models.anatomy import examine
from accel_clip.models.blocks import compile_blocks, recompute_activations
from accel_clip.models.build import build_model
from accel_clip.models.freezing import freeze, freeze_unused
from accel_clip.models.training_model import (
    TrainingModel,
    clamp_logit_scale,
    keep_buffers_local,
    no_decay_names,
    share_running_statistics,
)
from accel_clip.optim.optimizers import build_optimizer, set_learning_rate
from accel_clip.optim.schedules import build_schedule
from accel_clip.plan import Workplace, choose_plan, settle_gradient_buckets
from accel_clip.processes import build_accelerator, choose_workers, describe_processes
from accel_clip.randomness import derive_seed
from accel_clip.run_folder import RunFolder
from accel_clip.step import ContrastiveStep
from accel_clip.stopping import EarlyStopping, check_metric
from accel_clip.tracking import Tracking

TRAINING_METRICS = ("loss", "lr", "logit_scale", "grad_norm", "samples_per_second", "data_time", "step_time")


@dataclass(frozen=True)
class TrainResult:
    """Where a run ended: the metrics of what it exported, its optimizer steps, and the folder that open_clip loads."""

    metrics: dict[str, float]
    num_steps: int
    export: Path


@dataclass(frozen=True)
class Candidate:
    """Weights that may be exported, and what was last measured of them."""

    weights: dict[str, Tensor]
    metrics: dict[str, float]


def train(config: Config) -> TrainResult:
    """Train a model as the settings say; the whole of `accelerate launch train.py`.

    Raises the errors of `accel_clip.faults`; nothing is written before everything has been found and built.
    """
    check_files(config)
    check_names(config)
    return Trainer(config).run()


class Trainer:
    """The parts of one run and the loop over them."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.folder = RunFolder(config.output_dir)
        self.loss = build_loss(config.loss)
        self.accelerator = build_accelerator(config.train)
        self.open_data()
        self.build_model()
        self.build_optimizer()
        self.build_evaluator()
        self.build_step()
        self.report, self.meters = MeterGroup(), MeterGroup()
        self.rate, self.progress = RateMeter("pairs/s"), Progress()
        self.step, self.stop_asked = 0, False
        self.metrics: dict[str, float] = {}
        self.best: Candidate | None = None

    def open_data(self) -> None:
        """Open the sources, hold a part out, and fix the order and the length of the run."""
        data, train = self.config.data, self.config.train
        check_divisible(train.batch_size, self.accelerator.num_processes)
        self.pairs, self.held_out = open_pairs(data, self.loss.data_columns())
        self.order = Order(len(self.pairs), train.batch_size, self.config.seed)
        self.num_steps = train.steps or max(1, train.epochs * self.order.batches_per_epoch // train.accumulate)
        self.schedule = build_schedule(self.config.optim, self.num_steps)
        self.num_workers = choose_workers(data.workers, self.accelerator.device)

    def build_model(self) -> None:
        """Build the model with the same weights in every process and freeze what is not trained."""
        torch.manual_seed(derive_seed(self.config.seed, "weights"))
        self.model = build_model(self.config.model, needs_logit_bias=self.loss.requires_bias())
        freeze(self.model.clip, self.config.model.freeze)
        freeze_unused(self.model, self.loss)
        self.anatomy = examine(self.model.clip, self.model.tokenizer)
        self.loss.to(self.accelerator.device)
        self.loss.prepare(self.model, self.accelerator)
        if self.config.train.activation_checkpointing:
            recompute_activations(self.model.clip)
        if self.config.train.compile:
            compile_blocks(self.model.clip)

    def build_optimizer(self) -> None:
        """Wrap model and optimizer; from here on every process draws dropout of its own."""
        clip = self.model.clip
        named = [*clip.named_parameters(), *((f"loss.{i}", each) for i, each in enumerate(self.loss.parameters()))]
        optimizer = build_optimizer(named, self.config.optim, no_decay_names(clip))
        self.trained = [parameter for _, parameter in named if parameter.requires_grad]
        model = keep_buffers_local(TrainingModel(self.model, self.anatomy.separate))
        self.wrapped, self.optimizer = self.accelerator.prepare(model, optimizer)
        torch.manual_seed(derive_seed(self.config.seed, "dropout", self.accelerator.process_index))

    def build_evaluator(self) -> None:
        """Read the held-out pairs and the labelled pictures, and set up what the run may stop for."""
        config = self.config
        labelled = config.eval.zero_shot
        self.evaluator = Evaluator(
            self.accelerator,
            self.model,
            config.eval,
            held_out=self.held_out,
            zero_shot=None if labelled is None else open_labelled(labelled, config.data, config.eval.label_key),
            loss=self.loss,
            max_pixels=config.data.max_pixels,
            num_workers=self.num_workers,
        )
        stop = config.stop
        if stop.metric is not None and not stop.metric.startswith("loss/"):
            check_metric(stop.metric, {*TRAINING_METRICS, *self.evaluator.metric_names()})
        self.stopping = (
            None if stop.metric is None else EarlyStopping(stop.metric, stop.mode, stop.patience, stop.min_delta)
        )

    def build_step(self) -> None:
        """Plan how a batch is cut on this machine."""
        place = Workplace(self.accelerator, self.wrapped, self.model, self.anatomy)
        settle_gradient_buckets(place)
        plan = choose_plan(place, self.config.train)
        warn_of_dense_logits(self.loss, self.config.train.batch_size, self.model.model_config["embed_dim"])
        self.contrastive_step = ContrastiveStep(self.accelerator, self.wrapped, self.loss, self.anatomy, plan)
        side, parts = self.config.cached_tower, (self.accelerator, self.wrapped, self.model, self.anatomy)
        self.frozen_tower = None if side is None else FrozenTower(side, *parts, rows=plan.micro_batch_size)

    def run(self) -> TrainResult:
        """Train to the end and export; what ends the run early is told in `STATUS.json`."""
        self.create_folder()
        try:
            self.start()
            self.evaluate()
            self.rate.reset()
            for batches in self.batches():
                self.train_step(batches)
                self.log()
                self.evaluate()
                if self.stop_asked:
                    break
            return self.finish()
        except BaseException as error:
            self.fail(error)
            raise

    def create_folder(self) -> None:
        """Create the run folder once every process has found it unused."""
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            self.folder.create()
            save_config(self.config, self.folder.config)
            self.folder.write_status("running", self.step)

    def start(self) -> None:
        """Open everything that measures the run."""
        describe_processes(self.accelerator)
        self.tracking = Tracking(self.accelerator, self.config, self.folder)
        self.bad_samples = BadSampleLog(self.folder.bad_samples, self.config.data.max_bad_fraction)
        self.features = self.open_features()
        self.progress.open(self.num_steps)

    def open_features(self) -> dict[str, FeatureCache]:
        """Return the features of the frozen tower by its side, where they are kept."""
        tower, max_pixels = self.frozen_tower, self.config.data.max_pixels
        if tower is None:
            return {}
        folder = self.folder.features / tower.side
        return {tower.side: open_features(tower, self.pairs, max_pixels, folder, self.num_workers)}

    def batches(self) -> Iterator[list[Batch]]:
        """Yield what one optimizer step takes: `train.accumulate` contrastive batches, this process's part of each."""
        accelerator, model, train = self.accelerator, self.model, self.config.train
        num_batches = self.num_steps * train.accumulate
        places = BatchPlaces(self.order, num_batches, accelerator.process_index, accelerator.num_processes)
        size, max_pixels = model.preprocess_config["size"], self.config.data.max_pixels
        pixels = evaluation_pixels(model.preprocess_config) if self.config.data.augmentation == "none" else None
        pairs = TrainingPairs(self.pairs, self.order, model.tokenizer, size, max_pixels, pixels, self.features)
        loader = iterate(pairs, places, self.config.data, self.num_workers, accelerator.device.type == "cuda")
        for _ in range(self.num_steps):
            start = time.perf_counter()
            batches = [next(loader) for _ in range(train.accumulate)]
            self.report.update("data_time", time.perf_counter() - start)
            yield batches

    def train_step(self, batches: list[Batch]) -> None:
        """Take one optimizer step on the average gradient of the batches."""
        self.wrapped.train()
        self.meters.update("lr", set_learning_rate(self.optimizer, self.schedule.multiplier(self.step)))
        for batch in batches:
            self.bad_samples.meet(batch.bad_samples, self.config.train.batch_size)
            with self.accelerator.accumulate(self.wrapped):
                terms = self.contrastive_step(batch)
                self.report.update("loss", total(terms))
                self.report.update_all({f"loss/{name}": value for name, value in terms.items()})
                if self.accelerator.sync_gradients:
                    limit = self.config.optim.grad_clip or math.inf
                    self.report.update("grad_norm", self.accelerator.clip_grad_norm_(self.trained, limit))
                    self.agree()
                self.optimizer.step()
                self.optimizer.zero_grad()
        clamp_logit_scale(self.model.clip, self.config.train.max_logit_scale)
        self.step += 1
        self.rate.update(self.config.train.batch_size * len(batches))
        self.progress.advance()

    def agree(self) -> None:
        """Bring the processes' reports of a step together, in one reduction before the weights change."""
        self.report.add("num_bad_samples", len(self.bad_samples.pending))
        agreed = self.report.reduce(self.accelerator)
        if agreed.pop("num_bad_samples"):
            self.bad_samples.collect(self.accelerator)
        self.require_finite(agreed)
        self.meters.update_all(agreed)

    def log(self) -> None:
        """Write a point when one is due: means over the steps since the last one, over all processes."""
        self.bad_samples.check(self.ends_epoch())
        if not self.is_due(self.config.track.every):
            return
        point = self.meters.averages()
        samples_per_second = self.rate.rate
        point |= {
            "samples": self.step * self.samples_per_step,
            "epoch": self.epochs_after(self.step),
            "logit_scale": self.model.clip.logit_scale.detach().exp().item(),
            "samples_per_second": samples_per_second,
            "step_time": self.samples_per_step / samples_per_second - point["data_time"],
        }
        self.rate.reset()
        self.progress.show(point)
        self.record(point)

    def require_finite(self, agreed: dict[str, float]) -> None:
        """Raise `NonFiniteError` for a loss or gradient that is not a number, before it reaches the weights.

        In fp16 a gradient that overflows is met by lowering its scale; it is lost only when the scale has no room left.
        """
        scaler = self.accelerator.scaler
        gradient_is_lost = not math.isfinite(agreed["grad_norm"]) if scaler is None else scaler.get_scale() < 1
        if gradient_is_lost or not math.isfinite(agreed["loss"]):
            raise NonFiniteError(
                f"step {self.step + 1}: loss {agreed['loss']}, gradient norm {agreed['grad_norm']}: lower optim.lr, "
                "lengthen optim.warmup, or set train.precision to bf16 or no"
            )

    def evaluate(self) -> None:
        """Evaluate when it is due: at step 0, every `eval.every` steps or once an epoch, and at the end."""
        if not self.evaluation_is_due():
            return
        share_running_statistics(self.model.clip)
        with self.rate.paused():
            self.metrics = self.evaluator.run()
            self.progress.report(self.step, self.metrics)
            self.tracking.log_picture(self.step, "retrieval", self.evaluator.picture_grid)
            self.record(self.metrics)

    def record(self, point: dict[str, float]) -> None:
        """Write a point to every tracker, and see whether it is the best one or the last one needed."""
        self.tracking.log(self.step, point)
        if self.stopping is not None:
            verdict = self.stopping.update(point, self.step)
            self.stop_asked |= verdict.should_stop
            if verdict.is_best:
                self.best = Candidate(copy_of_weights(self.model), point)

    def finish(self) -> TrainResult:
        """Export the best or the last weights and close what is open."""
        chosen = self.best or Candidate(copy_of_weights(self.model), self.metrics)
        if self.accelerator.is_main_process:
            export_model(self.folder.export, self.model, chosen.weights, chosen.metrics)
            self.folder.write_status("complete", self.step, exit_code=0)
        self.progress.close()
        self.tracking.close()
        if self.bad_samples.counts:
            say(f"unusable samples: {self.bad_samples.summary()}; listed in {self.folder.bad_samples}")
        self.accelerator.end_training()
        return TrainResult(chosen.metrics, self.step, self.folder.export)

    def fail(self, error: BaseException) -> None:
        """Write down why the run ended early."""
        self.progress.close()
        known_to_all = getattr(error, "on_every_process", True)
        if self.accelerator.is_main_process or not known_to_all:
            self.folder.write_failure(self.step, exit_code_of(error), describe_error(error))

    @property
    def samples_per_step(self) -> int:
        """Return the pairs that one optimizer step sees over all processes."""
        return self.config.train.batch_size * self.config.train.accumulate

    def epochs_after(self, step: int) -> float:
        """Return how many epochs have passed after a step."""
        return step * self.config.train.accumulate / self.order.batches_per_epoch

    def ends_epoch(self) -> bool:
        """Return whether the last step was the first to reach another epoch's end."""
        return int(self.epochs_after(self.step)) > int(self.epochs_after(self.step - 1))

    def evaluation_is_due(self) -> bool:
        """Return whether the model is evaluated after this step."""
        if self.step == 0 or self.is_last() or self.stop_asked:
            return True
        every = self.config.eval.every
        return self.ends_epoch() if every is None else self.is_due(every)

    def is_last(self) -> bool:
        """Return whether no step is left."""
        return self.step == self.num_steps

    def is_due(self, every: int) -> bool:
        """Return whether something done every so many steps, and at the end, is done after this one."""
        return self.step % every == 0 or self.is_last()
