"""Which sample stands where: the order of the pairs of one source as a pure function of the seed, with no state.

Without replacement contrastive batch k of an epoch is positions kB … (k+1)B-1 of a permutation of the N samples, and
the last N mod B samples are left out of that epoch. With replacement every batch begins a random order of its own over
all samples. Process r takes its r-th contiguous part. Nothing depends on the number of processes or loader workers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import isqrt
from typing import Protocol

import numpy

from accel_clip.faults import ConfigError
from accel_clip.randomness import derive_seed

NUM_KNOWN_EPOCHS = 2  # a loader may stand in two epochs at once
NUM_ROUNDS = 8  # of hashing; four make an order that looks random


@dataclass(frozen=True)
class Place:
    """A position in the order of an epoch."""

    epoch: int
    """of the source that the place belongs to; with replacement, the contrastive batch of the run, since every batch
    draws anew"""
    position: int
    """in the order, counted from 0"""
    part: int = 0
    """the number of that source in a mixture"""


class BatchOrder(Protocol):
    """Which samples each contrastive batch of a run holds; samples are numbered over all sources."""

    @property
    def num_samples(self) -> int:
        """Return the number of samples of all sources."""
        ...

    @property
    def batch_size(self) -> int:
        """Return the number of pairs in a contrastive batch."""
        ...

    @property
    def batches_per_epoch(self) -> int:
        """Return the number of contrastive batches that hold as many pairs as there are."""
        ...

    def places(self, batch: int, process: int, num_processes: int) -> list[Place]:
        """Return the places of one process in contrastive batch `batch` of the run, counted from 0."""
        ...

    def candidates(self, place: Place) -> Iterator[int]:
        """Yield the sample at a place, then those that may replace it when it is unusable.

        Candidates of two places of one batch are never the same, so no batch can hold a sample twice, and every worker
        finds the replacement alone.
        """
        ...


@dataclass(frozen=True)
class SourceOrder(ABC):
    """The order of one source, in contrastive batches."""

    num_samples: int
    """of the source"""
    batch_size: int
    """pairs of the source in a contrastive batch"""
    seed: int
    """of the order"""

    def __post_init__(self) -> None:
        if self.num_samples < self.batch_size:
            raise ConfigError(
                f"train.batch_size: {self.batch_size} does not work: the training data holds {self.num_samples} "
                "samples, fewer than one batch: make the batch smaller or add data"
            )

    @property
    def batches_per_epoch(self) -> int:
        """Return the number of contrastive batches that hold as many pairs as there are, up to the rest of one."""
        return self.num_samples // self.batch_size

    @abstractmethod
    def place(self, batch: int, slot: int) -> Place:
        """Return the place of a slot of contrastive batch `batch` of the run."""

    @abstractmethod
    def candidates(self, place: Place) -> Iterator[int]:
        """Yield the sample at a place, then those that may replace it when it is unusable."""

    def places(self, batch: int, process: int, num_processes: int) -> list[Place]:
        """Return the places of one process in contrastive batch `batch` of the run, counted from 0."""
        return [self.place(batch, slot) for slot in own_slots(self.batch_size, process, num_processes)]


@dataclass(frozen=True)
class Order(SourceOrder):
    """Without replacement: every sample at most once an epoch."""

    known: dict[int, numpy.ndarray] = field(default_factory=dict, init=False, repr=False, compare=False)
    """the orders of the epochs that were asked for last, int64 [num_samples] each, by epoch"""

    def place(self, batch: int, slot: int) -> Place:
        """Return the place of a slot of contrastive batch `batch` of the run."""
        epoch, index = divmod(batch, self.batches_per_epoch)
        return Place(epoch, index * self.batch_size + slot)

    def sample(self, epoch: int, position: int) -> int:
        """Return the sample at a position of an epoch."""
        if epoch not in self.known:
            if len(self.known) == NUM_KNOWN_EPOCHS:
                del self.known[next(iter(self.known))]
            self.known[epoch] = permutation(self.seed, epoch, self.num_samples)
        return int(self.known[epoch][position])

    def candidates(self, place: Place) -> Iterator[int]:
        """Yield the sample at a place, then those that may replace it when it is unusable.

        They stand at the same slot of the following batches, then of the first ones, then in the left-out tail: slots
        never meet, so no batch can hold a sample twice.
        """
        epoch, position = place.epoch, place.position
        full = self.batches_per_epoch * self.batch_size
        slot = position % self.batch_size
        later = range(position, full, self.batch_size)
        earlier = range(slot, position, self.batch_size)
        tail = [full + slot] if full + slot < self.num_samples else []
        for each in (*later, *earlier, *tail):
            yield self.sample(epoch, each)


@dataclass(frozen=True)
class Draws(SourceOrder):
    """With replacement: every batch draws different samples out of all, whatever the batches before it held.

    A batch is the beginning of a random order of all samples that is its own; what follows replaces unusable ones.
    """

    def place(self, batch: int, slot: int) -> Place:
        """Return the place of a slot of contrastive batch `batch` of the run."""
        return Place(batch, slot)

    def candidates(self, place: Place) -> Iterator[int]:
        """Yield the sample at a place, then every `batch_size`-th behind it: slots never meet here either."""
        key = derive_seed(self.seed, "draws", place.epoch)
        for position in range(place.position, self.num_samples, self.batch_size):
            yield shuffled_sample(position, self.num_samples, key)


def permutation(seed: int, epoch: int, num_samples: int) -> numpy.ndarray:
    """Return the order of an epoch, int64 [num_samples]."""
    generator = numpy.random.Generator(numpy.random.PCG64(derive_seed(seed, "order", epoch)))
    return generator.permutation(num_samples)


def shuffled_sample(position: int, num_samples: int, key: int) -> int:
    """Return what stands at a position of the random order of `num_samples` samples that belongs to `key`.

    No other position is looked at, so the number of samples costs neither time nor memory. The order is a Feistel
    network over the two digits of the position to the base ⌈√N⌉, applied again where it leads out of the range (Black
    and Rogaway 2002, "Ciphers with Arbitrary Finite Domains").
    """
    base = isqrt(num_samples - 1) + 1
    while True:
        left, right = divmod(position, base)
        for number in range(NUM_ROUNDS):
            left, right = right, (left + derive_seed(key, number, right)) % base
        position = left * base + right
        if position < num_samples:
            return position


def own_slots(batch_size: int, process: int, num_processes: int) -> range:
    """Return the slots of a contrastive batch that one process takes."""
    share = batch_size // num_processes
    return range(process * share, (process + 1) * share)


def check_divisible(batch_size: int, num_processes: int) -> None:
    """Raise `ConfigError` unless every process gets the same number of pairs."""
    if batch_size % num_processes:
        lower = batch_size - batch_size % num_processes
        raise ConfigError(
            f"train.batch_size: {batch_size} cannot be divided evenly over {num_processes} processes: "
            f"use {lower + num_processes}{f' or {lower}' if lower else ''}"
        )
