"""Which sample stands where: the order of every epoch as a pure function of (seed, epoch).

Contrastive batch k of an epoch is positions kB … (k+1)B-1 of a permutation of the N samples; process r takes its r-th
contiguous part. The last N mod B samples are left out of that epoch. Nothing depends on the number of processes or
loader workers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy

from accel_clip.faults import ConfigError
from accel_clip.randomness import derive_seed


@dataclass(frozen=True)
class Place:
    """A position in the order of an epoch."""

    epoch: int
    position: int


@dataclass(frozen=True)
class Order:
    """The order of `num_samples` samples in contrastive batches of `batch_size`."""

    num_samples: int
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
        if self.num_samples < self.batch_size:
            raise ConfigError(
                f"train.batch_size: {self.batch_size} does not work: the training data holds {self.num_samples} "
                "samples, fewer than one batch: make the batch smaller or add data"
            )

    @property
    def batches_per_epoch(self) -> int:
        """Return the number of contrastive batches in an epoch."""
        return self.num_samples // self.batch_size

    def sample(self, epoch: int, position: int) -> int:
        """Return the sample at a position of an epoch."""
        return int(permutation(self.seed, epoch, self.num_samples)[position])

    def candidates(self, place: Place) -> Iterator[int]:
        """Yield the sample at a place, then those that may replace it when it is unusable.

        They stand at the same slot of the following batches, then of the first ones, then in the left-out tail: slots
        never meet, so no batch can hold a sample twice, and every worker finds the replacement alone.
        """
        epoch, position = place.epoch, place.position
        full = self.batches_per_epoch * self.batch_size
        slot = position % self.batch_size
        later = range(position, full, self.batch_size)
        earlier = range(slot, position, self.batch_size)
        tail = [full + slot] if full + slot < self.num_samples else []
        for each in (*later, *earlier, *tail):
            yield self.sample(epoch, each)

    def places(self, batch: int, process: int, num_processes: int) -> list[Place]:
        """Return the places of one process in contrastive batch `batch` of the run, counted from 0."""
        epoch, index = divmod(batch, self.batches_per_epoch)
        share = self.batch_size // num_processes
        start = index * self.batch_size + process * share
        return [Place(epoch, position) for position in range(start, start + share)]


@lru_cache(maxsize=2)
def permutation(seed: int, epoch: int, num_samples: int) -> numpy.ndarray:
    """Return the order of an epoch, int64 [num_samples]; a loader may stand in two epochs at once."""
    generator = numpy.random.Generator(numpy.random.PCG64(derive_seed(seed, "order", epoch)))
    return generator.permutation(num_samples)


def check_divisible(batch_size: int, num_processes: int) -> None:
    """Raise `ConfigError` unless every process gets the same number of pairs."""
    if batch_size % num_processes:
        lower = batch_size - batch_size % num_processes
        raise ConfigError(
            f"train.batch_size: {batch_size} cannot be divided evenly over {num_processes} processes: "
            f"use {lower + num_processes}{f' or {lower}' if lower else ''}"
        )
