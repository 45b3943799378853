"""A training run: build the parts, then step, log and evaluate until the end."""

from __future__ import annotations

import math
import time
from collections.abc import Generator
from contextlib import ExitStack, closing, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from torch import nn

from accel_clip.checkpoint.contents import check_run
from accel_clip.checkpoint.find import find_best
from accel_clip.checkpoint.manifest import Checkpoint
from accel_clip.checkpoint.run_state import RunState
from accel_clip.checkpoint.saver import Saver
from accel_clip.command_line import save_config
from accel_clip.config import Config, TrainConfig
from accel_clip.console import is_first_process, say
from accel_clip.data.batch import Batch
from accel_clip.data.caches.feature_encoding import FrozenTower, open_features
from accel_clip.data.caches.features import FeatureCache
from accel_clip.data.caches.picture_building import open_pictures
from accel_clip.data.caches.pictures import PictureCache
from accel_clip.data.examples import preparation_for
from accel_clip.data.feed_parts import LoaderRank
from accel_clip.faults import (
    INTERRUPTED_EXIT_CODE,
    NonFiniteError,
    PeerEnded,
    Preempted,
    exit_code_of,
    reached,
    recognised,
)
from accel_clip.faults import describe as describe_error
from accel_clip.losses.base import total
from accel_clip.models.export import ExportedModel, exported_model, model_in, read_metrics, write_export
from accel_clip.models.training_model import clamp_logit_scale, share_running_statistics
from accel_clip.optim.optimizers import set_learning_rate
from accel_clip.process.accelerator import (
    describe_processes,
    known_to_all,
    own_command,
    process_as_found,
)
from accel_clip.process.signals import StopAsked, StopSignals
from accel_clip.process.terminal import lasting_output
from accel_clip.process.waiting import Lookout
from accel_clip.process.watchdog import Watchdog
from accel_clip.run.folder import RunFolder
from accel_clip.run.health import (
    WAYS_OUT,
    describe_non_finite,
    gathered_samples,
    is_finite,
    rate_warning,
    warn_of_collapse,
)
from accel_clip.run.hooks import Hooks
from accel_clip.run.inputs import Inputs
from accel_clip.run.logbook import Logbook
from accel_clip.run.parts import build_run
from accel_clip.run.preconditions import Start, check_names, prepare
from accel_clip.run.tracking import quiet_writer
from accel_clip.step.contrastive import ContrastiveStep
from accel_clip.step.plan import choose_plan, kept_plan, plan_state
from accel_clip.typed import fit

SECONDS_FOR_A_SERVER = 600.0


@dataclass(frozen=True)
class TrainResult:
    """Where a run ended: the metrics of what it exported, its optimizer steps, and the folder that open_clip loads."""

    metrics: dict[str, float]
    num_steps: int
    export: Path


class RolledBack(Exception):
    """A step was not finite, and the run stands at its last checkpoint again."""


@lasting_output()
@process_as_found()
def train(config: Config) -> TrainResult:
    """Train a model as the settings say, or go on with the run in `output_dir`; all of `accelerate launch train.py`.

    Raises the errors of `accel_clip.faults`; nothing is written before everything has been found and built. A run that
    is complete is left as it is. Threads and TF32, which are set for the whole process, are given back at the end.
    """
    return train_from(prepare(config))


@lasting_output()
@process_as_found()
def train_from(start: Start) -> TrainResult:
    """Train as a start says that has been looked at already, or return where its run ended."""
    folder = RunFolder(start.config.output_dir)
    if is_first_process():
        folder.tidy()
    if start.decision.kind == "complete":
        return finished_result(folder)
    check_names(start.config, start.decision.described)
    start.decision.say_changes(folder.path)
    with folder.lock:
        if is_first_process() and folder.path.exists():
            folder.own()
        try:
            trainer = Trainer(start, folder)
        except KeyboardInterrupt:
            folder.note_interrupted_start()
            raise
        return trainer.run()


