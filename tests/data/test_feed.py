"""Sources and streams in one batch: fixed parts, one order, and a state that takes all of them up again."""

from __future__ import annotations

import json
from itertools import islice

import pytest

from accel_clip.commands.check.sample import known_part
from accel_clip.config import Config, DataConfig, SourceConfig, TrainConfig
from accel_clip.data.batch import Batch
from accel_clip.data.examples import Preparation
from accel_clip.data.feed import Feed, build_feed
from accel_clip.data.feed_parts import LoaderRank
from accel_clip.data.order import Draws
from accel_clip.data.pairs import PairsOfRun
from accel_clip.data.sources.base import Pair, Stream
from accel_clip.data.sources.combine import Concatenated
from accel_clip.faults import ConfigError
from helpers.pictures import numbered_picture
from helpers.streams import StreamInMemory, tokens

PREPARATION = Preparation(tokens, (16, 16), 1e6, seed=0)


class Numbers:
    """A map-style source of so many pairs, whose captions begin with its own number."""

    def __init__(self, name: str, length: int, first_word: int) -> None:
        self.name, self.length, self.first_word = name, length, first_word

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Pair:
        return Pair(numbered_picture(index, (20, 24)), (f"{self.first_word} {index}",))

    def key(self, index: int) -> str:
        return str(index)


def feed_of(opened: PairsOfRun, batch_size: int = 16, num_processes: int = 1, buffer: int = 12) -> Feed:
    config = Config(data=DataConfig(shuffle_buffer=buffer), train=TrainConfig(batch_size=batch_size, steps=99))
    return build_feed(opened, config, num_processes)


def mixed(num_processes: int = 1) -> Feed:
    """Return 8 pairs of two tables, 3 to 1, and 8 of a stream in every batch."""
    tables = Concatenated([Numbers("photos", 30, 900), Numbers("drawings", 9, 901)])
    stream: Stream = StreamInMemory([9, 7, 11, 8, 6, 5, 7, 12])
    return feed_of(PairsOfRun(tables, [3.0, 1.0], 4.0, [(stream, 4.0)], None), num_processes=num_processes)


def batches(
    feed: Feed, first: int, number: int, process: int = 0, num_processes: int = 1, workers: int = 0
) -> list[Batch]:
    loaded = feed.open(range(first, first + 99), LoaderRank(process, num_processes, workers, False), PREPARATION)
    try:
        return list(islice(loaded, number))
    finally:
        loaded.close()


def words(batch: Batch) -> list[tuple[int, ...]]:
    return [tuple(row) for row in batch.tokens.tolist()]


def test_every_batch_holds_the_parts_that_the_weights_ask_for() -> None:
    feed = mixed()
    assert feed.pairs_in_batch == {"photos": 6, "drawings": 2, "memory": 8}
    for batch in batches(feed, 0, 9):
        assert batch.num_pairs == {"photos": 6, "drawings": 2, "memory": 8}
        firsts = [row[0] for row in words(batch)]
        assert (firsts.count(900), firsts.count(901), len(firsts)) == (6, 2, 16)
        assert len(set(words(batch))) == 16


def test_processes_and_workers_change_no_batch() -> None:
    whole = [set(words(batch)) for batch in batches(mixed(), 0, 6)]
    parts = [batches(mixed(2), 0, 6, process, 2, workers=2) for process in range(2)]
    assert [set(words(one)) | set(words(other)) for one, other in zip(*parts, strict=True)] == whole
    assert {len(batch) for part in parts for batch in part} == {8}


def test_a_feed_goes_on_from_its_state() -> None:
    whole = [words(batch) for batch in batches(mixed(), 0, 10)]
    feed = mixed()
    batches(feed, 0, 4)
    state = json.loads(json.dumps(feed.state_dict()))
    again = mixed()
    again.load_state_dict(state)
    assert [words(batch) for batch in batches(again, 4, 6)] == whole[4:]
    assert again.epochs(10) > feed.epochs(4)


