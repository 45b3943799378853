"""A training run: the loop that steps, logs, evaluates and saves until the end, and what it loops over."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from accel_clip.checkpoint.contents import check_run
from accel_clip.checkpoint.find import find_best
from accel_clip.checkpoint.run_state import RunState
from accel_clip.console import say
from accel_clip.data.batch import Batch
from accel_clip.faults import PeerEnded, Preempted, reached, recognised
from accel_clip.models.export import ExportedModel, exported_model, model_in, write_export
from accel_clip.process.accelerator import describe_processes, own_command
from accel_clip.process.signals import StopAsked, StopSignals
from accel_clip.run.agreement import Agreement, Request, agree
from accel_clip.run.caches import Caches, frozen_tower, open_caches
from accel_clip.run.evaluations import Evaluations
from accel_clip.run.folder import RunFolder
from accel_clip.run.logbook import Logbook
from accel_clip.run.non_finite import NonFinitePolicy, RolledBack
from accel_clip.run.parts import build_run, lengthening
from accel_clip.run.preconditions import Start
from accel_clip.run.resumable import Resumable, build_saver, read_inputs
from accel_clip.run.session import Session, Watch, open_session, watched
from accel_clip.run.status import RunStatus
from accel_clip.step.learner import Learner


@dataclass(frozen=True)
class TrainResult:
    """Where a run ended."""

    metrics: dict[str, float]
    """those of the model that it exported, by name"""
    num_steps: int
    """optimizer steps that it took"""
    export: Path
    """the folder that open_clip loads"""


class Trainer:
    """One run: its parts, all whole once this is built, and the loop over them."""

    def __init__(self, start: Start, folder: RunFolder) -> None:
        command = own_command()  # now, while the launcher that it names is alive
        parts = self.parts = build_run(start)
        self.config, self.folder, self.accelerator = start.config, folder, parts.accelerator
        self.feed, self.timetable = parts.data.feed, parts.data.timetable
        self.state, self.must_save, self.must_stop = RunState(), False, False
        self.logbook = Logbook(self.config, self.accelerator, folder, parts.num_workers)
        self.hooks = parts.hooks
        self.saver = build_saver(parts, folder)
        self.checkpoint = self.saver.find()
        self.saver.check_space()
        held = (self.saver, self.state, self.feed, self.logbook, self.hooks, read_inputs(parts, self.checkpoint))
        self.resumable = Resumable(self.config, folder, *held)
        saved_plan = self.resumable.begin(self.checkpoint)
        if self.checkpoint is None and parts.lacks_weights is not None:
            raise parts.lacks_weights
        self.lengthening = lengthening(start, parts.data, self.state.step)
        self.saved_step = None if self.checkpoint is None else self.checkpoint.step
        stage = self.timetable.stage(self.state)
        learns = (parts.model, parts.loss, parts.assembly, parts.data.schedule)
        self.learner = Learner(stage.config, *learns, stage.number, saved_plan)
        self.frozen_tower = frozen_tower(parts, self.learner.contrastive_step.plan.micro_batch_size)
        self.evaluations = Evaluations(parts.evaluator, self.learner, self.logbook, self.hooks)
        self.non_finite = NonFinitePolicy(self.config.train, self.learner, self.resumable)
        self.status = RunStatus(folder, self.state, command, self.accelerator.is_main_process)

    def run(self) -> TrainResult:
        """Train to the end and export; what ends the run early is told in `STATUS.json`."""
        with ExitStack() as opened, watched(self.parts, self.status) as watch:
            try:
                with recognised():
                    self.resumable.open_folder(self.checkpoint)
                    self.status.running()
                    resumed_step = None if self.checkpoint is None else self.state.step
                    asked = (self.parts, self.resumable, self.prepare_data(watch), resumed_step)
                    session = opened.enter_context(open_session(watch, *asked))
                    self.start(session)
                    while not self.timetable.is_over(self.state):
                        self.go_one_step(session)
                    return self.finish(session)
            except BaseException as error:
                ended_by = self.told(error, watch.signals)
                self.logbook.progress.close()
                self.status.ended_by(ended_by)
                if ended_by is error:
                    raise
                raise ended_by from error

    def prepare_data(self, watch: Watch) -> Caches:
        """Say what the run trains on, and compute what is computed once."""
        describe_processes(self.accelerator)
        for line in self.parts.described():
            say(line)
        if self.lengthening is not None:
            say(self.lengthening)
        try:
            return open_caches(self.parts, self.frozen_tower, self.folder, watch.lookout)
        except StopAsked:
            self.stop(watch)

    def start(self, session: Session) -> None:
        """Evaluate the model as it is, and save what a run may need before its first checkpoint."""
        self.logbook.progress.open(self.timetable.num_steps, self.state.step)
        if self.checkpoint is not None:
            self.saver.restore_random(self.checkpoint, self.config.seed)
        self.evaluate(session)
        if self.logbook.is_best or (self.config.train.non_finite == "rollback" and self.checkpoint is None):
            self.save(session.watch)
        self.stop_if_asked(session.watch)
        self.logbook.rate.reset()
        session.watch.watchdog.beat("start")

    def go_one_step(self, session: Session) -> None:
        """Take one optimizer step and do what is due after it."""
        watch = session.watch
        if session.loader.stage is not self.timetable.stage(self.state):
            self.open_stage(session)
        try:
            self.train_step(session)
        except RolledBack as rolled_back:
            self.open_stage(session, rolled_back.saved_plan)
            self.logbook.progress.open(self.timetable.num_steps, self.state.step)
            return
        watch.signals.may_interrupt = False  # from here on there is something to lose
        reached("step", self.state.step)
        watch.watchdog.beat_step(self.state.step)
        self.hooks.after_step(self.state, self.epoch, self.logbook.meters.last())
        self.log(session)
        self.evaluate(session)
        if self.must_save or self.logbook.is_best:
            self.save(watch)
        self.stop_if_asked(watch)

    def open_stage(self, session: Session, saved_plan: Mapping[str, Any] | None = None) -> None:
        """Go on with what is left of the stage that the run stands in now."""
        stage = self.timetable.stage(self.state)
        self.learner.begin_stage(stage.number, stage.config.train, saved_plan)
        session.loader.reopen(stage, self.timetable.batches_left(self.state))

    def stop_if_asked(self, watch: Watch) -> None:
        """Stop when a process was asked to, as all know."""
        if self.must_stop:
            self.stop(watch)

    def stop(self, watch: Watch) -> NoReturn:
        """Save the run and raise `Preempted`; collective."""
        watch.signals.may_interrupt = False
        self.save(watch)
        self.saver.finish()
        raise Preempted(self.state.step)

    def next_batches(self, session: Session) -> list[Batch]:
        """Return what one optimizer step takes: `train.accumulate` contrastive batches, this process's part of each."""
        start, alone = time.perf_counter(), self.accelerator.num_processes == 1
        waiting = session.watch.signals.raising() if alone else nullcontext()
        try:
            batches = session.loader.take(self.config.train.accumulate, waiting)
        except StopAsked:
            self.stop(session.watch)
        self.logbook.report.update("data_time", time.perf_counter() - start)
        return batches

    def train_step(self, session: Session) -> None:
        """Take one optimizer step on the average gradient of its batches, unless it is not finite."""
        logbook, state, batches = self.logbook, self.state, self.next_batches(session)
        for batch in batches:
            logbook.take_in(batch)
        logbook.meters.update("lr", self.learner.add_gradients(state.step, batches, logbook.report))
        agreed = self.agree(session.watch)
        if self.non_finite.accepts(agreed, batches):
            logbook.meters.update_all(agreed.means)
            self.learner.take_step()
        else:
            logbook.leave_out(agreed.means)
            self.learner.leave_step_out()
        state.step += 1
        state.next_batch += len(batches)
        logbook.rate.update(self.config.train.batch_size * len(batches))
        logbook.progress.advance()

    def agree(self, watch: Watch) -> Agreement:
        """Return what all processes know of this step, and act on what one of them asks for; collective."""
        saver, num_bad_samples = self.saver, len(self.logbook.bad_samples.pending)
        asked = Request(
            num_bad_samples, saver.is_due(self.state.step + 1), saver.has_failed(), watch.signals.asked is not None
        )
        agreed = agree(self.accelerator, self.logbook.report, asked)
        self.logbook.count(agreed, self.state)
        if agreed.save_has_failed:
            saver.finish()
        self.must_save, self.must_stop = agreed.save_is_due, agreed.stop_is_asked
        return agreed

    def log(self, session: Session) -> None:
        """Write a point when one is due, and look at an epoch's end what of the data was of no use."""
        ends_epoch = self.timetable.ends_epoch(self.state)
        self.logbook.bad_samples.check(ends_epoch)
        if ends_epoch and not self.timetable.is_over(self.state):
            self.logbook.tell_cut_captions(self.state, self.learner.context_length)
        if self.timetable.is_due(self.state, self.config.track.every):
            facts = {
                "epoch": self.epoch,
                "logit_scale": self.learner.logit_scale,
                "checkpoint_share": self.saver.share_of_time(),
            }
            if (scaler := self.accelerator.scaler) is not None:
                facts["loss_scale"] = scaler.get_scale()
            self.logbook.log(session.tracking, self.state, facts)

    def evaluate(self, session: Session) -> None:
        """Evaluate when it is due: at step 0, every `eval.every` steps or once an epoch, and at the end."""
        if not self.timetable.evaluation_is_due(self.state):
            return
        session.watch.watchdog.patient("evaluation")
        try:
            self.evaluations.run(self.state, self.epoch, session.tracking, session.watch.lookout)
        except StopAsked:  # it is made up for when the run goes on
            self.must_stop = True

    def save(self, watch: Watch) -> None:
        """Save the run as it stands after this step, unless that is done."""
        if self.saved_step == self.state.step and not self.logbook.is_best:
            return
        watch.watchdog.patient("checkpoint")
        with self.logbook.rate.paused():
            self.learner.share_statistics()
            self.saver.save(self.state.step, self.resumable.state_dict(self.learner), self.logbook.is_best)
        self.saved_step, self.logbook.is_best, self.must_save = self.state.step, False, False

    def finish(self, session: Session) -> TrainResult:
        """Save the end of the run, export the best or the last weights and close what is open."""
        self.stop_if_asked(session.watch)
        self.save(session.watch)
        self.saver.finish()
        exported = self.chosen()
        if self.accelerator.is_main_process:
            write_export(self.folder.export, exported)
        self.logbook.close(session.tracking, self.state, self.learner.context_length)
        self.status.complete()
        self.accelerator.end_training()
        return TrainResult(dict(exported.metrics), self.state.step, self.folder.export)

    def chosen(self) -> ExportedModel:
        """Return the weights to export and what was measured of them: the best ones, or the last."""
        best = find_best(self.folder.checkpoints, check_run) if self.config.stop.metric is not None else None
        if best is None or self.state.best_metrics is None:
            return exported_model(self.learner.model, self.learner.exported_weights(), self.state.metrics)
        return model_in(best, is_best=True)

    def told(self, error: BaseException, signals: StopSignals) -> BaseException:
        """Return what ends the run: an interruption where all were asked and this process did not hear it first.

        One that meets a run as it was saved has lost nothing, and is as good as a stop.
        """
        is_asked, may_interrupt = signals.asked is not None, signals.may_interrupt
        signals.may_interrupt = False
        if isinstance(error, PeerEnded) and is_asked and may_interrupt:
            error = KeyboardInterrupt()
        self.saver.settle()
        is_saved = self.saved_step == self.state.step and not self.saver.has_failed()
        return Preempted(self.state.step) if isinstance(error, KeyboardInterrupt) and is_saved else error

    @property
    def epoch(self) -> float:
        """Return how often the training data has been passed over."""
        return self.feed.epochs(self.state.next_batch)
