"""What fills a fixed part of every contrastive batch: pairs fetched by their number, or those of a stream."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import closing
from dataclasses import astuple, dataclass, field, replace
from typing import Any, Protocol

from accelerate.utils import gather_object

from accel_clip.config import DataConfig
from accel_clip.data.batch import Batch
from accel_clip.data.examples import Preparation
from accel_clip.data.lanes import LanePosition
from accel_clip.data.loader import BatchPlaces, TrainingPairs, iterate
from accel_clip.data.mixture import pairs_in_batch
from accel_clip.data.order import BatchOrder
from accel_clip.data.sources.base import Source, Stream
from accel_clip.data.sources.combine import count_by_source
from accel_clip.data.stream_loader import LaneBatches, Lanes, iterate_stream
from accel_clip.faults import ConfigError

Batches = Generator[Batch, None, None]


@dataclass(frozen=True)
class LoaderRank:
    """Who asks for batches: one process of several, with its loader workers."""

    process: int
    """its rank"""
    num_processes: int
    """of the run"""
    num_workers: int
    """that load data for it"""
    pin_memory: bool
    """whether batches come in page-locked memory"""


class BatchPart(Protocol):
    """What fills a fixed part of every contrastive batch; it says which pairs are whose in `Batch.num_pairs`."""

    @property
    def num_pairs(self) -> int:
        """Return how many pairs of a batch it fills."""
        ...

    @property
    def pairs_in_batch(self) -> Mapping[str, float]:
        """Return how many pairs of a batch come from each source, by its name, on average where it varies."""
        ...

    def open(self, batches: range, rank: LoaderRank, preparation: Preparation, data: DataConfig) -> Batches:
        """Return one process's part of the batches that are named; a stream gives those that follow."""
        ...


@dataclass(frozen=True)
class FetchedPart:
    """Pairs that are fetched by their number, in an order."""

    source: Source
    """what they are fetched from"""
    order: BatchOrder
    """which stands where in a batch"""

    @property
    def num_pairs(self) -> int:
        """Return how many pairs of a batch are fetched."""
        return self.order.batch_size

    @property
    def pairs_in_batch(self) -> Mapping[str, float]:
        """Return how many pairs of a batch come from each source."""
        return pairs_in_batch(self.source, self.order)

    def open(self, batches: range, rank: LoaderRank, preparation: Preparation, data: DataConfig) -> Batches:
        """Yield one process's part of the batches that are named."""
        places = BatchPlaces(self.order, batches, rank.process, rank.num_processes)
        pairs = TrainingPairs(self.source, self.order, preparation)
        with closing(iterate(pairs, places, data, rank.num_workers, rank.pin_memory)) as loaded:
            for batch in loaded:
                counts = count_by_source(self.source, batch.sample.numpy())
                yield replace(batch, num_pairs=counts)


@dataclass
class StreamPart:
    """Pairs of a stream, and where the lanes stand that this process reads."""

    stream: Stream
    """what they are read from"""
    name: str
    """tells the stream from the other sources"""
    num_pairs: int
    """in a batch of all processes"""
    num_lanes: int
    """of all processes"""
    window: int
    """items of a lane that are shuffled together"""
    seed: int
    """of the order"""
    positions: dict[int, LanePosition] = field(default_factory=dict)
    """where the lanes stand, by their number"""

    @property
    def pairs_in_batch(self) -> Mapping[str, float]:
        """Return how many pairs of a batch come from the stream."""
        return {self.name: self.num_pairs}

    def open(self, batches: range, rank: LoaderRank, preparation: Preparation, data: DataConfig) -> Batches:
        """Yield one process's part of the batches that follow, where it stands in the stream in their `lane_positions`.

        Raises `ConfigError` when the lanes cannot be divided among the processes.
        """
        if self.num_lanes % rank.num_processes:
            fitting = [str(number) for number in range(1, self.num_lanes + 1) if self.num_lanes % number == 0]
            raise ConfigError(
                f"data.train: the run reads {self.stream.name} in {self.num_lanes} lanes, which {rank.num_processes} "
                f"processes cannot divide: go on with {', '.join(fitting)}"
            )
        own = self.num_lanes // rank.num_processes
        numbers = range(rank.process * own, (rank.process + 1) * own)
        self.positions = {number: position for number, position in self.positions.items() if number in numbers}
        lanes = Lanes(self.stream, numbers, self.num_lanes, self.window, self.seed, dict(self.positions))
        parts = LaneBatches(lanes, self.num_pairs // self.num_lanes, preparation)
        with closing(iterate_stream(parts, data, rank.num_workers, rank.pin_memory)) as loaded:
            for batch in loaded:
                self.positions.update({position.lane: position for position in batch.lane_positions})
                yield replace(batch, num_pairs={self.name: len(batch)})

    def epochs(self) -> float:
        """Return how often the lanes of this process were read, on average."""
        passes = [position.epoch + position.share for position in self.positions.values()]
        return sum(passes) / len(passes) if passes else 0.0

    def state_dict(self) -> dict[str, Any]:
        """Return how the stream is read and where all lanes stand, as plain JSON; collective."""
        positions = gather_object([astuple(position) for position in self.positions.values()])
        return {
            "num_shards": self.stream.num_shards,
            "num_pairs": self.num_pairs,
            "num_lanes": self.num_lanes,
            "window": self.window,
            "marks": sorted(positions),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint; raises `ConfigError` when the stream, or its share of a batch, is another."""
        if state["num_shards"] != self.stream.num_shards:
            raise ConfigError(
                f"data.train: the run began with {state['num_shards']} shards of {self.stream.name} and now there are "
                f"{self.stream.num_shards}: bring them back, or name another output_dir"
            )
        if state["num_pairs"] != self.num_pairs:
            raise ConfigError(
                f"data.train: a batch of the run holds {state['num_pairs']} pairs of {self.name}, and now it would "
                f"hold {self.num_pairs}, which every process takes as many of: go on with as many processes as before"
            )
        self.num_lanes, self.window = state["num_lanes"], state["window"]
        self.positions = {position.lane: position for position in (LanePosition(*each) for each in state["marks"])}
