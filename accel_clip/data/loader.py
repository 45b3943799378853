"""Batches for one process: samples fetched, decoded, augmented and tokenized in worker processes, ahead of the step."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass

from torch.utils.data import Dataset, Sampler

from accel_clip.config import DataConfig
from accel_clip.data.bad_samples import (
    MISSING,
    SAMPLES_TO_KNOW_THE_ROOT,
    BadSample,
    UnusableSample,
    too_few_usable,
)
from accel_clip.data.batch import Batch
from accel_clip.data.examples import Example, Preparation, batch_of
from accel_clip.data.order import BatchOrder, Place
from accel_clip.data.sources.base import Source
from accel_clip.data.sources.combine import origin
from accel_clip.data.workers import Workers, memory_shared, usable_or_raise
from accel_clip.faults import DataError, recognised
from accel_clip.plugins import PluginsFirst


@dataclass(frozen=True)
class UsableExample:
    """An example, and what was met in search of it."""

    example: Example
    """the first that can be used"""
    bad_samples: tuple[BadSample, ...]
    """the unusable ones before it"""


class TrainingPairs(PluginsFirst, Dataset[UsableExample | DataError]):
    """The pairs of a source by their place in the order; an unusable one is replaced by rule."""

    def __init__(self, source: Source, order: BatchOrder, preparation: Preparation) -> None:
        self.source, self.order, self.preparation = source, order, preparation

    def __getitem__(self, place: Place) -> UsableExample | DataError:
        """Return the pair at a place; an error is returned too, since raised in a worker it would lose its message."""
        try:
            return self.find(place)
        except DataError as error:
            return error

    def find(self, place: Place) -> UsableExample:
        """Return the pair at a place, or the first usable one that may stand there; raises `DataError` without any.

        The search ends early where nothing but missing files is met: a wrong folder is told before all of it is tried.
        """
        met: list[BadSample] = []
        for sample in self.order.candidates(place):
            try:
                pair = self.source[sample]
                example = self.preparation.example(pair, self.source.key(sample), sample, place.epoch)
                return UsableExample(example, tuple(met))
            except UnusableSample as problem:
                met.append(self.describe(problem, sample, place.epoch, its_turn=not met))
            if len(met) >= SAMPLES_TO_KNOW_THE_ROOT and all(bad.reason == MISSING for bad in met):
                break
        where = f"position {place.position} of epoch {place.epoch}"
        raise too_few_usable(f"data.train: no sample can be used at {where}", met)

    def describe(self, problem: UnusableSample, sample: int, epoch: int, its_turn: bool) -> BadSample:
        """Return the record of an unusable sample."""
        source, index = origin(self.source, sample)
        return BadSample(source.name, index, problem.reason, problem.path, problem.detail, epoch, its_turn)


class BatchPlaces(Sampler[list[Place]]):
    """The places of one process in the contrastive batches of the run that are named, over all epochs."""

    def __init__(self, order: BatchOrder, batches: range, process: int, num_processes: int) -> None:
        self.order, self.batches = order, batches
        self.process, self.num_processes = process, num_processes

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[Place]]:
        for batch in self.batches:
            yield self.order.places(batch, self.process, self.num_processes)


def collate_examples(fetched: Sequence[UsableExample | DataError]) -> Batch | DataError:
    """Return what was found as one batch, or the first error among it."""
    for item in fetched:
        if isinstance(item, DataError):
            return item
    found = [item for item in fetched if isinstance(item, UsableExample)]
    return batch_of([item.example for item in found], [bad for item in found for bad in item.bad_samples])


def iterate(
    pairs: TrainingPairs, places: BatchPlaces, config: DataConfig, num_workers: int, pin_memory: bool
) -> Generator[Batch, None, None]:
    """Yield the batches of one process, on the CPU; raises what a worker could not get over, and `WorkerKilled`.

    Closed, it ends its workers.
    """
    workers = Workers(num_workers, config.prefetch, pin_memory)
    with recognised(), memory_shared():
        for item in workers.load(pairs, collate_examples, places):
            yield usable_or_raise(item)