def finished_result(folder: RunFolder) -> TrainResult:
    """Return where a complete run ended."""
    return TrainResult(read_metrics(folder.export), folder.read_status()["step"], folder.export)


def timeout_of(config: TrainConfig, num_processes: int, has_streams: bool) -> float | None:
    """Return after how many seconds without progress a process ends itself, None for never.

    While one waits for a server, which may ask for minutes, the others wait for it, and none of them hangs. Nobody
    waits for a process that runs alone: it may have patience with a disk on the network too.
    """
    if config.timeout is None:
        return None
    return max(config.timeout, SECONDS_FOR_A_SERVER) if has_streams or num_processes == 1 else config.timeout


class Trainer:
    """The parts of one run and the loop over them."""

    def __init__(self, start: Start, folder: RunFolder) -> None:
        self.config, self.folder = start.config, folder
        self.command = own_command()  # now, while the launcher that it names is alive
        parts = build_run(start)
        self.loss, self.accelerator, self.model = parts.loss, parts.accelerator, parts.model
        self.assembly, self.lacks_weights = parts.assembly, parts.lacks_weights
        self.sources, self.held_out, self.feed = parts.data.named, parts.data.held_out, parts.data.feed
        self.timetable, self.schedule, self.num_workers = parts.data.timetable, parts.data.schedule, parts.num_workers
        self.evaluator = parts.evaluator
        self.hooks = Hooks(self.config, self.model, self.accelerator)
        self.saver = self.build_saver()
        self.logbook = Logbook(self.config, self.accelerator, self.folder, self.num_workers)
        self.state, self.must_save, self.must_stop = RunState(), False, False
        self.found = self.restore()
        self.build_step()

    def build_saver(self) -> Saver:
        """Return what saves the run and puts it back."""
        config = self.config
        parts = nn.ModuleDict({"clip": self.model.clip, "loss": nn.ParameterList(self.loss.parameters())})
        goes_past = config.train.non_finite == "rollback"
        look = partial(check_run, batches_per_step=config.train.accumulate, is_exact=not goes_past)
        optimizer = self.assembly.optimizer
        return Saver(self.accelerator, self.folder.checkpoints, config.checkpoint, parts, optimizer, look)

    def restore(self) -> Checkpoint | None:
        """Put the run into the state of its checkpoint and return that, None where there is none."""
        self.saved_step: int | None = None
        found = self.saver.find()
        self.saver.check_space()
        self.read_inputs(found)
        if found is None:
            self.folder.require_no_checkpoint()
            if self.lacks_weights is not None:
                raise self.lacks_weights
        else:
            self.load_state(found)
            self.feed.load_state_dict(self.saved["data"])
            self.saved_step = found.step
            if self.saver.is_own(found) and self.logbook.stopping.best_step == found.step:
                self.saver.point_to_best(found.step)
            say(f"going on from {found.path}")
        return found

    def read_inputs(self, found: Checkpoint | None) -> None:
        """Take down what the settings name by path, on the first process; raise `ConfigError` when it has changed."""
        self.inputs: Inputs | None = None
        with known_to_all(self.accelerator):
            if self.accelerator.is_main_process:
                self.inputs = Inputs(self.config, self.sources)
                if found is not None:
                    self.inputs.require_same_as_in(found)

    def load_state(self, found: Checkpoint) -> None:
        """Take over what a checkpoint holds beside the place in the data."""
        self.saved = self.saver.restore(found)
        self.state = fit(self.saved["run"], RunState, "run")
        self.logbook.load_state_dict(self.saved)
        self.hooks.load_state_dict(self.saved)
        if not self.saver.is_own(found):
            self.logbook.bad_samples.forget_list()

    def state_dict(self) -> dict[str, Any]:
        """Return everything beside weights that makes a resumed run the uninterrupted one, as plain JSON."""
        return {
            "run": self.state.to_dict(),
            "data": self.feed.state_dict(),
            **self.logbook.state_dict(),
            **self.hooks.state_dict(),
            "config": self.config.to_dict(),
            "model": {
                "model_config": self.model.model_config,
                "preprocess_config": self.model.preprocess_config,
                "towers": self.model.towers,
            },
            "plan": plan_state(self.assembly.place, self.config.train, self.contrastive_step.plan),
            "file_sizes": self.folder.file_sizes(),
            "inputs": None if self.inputs is None else self.inputs.state_dict(),
        }

    def build_step(self) -> None:
        """Plan how a batch is cut on this machine; a run that goes on keeps its plan, and so its last bits."""
        place, train = self.assembly.place, self.config.train
        plan = None if self.found is None else kept_plan(place, train, self.saved["plan"])
        plan = plan or choose_plan(place, train)
        parallel, anatomy = self.assembly.parallel, self.assembly.anatomy
        self.contrastive_step = ContrastiveStep(parallel, self.loss, anatomy, plan)
        side, parts = self.config.cached_tower, (parallel, self.model, anatomy)
        self.frozen_tower = None if side is None else FrozenTower(side, *parts, rows=plan.micro_batch_size)

    def run(self) -> TrainResult:
        """Train to the end and export; what ends the run early is told in `STATUS.json`."""
        with ExitStack() as self.opened, StopSignals(self.note_interruption) as self.signals, self.build_watchdog():
            try:
                with recognised():
                    self.create_folder()
                    self.prepare_data()
                    self.start()
                    while not self.timetable.is_over(self.state):
                        self.go_one_step()
                    return self.finish()
            except BaseException as error:
                ended_by = self.told(error)
                self.fail(ended_by)
                if ended_by is error:
                    raise
                raise ended_by from error

    def build_watchdog(self) -> Watchdog:
        """Return what ends this process when it hangs, and how work between two steps is watched."""
        num_processes = self.accelerator.num_processes
        timeout = timeout_of(self.config.train, num_processes, bool(self.feed.streams))
        computed = {"computed": time.process_time} if num_processes == 1 else {}
        self.watchdog = Watchdog(timeout, self.note_hang, **computed)
        self.lookout = Lookout(lambda: self.signals.asked is not None, self.watchdog.patient)
        return self.watchdog

    def create_folder(self) -> None:
        """Create the run folder once every process is ready to go."""
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            self.folder.create()
            if self.found is None:
                self.folder.require_no_checkpoint()
            self.folder.cut_files(self.saver.file_sizes(self.found))
            save_config(self.config, self.folder.config)
            if self.inputs is not None:
                self.inputs.keep(self.folder.checkpoints)
            self.folder.write_status("running", self.state.step, command=self.command)

    def prepare_data(self) -> None:
        """Say what the run trains on, and compute what is computed once."""
        describe_processes(self.accelerator)
        if (mixed := self.feed.describe()) is not None:
            say(mixed)
        if self.feed.streams and self.held_out is None:
            say("nothing is held out of a stream: name data.val to see how good the model gets")
        if (high := rate_warning(self.config)) is not None:
            say(f"warning: {high}")
        try:
            self.features = self.open_features()
            self.pictures = self.open_pictures()
        except StopAsked:
            self.stop()

    def start(self) -> None:
        """Open everything that measures the run, and evaluate the model as it is."""
        self.opened.enter_context(quiet_writer())
        self.logbook.open(self.timetable.num_steps, self.state, resumed=self.found is not None)
        self.loader = self.open_loader()
        if self.found is not None:
            self.saver.restore_random(self.found, self.config.seed)
        self.evaluate()
        if self.logbook.is_best or (self.config.train.non_finite == "rollback" and self.found is None):
            self.save()
        self.stop_if_asked()
        self.logbook.rate.reset()
        self.watchdog.beat("start")

    def go_one_step(self) -> None:
        """Take one optimizer step and do what is due after it."""
        try:
            self.train_step(self.next_batches())
        except RolledBack:
            return
        self.signals.may_interrupt = False  # from here on there is something to lose
        reached("step", self.state.step)
        self.watchdog.beat_step(self.state.step)
        self.hooks.after_step(self.state, self.feed.epochs(self.state.next_batch), self.logbook.meters.last())
        self.log()
        self.evaluate()
        if self.must_save or self.logbook.is_best:
            self.save()
        self.stop_if_asked()

    def stop_if_asked(self) -> None:
        """Stop when a process was asked to, as all know."""
        if self.must_stop:
            self.stop()

    def stop(self) -> NoReturn:
        """Save the run and raise `Preempted`; collective."""
        self.signals.may_interrupt = False
        self.save()
        self.saver.finish()
        raise Preempted(self.state.step)

    def open_features(self) -> dict[str, FeatureCache]:
        """Return the features of the frozen tower by its side, where they are kept."""
        tower, pairs, max_pixels = self.frozen_tower, self.feed.source, self.config.data.max_pixels
        if tower is None or pairs is None:
            return {}
        folder = self.folder.features / tower.side
        return {tower.side: open_features(tower, pairs, max_pixels, folder, self.num_workers, self.lookout)}

    def open_pictures(self) -> PictureCache | None:
        """Return the decoded pictures, where they are kept."""
        pairs = self.feed.source
        if not self.config.data.image_cache_gib or pairs is None:
            return None
        parts = (self.accelerator, pairs, self.model, self.config)
        return open_pictures(*parts, self.folder.pictures, self.num_workers, self.lookout)

    def open_loader(self) -> Generator[Batch, None, None]:
        """Return this process's part of the contrastive batches that are left."""
        accelerator = self.accelerator
        on_cuda = accelerator.device.type == "cuda"
        seat = LoaderRank(accelerator.process_index, accelerator.num_processes, self.num_workers, on_cuda)
        preparation = preparation_for(self.model, self.config, self.features, self.pictures)
        batches = self.feed.open(self.timetable.batches_left(self.state), seat, preparation)
        return self.opened.enter_context(closing(batches))

    def next_batches(self) -> list[Batch]:
        """Return what one optimizer step takes: `train.accumulate` contrastive batches, this process's part of each."""
        start = time.perf_counter()
        alone, places = self.accelerator.num_processes == 1, self.feed.places()
        try:
            with self.signals.raising() if alone else nullcontext():
                batches = [next(self.loader) for _ in range(self.config.train.accumulate)]
        except StopAsked:
            self.feed.return_to(places)
            self.stop()
        self.logbook.report.update("data_time", time.perf_counter() - start)
        return batches

    def train_step(self, batches: list[Batch]) -> None:
        """Take one optimizer step on the average gradient of the batches, unless it is not finite."""
        logbook, rate = self.logbook, self.schedule.multiplier(self.state.step)
        self.assembly.parallel.model.train()
        logbook.meters.update("lr", set_learning_rate(self.assembly.optimizer, rate))
        for batch in batches:
            logbook.meet(batch)
            with self.assembly.parallel.accumulating():
                terms = self.contrastive_step(batch)
                logbook.report.update("loss", total(terms))
                logbook.report.update_all({f"loss/{name}": value for name, value in terms.items()})
                if not self.assembly.parallel.completes_step or self.may_step(batches):
                    self.assembly.optimizer.step()
                self.assembly.optimizer.zero_grad()
        clamp_logit_scale(self.model.clip, self.config.train.max_logit_scale)
        self.state.step += 1
        self.state.next_batch += len(batches)
        logbook.rate.update(self.config.train.batch_size * len(batches))
        logbook.progress.advance()

    def may_step(self, batches: list[Batch]) -> bool:
        """Bring the processes' reports of a step together, before the weights change, and say whether they may."""
        limit = self.config.optim.grad_clip or math.inf
        self.logbook.report.update("grad_norm", self.accelerator.clip_grad_norm_(self.assembly.trained, limit))
        agreed = self.agree()
        if is_finite(agreed, self.accelerator.scaler):
            self.state.num_non_finite = 0
            self.logbook.meters.update_all(agreed)
            return True
        self.meet_non_finite(agreed, batches)
        return self.accelerator.scaler is not None  # which leaves such a step out itself, and lowers its scale

    def agree(self) -> dict[str, float]:
        """Return what all processes measured in this step, and act on what one of them asks for: one reduction."""
        logbook = self.logbook
        asked = {
            "num_bad_samples": len(logbook.bad_samples.pending),
            "num_to_save": self.saver.is_due(self.state.step + 1),
            "num_failed_saves": self.saver.has_failed(),
            "num_to_stop": self.signals.asked is not None,
        }
        for name, number in asked.items():
            logbook.report.add(name, float(number))
        agreed = logbook.report.reduce(self.accelerator)
        logbook.count(agreed, self.state)
        if agreed.pop("num_bad_samples"):
            logbook.bad_samples.collect(self.accelerator)
        if agreed.pop("num_failed_saves"):
            self.saver.finish()
        self.must_save, self.must_stop = agreed.pop("num_to_save") > 0, agreed.pop("num_to_stop") > 0
        return agreed

    def meet_non_finite(self, agreed: dict[str, float], batches: list[Batch]) -> None:
        """Stop, leave the step out, or go back, as `train.non_finite` says; the weights are those before the step."""
        policy, limit = self.config.train.non_finite, self.config.train.non_finite_limit
        samples = gathered_samples(self.accelerator, batches)
        problem = describe_non_finite(self.state.step + 1, agreed, samples)
        self.state.num_non_finite += 1
        if policy == "stop" or self.state.num_non_finite > limit:
            raise NonFiniteError(f"{problem}; {WAYS_OUT}")
        if policy == "skip":
            say(f"warning: {problem}; the step is left out")
            self.logbook.meters.update("data_time", agreed.pop("data_time"))
            self.logbook.meters.update_all(dict.fromkeys(agreed, 0.0), n=0)  # known names without a value
            return
        self.roll_back(problem)

    def roll_back(self, problem: str) -> None:
        """Put the run back to its last checkpoint, past the batches of this step; always raises `RolledBack`."""
        past = self.state.next_batch + self.config.train.accumulate
        before = self.state
        self.assembly.optimizer.zero_grad()
        self.saver.finish()
        found = self.saver.find()
        assert found is not None, "a run that may be rolled back is saved at its start"
        self.load_state(found)
        self.saver.restore_random(found, self.config.seed)
        self.state.next_batch, self.state.num_non_finite = past, before.num_non_finite
        self.state.num_pairs, self.state.num_cut_captions = before.num_pairs, before.num_cut_captions
        say(f"warning: {problem}; back to step {self.state.step}, past that batch")
        if self.accelerator.is_main_process:
            self.folder.cut_files(self.saver.file_sizes(found))
        self.loader.close()
        self.loader = self.open_loader()
        self.logbook.progress.open(self.timetable.num_steps, self.state.step)
        raise RolledBack

    def log(self) -> None:
        """Write a point when one is due, and look at an epoch's end what of the data was of no use."""
        ends_epoch = self.timetable.ends_epoch(self.state)
        self.logbook.bad_samples.check(ends_epoch)
        if ends_epoch and not self.timetable.is_over(self.state):
            self.logbook.tell_cut_captions(self.state, self.context_length)
        if self.timetable.is_due(self.state, self.config.track.every):
            facts = {
                "epoch": self.feed.epochs(self.state.next_batch),
                "logit_scale": self.model.clip.logit_scale.detach().exp().item(),
                "checkpoint_share": self.saver.share_of_time(),
            }
            self.logbook.log(self.state, facts)

    def evaluate(self) -> None:
        """Evaluate when it is due: at step 0, every `eval.every` steps or once an epoch, and at the end."""
        if not self.timetable.evaluation_is_due(self.state):
            return
        self.watchdog.patient("evaluation")
        share_running_statistics(self.model.clip)
        with self.logbook.rate.paused():
            try:
                self.state.metrics = self.evaluator.run(self.lookout)
            except StopAsked:  # it is made up for when the run goes on
                self.must_stop = True
                return
            self.state.evaluated_step = self.state.step
            self.logbook.progress.report(self.state.step, self.state.metrics)
            warn_of_collapse(self.state.step, self.evaluator.mean_cosines)
            self.logbook.tracking.log_picture(self.state.step, "retrieval", self.evaluator.picture_grid)
            self.logbook.record(self.state, self.state.metrics)
            self.hooks.after_evaluation(self.state, self.feed.epochs(self.state.next_batch))

    def save(self) -> None:
        """Save the run as it stands after this step, unless that is done."""
        if self.saved_step == self.state.step and not self.logbook.is_best:
            return
        self.watchdog.patient("checkpoint")
        with self.logbook.rate.paused():
            share_running_statistics(self.model.clip)
            self.saver.save(self.state.step, self.state_dict(), self.logbook.is_best)
        self.saved_step, self.logbook.is_best, self.must_save = self.state.step, False, False

    def finish(self) -> TrainResult:
        """Save the end of the run, export the best or the last weights and close what is open."""
        self.stop_if_asked()
        self.save()
        self.saver.finish()
        exported = self.chosen()
        if self.accelerator.is_main_process:
            write_export(self.folder.export, exported)
        self.logbook.close(self.state, self.context_length)
        if self.accelerator.is_main_process:
            self.folder.write_status("complete", self.state.step, exit_code=0)
        self.accelerator.end_training()
        return TrainResult(dict(exported.metrics), self.state.step, self.folder.export)

    def chosen(self) -> ExportedModel:
        """Return the weights to export and what was measured of them: the best ones, or the last."""
        best = find_best(self.folder.checkpoints, check_run) if self.config.stop.metric is not None else None
        if best is None or self.state.best_metrics is None:
            return exported_model(self.model, self.state.metrics)
        return model_in(best, is_best=True)

    def told(self, error: BaseException) -> BaseException:
        """Return what ends the run: an interruption where all were asked and this process did not hear it first.

        One that meets a run as it was saved has lost nothing, and is as good as a stop.
        """
        is_asked, may_interrupt = self.signals.asked is not None, self.signals.may_interrupt
        self.signals.may_interrupt = False
        if isinstance(error, PeerEnded) and is_asked and may_interrupt:
            error = KeyboardInterrupt()
        self.saver.settle()
        is_saved = self.saved_step == self.state.step and not self.saver.has_failed()
        return Preempted(self.state.step) if isinstance(error, KeyboardInterrupt) and is_saved else error

    def fail(self, error: BaseException) -> None:
        """Write down why the run ended early."""
        self.logbook.progress.close()
        self.saver.settle()
        known_to_all = getattr(error, "on_every_process", False)
        if self.accelerator.is_main_process or not known_to_all:
            state = "preempted" if isinstance(error, (Preempted, KeyboardInterrupt)) else "failed"
            self.folder.write_end(state, self.state.step, exit_code_of(error), describe_error(error), self.command)

    def note_interruption(self) -> None:
        """Write down that the run was stopped, before a process that does not hear of it is ended."""
        self.folder.write_end("preempted", self.state.step, INTERRUPTED_EXIT_CODE, "interrupted", self.command)

    def note_hang(self, message: str) -> None:
        """Write down that the run hangs, before the watchdog ends this process."""
        self.folder.write_end("failed", self.state.step, 1, message, self.command)

    @property
    def context_length(self) -> int:
        """Return how many tokens of a caption the model reads."""
        return int(self.model.tokenizer.context_length)  # type: ignore[attr-defined]
