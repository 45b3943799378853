"""What a run measures from point to point, and where it is told: meters, trackers, the console, early stopping."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from uuid import uuid4

from accelerate import Accelerator

from accel_clip.checkpoint.run_state import RunState
from accel_clip.config import Config
from accel_clip.console import Progress, say
from accel_clip.data.bad_samples import BadSampleLog
from accel_clip.data.batch import Batch
from accel_clip.meters import MeterGroup, RateMeter
from accel_clip.process.accelerator import cores_per_process
from accel_clip.run.agreement import CUT_CAPTIONS, PAIRS_OF, Agreement
from accel_clip.run.folder import RunFolder
from accel_clip.run.health import ChanceWatch, WaitWatch
from accel_clip.run.stopping import EarlyStopping
from accel_clip.run.tracking import Tracking


class Logbook:
    """Everything that is measured in a run but its evaluations.

    run_id: under which trackers know the run; report: of this process in a step, which is brought together with the
    others' before the weights change; meters: what all agreed on since the last point; stopping: what is watched;
    is_best: whether the last point was the best.
    """

    def __init__(self, config: Config, accelerator: Accelerator, folder: RunFolder, num_workers: int) -> None:
        self.config, self.accelerator, self.folder = config, accelerator, folder
        self.report, self.meters = MeterGroup(), MeterGroup()
        self.rate, self.progress = RateMeter("pairs/s", ":.0f"), Progress()
        self.bad_samples = BadSampleLog(folder.bad_samples, config.data.max_bad_fraction)
        self.chance_watch = ChanceWatch(config.train.batch_size)
        self.wait_watch = WaitWatch(num_workers, cores_per_process())
        stop = config.stop
        self.stopping = EarlyStopping(stop.metric, stop.mode, stop.patience, stop.min_delta)
        self.is_best = False
        self.run_id = uuid4().hex[:21]  # SwanLab takes no longer one

    def take_in(self, batch: Batch) -> None:
        """Take in what a contrastive batch says beside its pairs."""
        self.bad_samples.take_in(batch.bad_samples, self.config.train.batch_size)
        self.report.add(CUT_CAPTIONS, batch.num_cut_captions)
        for name, number in batch.num_pairs.items():
            self.report.add(f"{PAIRS_OF}{name}", number)

    def count(self, agreed: Agreement, state: RunState) -> None:
        """Add the counts of a step to the run's; collective where a process knows of unusable samples."""
        state.num_cut_captions += agreed.num_cut_captions
        for name, number in agreed.num_pairs.items():
            state.num_pairs[name] = state.num_pairs.get(name, 0) + number
        if agreed.num_bad_samples:
            self.bad_samples.collect(self.accelerator)

    def leave_out(self, means: Mapping[str, float]) -> None:
        """Take in what was measured of a step that is left out: how long it waited for data, and names without a value.

        A point has the same names whatever its steps were.
        """
        self.meters.update("data_time", means["data_time"])
        self.meters.update_all({name: 0.0 for name in means if name != "data_time"}, n=0)

    def tell_cut_captions(self, state: RunState, context_length: int) -> None:
        """Say how many of the captions so far have more tokens than the model reads, where there are any."""
        number, num_pairs = state.num_cut_captions, state.next_batch * self.config.train.batch_size
        if number:
            message = f"captions longer than {context_length} tokens: {number:,} of {num_pairs:,} pairs so far"
            say(f"{message}; only the first {context_length} are read")

    def log(self, tracking: Tracking, state: RunState, facts: Mapping[str, float]) -> None:
        """Write a training point: means over the steps since the last one, over all processes, and `facts`."""
        loss = self.meters.mean("loss")
        point = self.meters.averages()
        samples_per_second, train = self.rate.rate, self.config.train
        step_time = train.batch_size * train.accumulate / samples_per_second - point["data_time"]
        point |= {
            "samples": state.next_batch * train.batch_size,
            "cut_captions": state.num_cut_captions,
            "samples_per_second": samples_per_second,
            "step_time": step_time,
            **facts,
        }
        if len(state.num_pairs) > 1:
            point |= {f"{PAIRS_OF}{name}": number for name, number in state.num_pairs.items()}
        self.progress.show(loss, self.rate, point)
        self.rate.reset()
        self.chance_watch.look(state.step, point)
        self.wait_watch.look(state.step, point)
        self.record(tracking, state, point)

    def record(self, tracking: Tracking, state: RunState, point: dict[str, float]) -> None:
        """Write a point to every tracker, and see whether it is the best one or the last one needed."""
        if not point:
            return
        tracking.log(state.step, point)
        verdict = self.stopping.update(point, state.step)
        state.stop_asked |= verdict.should_stop
        if verdict.is_best:
            self.is_best, state.best_metrics = True, point

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, as plain JSON."""
        return {
            "run_id": self.run_id,
            "meters": self.meters.state_dict(),
            "bad_samples": self.bad_samples.state_dict(),
            "watched": self.stopping.metric,
            "stopping": self.stopping.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint; early stopping begins anew when another metric is watched."""
        self.run_id = state.get("run_id") or self.run_id
        self.meters.load_state_dict(state["meters"])
        self.bad_samples.load_state_dict(state["bad_samples"])
        if state["watched"] == self.stopping.metric:
            self.stopping.load_state_dict(state["stopping"])

    def close(self, tracking: Tracking, state: RunState, context_length: int) -> None:
        """Close what is open, and say what of the data was unusable or cut."""
        self.progress.close()
        tracking.close()
        self.tell_cut_captions(state, context_length)
        if self.bad_samples.counts:
            say(f"unusable samples: {self.bad_samples.summary()}; listed in {self.folder.bad_samples}")
