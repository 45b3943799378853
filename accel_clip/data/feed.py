"""Where the contrastive batches of a run come from: sources in one order, streams in lanes, or both in every batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from math import ceil
from typing import Any

from accel_clip.config import Config, DataConfig, TrainConfig
from accel_clip.console import say
from accel_clip.data.batch import joined_batch
from accel_clip.data.examples import Preparation
from accel_clip.data.feed_parts import Batches, BatchPart, FetchedPart, LoaderRank, StreamPart
from accel_clip.data.lanes import MOST_LANES, SHARDS_OF_A_LANE, LanePosition, choose_num_lanes
from accel_clip.data.mixture import (
    describe_batch,
    order_of,
    pairs_in_words,
    quotas,
    require_a_pair_of_each,
)
from accel_clip.data.order import check_divisible
from accel_clip.data.pairs import PairsOfRun
from accel_clip.data.sources.base import Source, Stream
from accel_clip.data.sources.combine import source_names, told_apart
from accel_clip.faults import ConfigError
from accel_clip.randomness import derive_seed


class Feed:
    """The contrastive batches of a run: each is filled by all parts together."""

    def __init__(self, parts: Sequence[BatchPart], data: DataConfig) -> None:
        self.parts, self.data = list(parts), data
        self.streams = [part for part in parts if isinstance(part, StreamPart)]
        self.fetched = next((part for part in parts if isinstance(part, FetchedPart)), None)

    @property
    def source(self) -> Source | None:
        """Return the pairs when all can be fetched by their number, None where there are streams."""
        return None if self.streams or self.fetched is None else self.fetched.source

    @property
    def num_samples(self) -> int:
        """Return how many pairs can be fetched by their number."""
        return 0 if self.fetched is None else self.fetched.order.num_samples

    @property
    def batches_per_epoch(self) -> int | None:
        """Return the number of contrastive batches in an epoch, None where there are streams."""
        return None if self.streams or self.fetched is None else self.fetched.order.batches_per_epoch

    @property
    def pairs_in_batch(self) -> dict[str, float]:
        """Return how many pairs of a batch come from each source, on average where it varies."""
        return {name: number for part in self.parts for name, number in part.pairs_in_batch.items()}

    def describe(self) -> str | None:
        """Return what a batch holds of each of several sources as a sentence, None for one source."""
        if not self.streams and self.fetched is not None:
            return describe_batch(self.fetched.source, self.fetched.order)
        held = self.pairs_in_batch
        return f"a batch holds {pairs_in_words(held)}" if len(held) > 1 else None

    def num_steps(self, train: TrainConfig) -> int:
        """Return the optimizer steps of a run; raises `ConfigError` where they are not known."""
        if train.steps is not None:
            return train.steps
        if self.batches_per_epoch is None:
            raise ConfigError(
                f"train.steps: null, and {self.streams[0].stream.name} is a stream, whose epochs have no known length: "
                "say how many optimizer steps the run takes"
            )
        return max(1, train.epochs * self.batches_per_epoch // train.accumulate)

    def epochs(self, num_batches: int) -> float:
        """Return how many epochs so many batches are; of streams, how often their shards were read on average."""
        if self.batches_per_epoch is not None:
            return num_batches / self.batches_per_epoch
        passes = [part.epochs() for part in self.streams]
        return sum(passes) / len(passes)

    def open(self, batches: range, rank: LoaderRank, preparation: Preparation) -> Batches:
        """Yield one process's part of the batches that are named; closed, it ends the loader workers."""
        whole = sum(part.num_pairs for part in self.parts)
        with ExitStack() as opened:
            loaded = []
            pin_parts = rank.pin_memory and len(self.parts) == 1  # what is joined is pinned afterwards
            for part in self.parts:
                num_workers = ceil(rank.num_workers * part.num_pairs / whole)
                own_rank = replace(rank, num_workers=num_workers, pin_memory=pin_parts)
                loaded.append(opened.enter_context(closing(part.open(batches, own_rank, preparation, self.data))))
            for _ in batches:
                batch = joined_batch([next(each) for each in loaded])
                yield batch.pin_memory() if rank.pin_memory and not pin_parts else batch

    def places(self) -> list[dict[int, LanePosition]]:
        """Return where this process stands in the streams."""
        return [dict(part.positions) for part in self.streams]

    def return_to(self, places: Sequence[dict[int, LanePosition]]) -> None:
        """Forget batches that were taken since, and not trained on: the next process takes them again."""
        for part, positions in zip(self.streams, places, strict=True):
            part.positions = positions

    def state_dict(self) -> dict[str, Any]:
        """Return what tells whether the data is the same, and where streams stand, as plain JSON; collective."""
        return {"num_samples": self.num_samples, "streams": [part.state_dict() for part in self.streams]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint; raises `ConfigError` when the data is another."""
        if state["num_samples"] != self.num_samples:
            raise ConfigError(
                f"data.train: the run began with {state['num_samples']} samples and now there are "
                f"{self.num_samples}: bring the data back, or name another output_dir"
            )
        if len(state["streams"]) != len(self.streams):
            raise ConfigError(
                f"data.train: the run began with {len(state['streams'])} streams and now there are "
                f"{len(self.streams)}: name the same ones, or another output_dir"
            )
        for part, saved in zip(self.streams, state["streams"], strict=True):
            part.load_state_dict(saved)


def build_feed(opened: PairsOfRun, config: Config, num_processes: int) -> Feed:
    """Return the contrastive batches of a run from its start; raises `ConfigError` where one cannot be filled."""
    batch_size, seed, replacement = config.train.batch_size, config.seed, config.data.replacement
    check_divisible(batch_size, num_processes)
    if not opened.streams:
        assert opened.source is not None
        order = order_of(opened.source, opened.weights, batch_size, seed, replacement)
        return Feed([FetchedPart(opened.source, order)], config.data)
    require_known_pairs(opened, config)
    of_source, *of_streams = shares(opened, batch_size, num_processes)
    parts: list[BatchPart] = []
    if opened.source is not None:
        order = order_of(opened.source, opened.weights, of_source, seed, replacement)
        parts.append(FetchedPart(opened.source, order))
    fetched_names = [] if opened.source is None else source_names(opened.source)
    names = told_apart([*fetched_names, *(stream.name for stream, _ in opened.streams)])[len(fetched_names) :]
    for number, ((stream, _), name, num_pairs) in enumerate(zip(opened.streams, names, of_streams, strict=True)):
        num_lanes = choose_num_lanes(stream, num_pairs, num_processes)
        warn_of_few_shards(stream, num_lanes)
        window = ceil(config.data.shuffle_buffer / num_lanes)
        parts.append(StreamPart(stream, name, num_pairs, num_lanes, window, derive_seed(seed, "stream", number)))
    return Feed(parts, config.data)


def warn_of_few_shards(stream: Stream, num_lanes: int) -> None:
    """Say when lanes have so few shards that some pairs are shown much more often than others."""
    enough = SHARDS_OF_A_LANE * num_lanes
    if num_lanes > 1 and stream.num_shards < enough:
        say(
            f"warning: {stream.name} has {stream.num_shards} shards for {num_lanes} lanes, so pairs in short ones are "
            f"shown more often: write it as {enough} shards or more, or start fewer processes"
        )


def require_known_pairs(opened: PairsOfRun, config: Config) -> None:
    """Raise `ConfigError` for settings that need to know every pair, as nobody does of a stream."""
    (stream, _), data = opened.streams[0], config.data
    given = {"train.cache_features": config.cached_tower, "data.image_cache_gib": data.image_cache_gib}
    if opened.source is None:
        given["data.replacement"] = data.replacement
    for key, value in given.items():
        if value:
            raise ConfigError(f"{key}: {stream.name} is a stream, whose pairs are not known beforehand: leave it away")


def shares(opened: PairsOfRun, batch_size: int, num_processes: int) -> list[int]:
    """Return how many pairs of a batch come from the sources together, and from each stream, by their weights."""
    of_source = [] if opened.source is None else [opened.source_weight]
    names = [*([] if opened.source is None else [opened.source.name]), *(stream.name for stream, _ in opened.streams)]
    weights = [*of_source, *(weight for _, weight in opened.streams)]
    unit = unit_of_parts(batch_size, num_processes, len(weights))
    held = quotas(weights, batch_size, unit)
    require_a_pair_of_each(names, weights, held, unit)
    return held if of_source else [0, *held]


def unit_of_parts(batch_size: int, num_processes: int, num_parts: int) -> int:
    """Return the number whose multiples the parts of a batch are, which is the processes' or a multiple of that.

    Parts that many numbers divide can be read in many lanes, by other numbers of processes too; their shares are off
    by an eighth of a part at most, on average.
    """
    most = batch_size // (8 * num_parts)
    fitting = (unit for unit in range(num_processes, MOST_LANES + 1, num_processes) if batch_size % unit == 0)
    return max((unit for unit in fitting if unit <= most), default=num_processes)
