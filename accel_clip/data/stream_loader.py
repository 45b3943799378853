"""Batches of a stream for one process: lanes read in worker processes, ahead of the step."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, replace
from math import ceil

from torch.utils.data import IterableDataset, get_worker_info

from accel_clip.config import DataConfig
from accel_clip.data.bad_samples import BadSample, UnusableSample, too_few_usable
from accel_clip.data.batch import Batch, joined_batch
from accel_clip.data.examples import Example, Preparation, batch_of
from accel_clip.data.lanes import Lane, LaneItem, LanePosition
from accel_clip.data.sources.base import Stream
from accel_clip.data.workers import Workers, memory_shared, usable_or_raise
from accel_clip.faults import DataError, recognised
from accel_clip.plugins import PluginsFirst
from accel_clip.randomness import derive_seed

EPOCHS_TO_KNOW = 2
"""passes over a lane in which nothing may stand in a batch, after which it is clear that nothing ever will"""
MOST_UNUSABLE = 100_000
"""samples in search of those of a batch: a shard that never ends has no second pass"""


@dataclass(frozen=True)
class Lanes:
    """The lanes of a stream that one process reads."""

    stream: Stream
    """what they are read from"""
    numbers: range
    """those of this process"""
    num_lanes: int
    """of all processes"""
    window: int
    """items of a lane that are shuffled together"""
    seed: int
    """of the order"""
    positions: Mapping[int, LanePosition]
    """where each lane stands that was begun, by its number"""

    def open(self, number: int) -> Iterator[LaneItem]:
        """Yield what follows in a lane."""
        lane = Lane(self.stream, number, self.num_lanes, self.window, self.seed)
        return lane.give(self.positions.get(number, LanePosition(number)))


class LaneBatches(PluginsFirst, IterableDataset[Batch | DataError]):
    """Parts of batches, `rows` pairs of a lane each, lane after lane; a worker gives those of its own lanes.

    An error is given too, and is the last: raised in a worker it would lose its message.
    """

    def __init__(self, lanes: Lanes, rows: int, preparation: Preparation) -> None:
        self.lanes, self.rows, self.preparation = lanes, rows, preparation

    def __iter__(self) -> Iterator[Batch | DataError]:
        worker = get_worker_info()
        own = self.lanes.numbers if worker is None else self.lanes.numbers[worker.id :: worker.num_workers]
        opened = [self.lanes.open(number) for number in own]
        try:
            while True:
                for lane in opened:
                    yield self.part(lane)
        except DataError as error:
            yield error

    def part(self, lane: Iterator[LaneItem]) -> Batch:
        """Return the next pairs of a lane that can be used, none of them twice; raises `DataError`."""
        examples: dict[int, Example] = {}
        met: list[BadSample] = []
        first_epoch = None
        for given in lane:
            epoch = given.position.epoch
            first_epoch = epoch if first_epoch is None else first_epoch
            if epoch - first_epoch >= EPOCHS_TO_KNOW or len(met) >= MOST_UNUSABLE:
                break
            sample = derive_seed("streamed", self.lanes.seed, given.shard, given.item.end)
            try:
                if sample not in examples:
                    examples[sample] = self.example(given, sample)
            except UnusableSample as problem:
                met.append(self.describe(problem, given))
            if len(examples) == self.rows:
                return replace(batch_of(list(examples.values()), met), lane_positions=(given.position,))
        name = self.lanes.stream.name
        what = f"data.train: {self.rows} pairs of a batch come from a part of {name} that has {len(examples)}"
        raise too_few_usable(what, met) if met else DataError(f"{what}: make train.batch_size smaller or add data")

    def example(self, given: LaneItem, sample: int) -> Example:
        """Return an item, prepared; raises `UnusableSample`."""
        if isinstance(given.item.pair, UnusableSample):
            raise given.item.pair
        return self.preparation.example(given.item.pair, given.item.key, sample, given.position.epoch)

    def describe(self, problem: UnusableSample, given: LaneItem) -> BadSample:
        """Return the record of an unusable sample."""
        name, key = self.lanes.stream.name, given.item.key
        return BadSample(name, key, problem.reason, problem.path, problem.detail, given.position.epoch)


def as_it_is(part: Batch | DataError) -> Batch | DataError:
    """Return what is put together already."""
    return part


def iterate_stream(
    parts: LaneBatches, config: DataConfig, num_workers: int, pin_memory: bool
) -> Generator[Batch, None, None]:
    """Yield the batches of one process, on the CPU, without end; raises what a worker could not get over.

    Closed, it ends its workers; there are at most `num_workers`, each with as many lanes.
    """
    num_lanes = len(parts.lanes.numbers)
    workers = most_dividing(num_lanes, num_workers)
    ahead = ceil(config.prefetch * num_lanes / max(1, workers))
    with recognised(), memory_shared():
        items = Workers(workers, ahead).load(parts, as_it_is)
        while True:
            whole = joined_batch([usable_or_raise(next(items)) for _ in range(num_lanes)])
            yield whole.pin_memory() if pin_memory else whole


def most_dividing(number: int, most: int) -> int:
    """Return the largest number up to `most` that divides a number, 0 for 0."""
    return next((each for each in range(min(number, most), 0, -1) if number % each == 0), 0)
