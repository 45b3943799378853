"""What is there only while a run goes: who watches over it, its trackers, and the loader of its batches."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from functools import partial

from accel_clip.config import TrainConfig
from accel_clip.data.batch import Batch
from accel_clip.data.examples import Preparation
from accel_clip.data.feed import Feed
from accel_clip.data.feed_parts import Batches, LoaderRank
from accel_clip.process.signals import StopAsked, StopSignals
from accel_clip.process.waiting import Lookout
from accel_clip.process.watchdog import Watchdog
from accel_clip.run.caches import Caches
from accel_clip.run.parts import RunParts
from accel_clip.run.resumable import Resumable
from accel_clip.run.stages import Stage
from accel_clip.run.status import RunStatus
from accel_clip.run.tracking import Tracking, quiet_writer

SECONDS_FOR_A_SERVER = 600.0


@dataclass(frozen=True)
class Watch:
    """Who may end a run from outside of its steps."""

    signals: StopSignals
    """that ask it to stop"""
    watchdog: Watchdog
    """which ends this process when it hangs"""
    lookout: Lookout
    """of work between two steps: it looks at the signals, and tells the watchdog"""


@contextmanager
def watched(parts: RunParts, status: RunStatus) -> Iterator[Watch]:
    """Watch over a run in a block; what ends this process is told in `status`."""
    number, has_streams = parts.accelerator.num_processes, bool(parts.data.feed.streams)
    computed = {"computed": time.process_time} if number == 1 else {}
    timeout = timeout_of(parts.config.train, number, has_streams)
    with StopSignals(status.interrupted) as signals, Watchdog(timeout, status.hangs, **computed) as watchdog:
        yield Watch(signals, watchdog, Lookout(lambda: signals.asked is not None, watchdog.patient))


def timeout_of(config: TrainConfig, num_processes: int, has_streams: bool) -> float | None:
    """Return after how many seconds without progress a process ends itself, None for never.

    While one waits for a server, which may ask for minutes, the others wait for it, and none of them hangs. Nobody
    waits for a process that runs alone: it may have patience with a disk on the network too.
    """
    if config.timeout is None:
        return None
    return max(config.timeout, SECONDS_FOR_A_SERVER) if has_streams or num_processes == 1 else config.timeout


class StageLoader:
    """This process's part of the contrastive batches that a run has left, opened for those of one stage.

    prepare: returns what pairs go through in a stage; batches: those of the stage that are left. Closed, it ends its
    workers; they start with the first batch.
    """

    def __init__(
        self, feed: Feed, rank: LoaderRank, prepare: Callable[[Stage], Preparation], stage: Stage, batches: range
    ) -> None:
        self.feed, self.rank, self.prepare, self.stage = feed, rank, prepare, stage
        self.batches = self.opened(batches)

    def opened(self, batches: range) -> Batches:
        """Return batches of the stage, by their numbers."""
        return self.feed.open(batches, self.rank, self.prepare(self.stage))

    def reopen(self, stage: Stage, batches: range) -> None:
        """Go on with other batches than those that are left, of this stage or another one."""
        self.close()
        self.stage, self.batches = stage, self.opened(batches)

    def take(self, number: int, waiting: AbstractContextManager[None]) -> list[Batch]:
        """Return the next batches, waited for in a block.

        Raises `StopAsked` where that does, and the next process takes the batches again.
        """
        places = self.feed.places()
        try:
            with waiting:
                return [next(self.batches) for _ in range(number)]
        except StopAsked:
            self.feed.return_to(places)
            raise

    def close(self) -> None:
        """End the workers."""
        self.batches.close()


@dataclass(frozen=True)
class Session:
    """What a run that goes has open."""

    watch: Watch
    """who may end the run from outside of its steps"""
    tracking: Tracking
    """the trackers that points are written to"""
    loader: StageLoader
    """where batches come from"""


@contextmanager
def open_session(
    watch: Watch, parts: RunParts, resumable: Resumable, caches: Caches, resumed_step: int | None
) -> Iterator[Session]:
    """Open the trackers, then the loader where the run stands; both are closed as far as they must be.

    resumed_step: of the checkpoint that the run goes on from, None for one that begins.
    """
    accelerator, state, timetable = parts.accelerator, resumable.state, parts.data.timetable
    run_id = resumable.logbook.run_id
    prepare, batches = partial(caches.preparation, parts), timetable.batches_left(state)
    with quiet_writer():
        tracking = Tracking(accelerator, parts.config, resumable.folder, run_id, resumed_step)
        loader = StageLoader(parts.data.feed, rank_of(parts), prepare, timetable.stage(state), batches)
        with closing(loader):
            yield Session(watch, tracking, loader)


def rank_of(parts: RunParts) -> LoaderRank:
    """Return which part of every batch this process loads, and with how many workers."""
    accelerator = parts.accelerator
    on_cuda = accelerator.device.type == "cuda"
    return LoaderRank(accelerator.process_index, accelerator.num_processes, parts.num_workers, on_cuda)
