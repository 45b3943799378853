"""The order of a stream: its shards dealt out to lanes, each of which is read, shuffled and taken up again alone.

1. Lane l of L has the shards l, l + L, l + 2L … for good, in every epoch in another order drawn from (seed, epoch, l).
   No two lanes ever hold the same pair.
2. A lane is read in windows of so many pairs. A window is shuffled as a whole, by a seed of its own, and the following
   one is read while it is given out; none reaches over the end of an epoch.
3. So a lane's state is a few numbers: where its window begins and how many pairs of it were given. Taking it up again
   reads that window once more and goes on with the very next pair.

A contrastive batch holds as many pairs of each lane, so that the order depends neither on the number of processes nor
on that of loader workers: each has some of the lanes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from random import Random

from accel_clip.data.bad_samples import MISSING, UnusableSample
from accel_clip.data.sources.base import Stream, StreamItem
from accel_clip.faults import ConfigError, DataError, some_of
from accel_clip.randomness import derive_seed

MOST_LANES = 16
ENOUGH_LANES = 8
SHARDS_OF_A_LANE = 2
"""at least, where there are as many: all lanes are read alike, so of one that has a single short shard each pair would
be shown more often by as much as others are longer, and one that has a single lost shard could not go on"""
MOST_LOST_SHARDS = 3
"""in a row, after which a lane stops the run: it can be taken up when the network is back"""
MOST_NAMED = 10  # shards, in a message


@dataclass(frozen=True)
class LanePosition:
    """Where a lane stands."""

    lane: int
    """its number"""
    epoch: int = 0
    """the pass over its shards in which its window begins"""
    shard: int = 0
    """which of that pass's shards the window begins in"""
    start: int = 0
    """the place in the shard at which it begins"""
    taken: int = 0
    """how many pairs of the window were given"""
    share: float = 0.0
    """how much of the pass lies before the window, in [0, 1)"""


@dataclass(frozen=True)
class LaneItem:
    """What a lane gives."""

    item: StreamItem
    """a pair, or what is wrong with one"""
    shard: int
    """number of the shard that it comes from"""
    position: LanePosition
    """where the lane stands after it, with the item's epoch"""


@dataclass(frozen=True)
class ShardItem:
    """What a shard gives."""

    item: StreamItem
    """a pair, or what is wrong with one"""
    shard: int
    """number of the shard that it comes from"""
    place: int
    """which of the epoch's shards that is"""


class Lane:
    """One lane of a stream, which never ends."""

    def __init__(self, stream: Stream, number: int, num_lanes: int, window: int, seed: int) -> None:
        self.stream, self.number, self.window, self.seed = stream, number, window, seed
        self.shards = range(number, stream.num_shards, num_lanes)

    def give(self, position: LanePosition) -> Iterator[LaneItem]:
        """Yield what follows a position, epoch after epoch.

        Raises `DataError` when an epoch has nothing to give, or several shards in a row cannot be read.
        """
        while True:
            yield from self.give_epoch(position)
            position = LanePosition(self.number, position.epoch + 1)

    def give_epoch(self, position: LanePosition) -> Iterator[LaneItem]:
        """Yield the rest of an epoch."""
        items = self.read_epoch(position)
        window = list(islice(items, self.window))
        if not window and (position.shard, position.start) == (0, 0):
            raise DataError(
                f"{self.stream.name}: nothing can be read from the shards {some_of(self.shards, MOST_NAMED)}"
            )
        while window:
            following: list[ShardItem] = []
            for taken, number in enumerate(self.shuffled(len(window), position)):
                if taken < position.taken:
                    continue
                read = window[number]
                yield LaneItem(read.item, read.shard, replace(position, taken=taken + 1))
                following.extend(islice(items, 1))
            following.extend(islice(items, self.window - len(following)))
            last = window[-1]
            position = LanePosition(
                self.number, position.epoch, last.place, last.item.end, share=last.place / len(self.shards)
            )
            window = following

    def read_epoch(self, position: LanePosition) -> Iterator[ShardItem]:
        """Yield an epoch's items in the order of its shards, from where a window begins."""
        order = self.order(position.epoch)
        num_lost = 0
        for place in range(position.shard, len(order)):
            item = None
            num_usable = int(place == position.shard and position.start > 0)  # what lies before gave something
            for item in self.stream.read(order[place], position.start if place == position.shard else 0):
                num_usable += not isinstance(item.pair, UnusableSample)
                yield ShardItem(item, order[place], place)
            num_lost = 0 if num_usable or not is_lost(item) else num_lost + 1
            if num_lost == min(MOST_LOST_SHARDS, len(order)):
                raise lost_too_many(self.stream, num_lost, item)

    def order(self, epoch: int) -> list[int]:
        """Return the lane's shards in an epoch's order."""
        shards = list(self.shards)
        Random(derive_seed(self.seed, "shards", epoch, self.number)).shuffle(shards)
        return shards

    def shuffled(self, length: int, position: LanePosition) -> list[int]:
        """Return the order in which a window is given out."""
        order = list(range(length))
        seed = derive_seed(self.seed, "window", position.epoch, self.number, position.shard, position.start)
        Random(seed).shuffle(order)
        return order


def is_lost(last: StreamItem | None) -> bool:
    """Return whether a shard ended since it could not be fetched."""
    return last is not None and isinstance(last.pair, UnusableSample) and last.pair.reason == MISSING


def lost_too_many(stream: Stream, number: int, last: StreamItem | None) -> DataError:
    """Return the error for shards in a row that cannot be read."""
    assert last is not None and isinstance(last.pair, UnusableSample)
    return DataError(
        f"{stream.name}: {number} shards in a row cannot be read, the last is {last.pair.path}: {last.pair.detail}; "
        "the same command goes on from the last checkpoint when they can"
    )


def choose_num_lanes(stream: Stream, num_pairs: int, num_processes: int) -> int:
    """Return into how many lanes a stream is dealt: as many as divide its pairs of a batch and have shards enough.

    They are a multiple of the processes, and the same for every number of these where that can be. Raises
    `ConfigError` for fewer shards than processes.
    """
    most = min(MOST_LANES, stream.num_shards // SHARDS_OF_A_LANE)
    if stream.num_shards < num_processes:
        raise ConfigError(
            f"data.train: {stream.name} has {stream.num_shards} shards, and {num_processes} processes read different "
            f"ones: write it as {num_processes} shards or more, or start at most {stream.num_shards} processes"
        )
    assert num_pairs % num_processes == 0, "parts of a batch are even"
    multiples = range(num_processes, max(most, num_processes) + 1, num_processes)
    fitting = [lanes for lanes in multiples if num_pairs % lanes == 0]
    powers = [lanes for lanes in fitting if lanes >= ENOUGH_LANES and lanes.bit_count() == 1]
    return max(powers or fitting)  # of powers of two the usual numbers of processes divide the same one
