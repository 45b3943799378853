"""Streams: the same order for any number of processes and workers, taken up again at the very next pair."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import pytest

from accel_clip.config import DataConfig
from accel_clip.data.bad_samples import UnusableData, UnusableSample
from accel_clip.data.batch import Batch
from accel_clip.data.examples import Preparation
from accel_clip.data.lanes import Lane, LanePosition, choose_num_lanes
from accel_clip.data.sources.base import Stream, StreamItem
from accel_clip.data.stream_loader import LaneBatches, Lanes, iterate_stream
from accel_clip.faults import ConfigError, DataError
from helpers.streams import StreamInMemory, tokens

WINDOW, SEED = 5, 3


def keys_of(lane: Lane, position: LanePosition, number: int) -> list[str]:
    return [given.item.key for given in islice(lane.give(position), number)]


def batches(
    stream: Stream,
    num_batches: int,
    process: int = 0,
    num_processes: int = 1,
    workers: int = 0,
    positions: dict[int, LanePosition] | None = None,
    rows: int = 3,
) -> list[Batch]:
    """Return batches of one process of a stream in four lanes."""
    share = 4 // num_processes
    numbers = range(process * share, (process + 1) * share)
    lanes = Lanes(stream, numbers, 4, WINDOW, SEED, positions or {})
    parts = LaneBatches(lanes, rows, Preparation(tokens, (16, 16), 1e6, SEED))
    loader = iterate_stream(parts, DataConfig(), workers, pin_memory=False)
    try:
        return list(islice(loader, num_batches))
    finally:
        loader.close()


def contents(parts: list[Batch]) -> list[tuple[object, ...]]:
    """Return what is in batches, as plain values."""
    return [(each.image.tolist(), each.tokens.tolist(), each.sample.tolist(), each.bad_samples) for each in parts]


@pytest.mark.parametrize("lengths", [[7, 0, 13, 1], [5], [10, 10, 5]])
def test_a_lane_gives_each_pair_once_an_epoch_in_another_order(lengths: list[int]) -> None:
    lane, total = Lane(StreamInMemory(lengths), 0, 1, WINDOW, SEED), sum(lengths)
    given = keys_of(lane, LanePosition(0), 3 * total)
    epochs = [given[start : start + total] for start in range(0, 3 * total, total)]
    everything = sorted(f"{shard}/{number}" for shard, length in enumerate(lengths) for number in range(length))
    assert [sorted(epoch) for epoch in epochs] == [everything] * 3
    assert len({tuple(epoch) for epoch in epochs} | {tuple(everything)}) == 4


def test_a_lane_goes_on_with_the_very_next_pair_from_every_mark() -> None:
    lane = Lane(StreamInMemory([7, 0, 13, 1]), 0, 1, WINDOW, SEED)
    whole = list(islice(lane.give(LanePosition(0)), 60))
    keys = [given.item.key for given in whole]
    for place in range(40):
        assert keys_of(lane, whole[place].position, 15) == keys[place + 1 : place + 16]


def test_the_rest_of_a_shard_without_a_picture_is_no_lost_shard() -> None:
    @dataclass
    class WithoutLast(StreamInMemory):
        def read(self, shard: int, start: int) -> Iterator[StreamItem]:
            for item in super().read(shard, start):
                missing = UnusableSample("missing_file", "the sample has no picture", item.key)
                yield StreamItem(item.key, missing, item.end) if item.end == self.lengths[shard] else item

    lane = Lane(WithoutLast([11]), 0, 1, WINDOW, SEED)  # its last window holds that sample alone
    whole = list(islice(lane.give(LanePosition(0)), 30))
    for place in range(22):
        assert keys_of(lane, whole[place].position, 4) == [given.item.key for given in whole[place + 1 : place + 5]]


def test_a_short_shard_is_not_shown_much_more_often_than_others() -> None:
    lengths = [100] * 15 + [8]
    num_lanes = choose_num_lanes(StreamInMemory(lengths), 64, 1)
    shown: Counter[int] = Counter()
    for number in range(num_lanes):
        lane = Lane(StreamInMemory(lengths), number, num_lanes, WINDOW, SEED)
        shown.update(given.shard for given in islice(lane.give(LanePosition(number)), 1000))
    often = [shown[shard] / length for shard, length in enumerate(lengths)]
    assert max(often) < 2.2 * min(often)


def test_lanes_have_different_shards() -> None:
    stream = StreamInMemory([4] * 10)
    given = [set(keys_of(Lane(stream, number, 3, WINDOW, SEED), LanePosition(number), 80)) for number in range(3)]
    assert sum(len(each) for each in given) == len(set.union(*given)) == 40


def test_order_and_pixels_are_the_same_for_any_number_of_processes_and_workers() -> None:
    stream = StreamInMemory([9, 7, 11, 8, 6, 5, 7, 12], broken=frozenset({(2, 1), (4, 2), (5, 3)}))
    whole = contents(batches(stream, 14))
    assert contents(batches(stream, 14, workers=1)) == contents(batches(stream, 14, workers=3)) == whole
    first, second = (batches(stream, 14, process, 2, workers=process) for process in range(2))
    for one, other, both in zip(contents(first), contents(second), whole, strict=True):
        assert tuple(a + b for a, b in zip(one, other, strict=True)) == both  # type: ignore[operator]


def test_batches_go_on_from_their_marks() -> None:
    stream = StreamInMemory([9, 7, 11, 8, 6, 5, 7, 12], broken=frozenset({(2, 1), (4, 2), (5, 3)}))
    whole = batches(stream, 12)
    for place in (0, 3, 8):
        positions = {position.lane: position for position in whole[place].lane_positions}
        assert contents(batches(stream, 3, positions=positions)) == contents(whole[place + 1 : place + 4])


def test_unusable_pairs_are_passed_over_and_told_in_every_epoch() -> None:
    broken = frozenset({(2, 1), (4, 2), (5, 3)})
    stream = StreamInMemory([6] * 8, broken=broken)
    told = Counter(bad.sample for batch in batches(stream, 40) for bad in batch.bad_samples)
    assert set(told) == {f"{shard}/{number}" for shard, number in broken}
    assert {number > 5 for number in told.values()} == {True}


def test_no_pair_stands_twice_in_a_batch_even_where_an_epoch_ends() -> None:
    for batch in batches(StreamInMemory([5, 4, 5, 4]), 30):
        assert len({tuple(row) for row in batch.tokens.tolist()}) == 12


def test_too_few_pairs_for_a_batch_are_an_error() -> None:
    with pytest.raises(
        UnusableData, match=r"3 pairs of a batch come from a part of memory that has 2: make train\.batch"
    ):
        batches(StreamInMemory([5, 2, 5, 5]), 30)
    with pytest.raises(UnusableData, match=r"has 0: no_caption \d+, unreadable"):
        batches(StreamInMemory([5, 2, 5, 5], broken=frozenset({(1, 0), (1, 1)})), 30, workers=1)
    with pytest.raises(UnusableData, match="nothing can be read from the shards 1"):
        batches(StreamInMemory([5, 0, 5, 5]), 30)


def test_shards_that_are_lost_are_counted_and_several_in_a_row_end_the_run() -> None:
    lane = Lane(StreamInMemory([4] * 6, lost=frozenset({1, 4})), 0, 1, WINDOW, SEED)
    keys = Counter(keys_of(lane, LanePosition(0), 3 * 18))
    assert keys["1"] == keys["4"] == keys["0/0"] == 3
    with pytest.raises(
        DataError, match=r"3 shards in a row cannot be read.*no answer.*goes on from the last checkpoint"
    ):
        keys_of(Lane(StreamInMemory([4] * 6, lost=frozenset({0, 1, 2, 3, 4})), 0, 1, WINDOW, SEED), LanePosition(0), 99)


@pytest.mark.parametrize(
    ("num_shards", "num_pairs", "num_processes", "lanes"),
    [
        *[(100, 256, 1, 16), (100, 256, 8, 16), (42, 96, 3, 12), (3, 256, 2, 2), (1, 7, 1, 1), (64, 640, 32, 32)],
        *[(31, 256, 1, 8), (17, 256, 1, 8), (17, 256, 16, 16), (3, 256, 1, 1)],
    ],
)
def test_lanes_divide_the_batch_and_have_two_shards_where_there_are_as_many(
    num_shards: int, num_pairs: int, num_processes: int, lanes: int
) -> None:
    assert choose_num_lanes(StreamInMemory([1] * num_shards), num_pairs, num_processes) == lanes


def test_fewer_shards_than_processes_are_refused() -> None:
    with pytest.raises(ConfigError, match="memory has 3 shards, and 4 processes read different ones"):
        choose_num_lanes(StreamInMemory([1] * 3), 256, 4)