def test_a_state_of_other_data_is_refused() -> None:
    state = mixed().state_dict()
    other = feed_of(PairsOfRun(Numbers("photos", 39, 900), None, 1.0, [(StreamInMemory([9] * 9), 1.0)], None))
    with pytest.raises(ConfigError, match="began with 8 shards of memory and now there are 9"):
        other.load_state_dict(state)
    with pytest.raises(ConfigError, match="began with 12 samples and now there are 39"):
        other.load_state_dict({**state, "num_samples": 12})


def test_the_lanes_of_a_run_stay_when_the_processes_are_others() -> None:
    stream = StreamInMemory([9] * 16)
    opened = PairsOfRun(None, None, 0.0, [(stream, 1.0)], None)
    feed = feed_of(opened, batch_size=24)
    batches(feed, 0, 3)
    state = feed.state_dict()
    whole = [set(words(batch)) for batch in batches(feed, 3, 3)]
    assert state["streams"][0]["num_lanes"] == 8
    parts = []
    for process in range(4):
        again = feed_of(opened, batch_size=24, num_processes=4)
        again.load_state_dict(state)
        parts.append([set(words(batch)) for batch in batches(again, 3, 3, process, 4)])
    assert [set.union(*each) for each in zip(*parts, strict=True)] == whole
    third = feed_of(opened, batch_size=24, num_processes=3)
    third.load_state_dict(state)
    with pytest.raises(ConfigError, match="in 8 lanes, which 3 processes cannot divide: go on with 1, 2, 4, 8"):
        batches(third, 3, 1, 0, 3)


def test_the_windows_of_a_run_stay_when_another_number_of_processes_would_have_others() -> None:
    """Three processes have 12 lanes with windows of 42 pairs, one has 16 with windows of 32."""
    opened = PairsOfRun(None, None, 0.0, [(StreamInMemory([30] * 48), 1.0)], None)
    whole: list[set[tuple[int, ...]]] = [set(), set()]
    states = []
    for process in range(3):
        feed = feed_of(opened, 96, 3, buffer=500)
        batches(feed, 0, 2, process, 3)
        states.append(feed.state_dict()["streams"][0])
        for held, batch in zip(whole, batches(feed, 2, 2, process, 3), strict=True):
            held.update(words(batch))
    again = feed_of(opened, 96, 1, buffer=500)
    marks = [mark for state in states for mark in state["marks"]]
    again.load_state_dict({"num_samples": 0, "streams": [{**states[0], "marks": marks}]})
    assert [set(words(batch)) for batch in batches(again, 2, 2)] == whole


def test_a_run_whose_batches_would_hold_others_is_refused() -> None:
    """Each process has as many pairs of a stream: 5 of 16 become 6 for two."""
    opened = PairsOfRun(Numbers("photos", 300, 900), None, 2.0, [(StreamInMemory([30] * 8), 1.0)], None)
    state = feed_of(opened, 16, 2).state_dict()
    with pytest.raises(ConfigError, match=r"holds 6 pairs of memory, and now it would hold 5.*as many processes"):
        feed_of(opened, 16, 1).load_state_dict(state)
    two = PairsOfRun(None, None, 0.0, [(StreamInMemory([30] * 8), 1.0)] * 2, None)
    with pytest.raises(ConfigError, match="began with 1 streams and now there are 2"):
        feed_of(two, 16).load_state_dict({**state, "num_samples": 0})


def test_streams_of_one_name_are_told_apart() -> None:
    shards = StreamInMemory([30] * 8)
    feed = feed_of(PairsOfRun(Numbers("memory", 300, 900), None, 2.0, [(shards, 1.0), (shards, 1.0)], None), 16)
    assert feed.pairs_in_batch == {"memory": 8, "memory (2)": 4, "memory (3)": 4}
    assert [dict(batch.num_pairs) for batch in batches(feed, 0, 2)] == [feed.pairs_in_batch] * 2


def test_the_ways_out_of_a_batch_without_a_pair_hold_for_several_processes() -> None:
    def opened(weight: float) -> PairsOfRun:
        return PairsOfRun(Numbers("photos", 300, 900), None, 20.0, [(StreamInMemory([30] * 8), weight)], None)

    with pytest.raises(ConfigError, match=r"make train\.batch_size 168 or more, or its weight 2\.9 or more"):
        feed_of(opened(1.0), 64, 8)
    assert feed_of(opened(1.0), 168, 8).pairs_in_batch["memory"] == feed_of(opened(2.9), 64, 8).pairs_in_batch["memory"]


def test_what_needs_to_know_every_pair_is_refused() -> None:
    stream: Stream = StreamInMemory([30] * 8)
    for data, key in (
        (DataConfig(replacement=True), "replacement"),
        (DataConfig(image_cache_gib=1), "image_cache_gib"),
    ):
        config = Config(data=data, train=TrainConfig(batch_size=16, steps=9))
        with pytest.raises(ConfigError, match=rf"data\.{key}: memory is a stream, whose pairs are not known"):
            build_feed(PairsOfRun(None, None, 0.0, [(stream, 1.0)], None), config, 1)
    of_tables = Config(data=DataConfig(replacement=True), train=TrainConfig(batch_size=16, steps=9))
    feed = build_feed(PairsOfRun(Numbers("photos", 30, 900), None, 1.0, [(stream, 1.0)], None), of_tables, 1)
    assert feed.fetched is not None and isinstance(feed.fetched.order, Draws)


def test_a_check_looks_at_a_pair_of_each_stream_however_few_are_asked_for() -> None:
    feed = feed_of(PairsOfRun(None, None, 0.0, [(StreamInMemory([30] * 8), 1.0)] * 3, None), 12)
    assert len(known_part(feed, 1)) >= 3


def test_the_length_of_a_run_on_streams_must_be_said() -> None:
    feed = mixed()
    assert feed.num_steps(TrainConfig(steps=7)) == 7 and feed.batches_per_epoch is None and feed.source is None
    with pytest.raises(ConfigError, match=r"train\.steps: null, and memory is a stream"):
        feed.num_steps(TrainConfig())


def test_a_stream_without_a_pair_in_a_batch_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"memory has weight 0\.01"):
        feed_of(PairsOfRun(Numbers("photos", 30, 900), None, 4.0, [(StreamInMemory([9]), 0.01)], None))


def test_weights_of_items_are_those_of_streams_and_sources() -> None:
    data = DataConfig(train=["demo", SourceConfig("demo:pairs", weight=2.0)])
    assert data.source_weights == [1.0, 2.0]


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (3.0, 2.0, 2.0), (1.0, 5.0, 1.0)])
def test_parts_are_read_in_as_many_lanes_whatever_the_number_of_processes(weights: tuple[float, float, float]) -> None:
    table, one, two = weights
    streams: list[tuple[Stream, float]] = [
        (StreamInMemory([9] * 64, name="a"), one),
        (StreamInMemory([9] * 64, name="b"), two),
    ]
    opened = PairsOfRun(Numbers("photos", 300, 900), None, table, streams, None)
    found = set()
    for num_processes in (1, 2, 4, 8):
        feed = feed_of(opened, batch_size=256, num_processes=num_processes)
        found.add(tuple((part.num_pairs, part.num_lanes) for part in feed.streams))
        for wanted, part in zip((one, two), feed.streams, strict=True):
            assert part.num_lanes >= 8 and abs(part.num_pairs - 256 * wanted / sum(weights)) <= 8
    assert len(found) == 1


def test_too_few_shards_for_the_processes_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    for num_shards, num_processes, told in ((10, 8, True), (16, 8, False), (1, 1, False), (3, 1, False)):
        opened = PairsOfRun(None, None, 0.0, [(StreamInMemory([9] * num_shards), 1.0)], None)
        feed_of(opened, batch_size=64, num_processes=num_processes)
        said = capsys.readouterr().err
        assert ("has 10 shards for 8 lanes" in said and "write it as 16 shards or more" in said) == told, said
