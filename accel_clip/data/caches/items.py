"""Every different picture or caption of a source, loaded once: by worker processes, in chunks, behind a progress bar.

What cannot be used is handed on as the error that says why, for `folder.py` to keep beside the data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from PIL.Image import Image
from torch import Tensor
from torch.utils.data import Dataset

from accel_clip.console import progress_bar, say
from accel_clip.data.bad_samples import UnusableSample
from accel_clip.data.caches.folder import CacheFolder, Fingerprint
from accel_clip.data.captions import identity_hash
from accel_clip.data.sources.base import Pair, Source
from accel_clip.data.sources.stamps import stamps_of
from accel_clip.data.workers import Workers, usable_or_raise
from accel_clip.faults import DataError
from accel_clip.plugins import PluginsFirst

ItemOrError = Tensor | UnusableSample | DataError
Join = Callable[[list[Tensor]], Any]
"""From the items of a chunk to what is handed on of them."""


class Items(PluginsFirst, Dataset[ItemOrError]):
    """The different pictures or captions of a source.

    keys: int64 [n], ascending; what cannot be used is returned as the error: raised in a worker it would lose its type.
    """

    keys: numpy.ndarray

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, item: int) -> ItemOrError:
        try:
            return self.load(item)
        except (UnusableSample, DataError) as error:
            return error

    def load(self, item: int) -> Tensor:
        """Return an item as it is needed; raises `UnusableSample` and `DataError`."""
        raise NotImplementedError

    @cached_property
    def stamps(self) -> numpy.ndarray:
        """Return what tells whether items with the same keys have changed, uint64 [n], at the first look."""
        return numpy.zeros(len(self), numpy.uint64)


class DifferentPictures(Items):
    """The pictures of a source, decoded; those with one key once."""

    def __init__(self, source: Source, decode: Callable[[Image | bytes | Path], Tensor]) -> None:
        self.source, self.decode = source, decode
        hashes = (identity_hash("picture", source.key(sample)) for sample in range(len(source)))
        self.key_of_sample = numpy.fromiter(hashes, numpy.int64, len(source))
        self.keys, self.first_sample = numpy.unique(self.key_of_sample, return_index=True)

    def load(self, item: int) -> Tensor:
        """Return the pixels of a picture."""
        return self.decode(self.fetch(item).image)

    @cached_property
    def stamps(self) -> numpy.ndarray:
        """Return the stamps of the pictures' files."""
        return stamps_of(self.source, self.first_sample)

    def fetch(self, item: int) -> Pair:
        """Return the first pair with a picture; another where that one has a fault of its own, in its caption."""
        try:
            return self.source[int(self.first_sample[item])]
        except UnusableSample:
            for sample in numpy.flatnonzero(self.key_of_sample == self.keys[item])[1:]:
                with suppress(UnusableSample):
                    return self.source[int(sample)]
            raise


@dataclass(frozen=True)
class LoadedChunk:
    """A chunk of items, loaded."""

    inputs: Any
    """the usable ones joined, None without any"""
    usable: list[int]
    """where they stand in the chunk"""
    problems: dict[int, UnusableSample] = field(default_factory=dict)
    """what is wrong with the others, by their place"""


def load_chunks(items: Items, chunks: Sequence[Sequence[int]], workers: Workers, join: Join) -> Iterator[LoadedChunk]:
    """Yield chunks of items behind a progress bar on the first process.

    Raises what a worker could not get over, and `StopAsked`.
    """
    lists = [list(chunk) for chunk in chunks]
    loaded = workers.load(items, partial(collate_items, join), lists)
    for chunk in progress_bar(len(lists), "chunk", loaded, stays=False):
        yield usable_or_raise(chunk)


def collate_items(join: Join, loaded: list[ItemOrError]) -> LoadedChunk | DataError:
    """Return items as one chunk, or the first error that ends the run."""
    for each in loaded:
        if isinstance(each, DataError):
            return each
    usable = {row: each for row, each in enumerate(loaded) if isinstance(each, Tensor)}
    problems = {row: each for row, each in enumerate(loaded) if isinstance(each, UnusableSample)}
    return LoadedChunk(join(list(usable.values())) if usable else None, list(usable), problems)


@dataclass(frozen=True)
class CachePlan:
    """Which items are computed, and which are kept from the cache there is."""

    todo: numpy.ndarray
    """items to compute, int64 [m]"""
    kept: numpy.ndarray
    """items that are kept, int64 [k]"""
    rows: numpy.ndarray
    """from what rows of the cache, int64 [k]"""

    @classmethod
    def of_all(cls, items: Items) -> CachePlan:
        """Return the plan to compute all items."""
        none = numpy.zeros(0, numpy.int64)
        return cls(numpy.arange(len(items)), none, none)

    def chunks(self, num_items: int) -> list[list[int]]:
        """Return what is computed, in pieces of so many items."""
        return [self.todo[start : start + num_items].tolist() for start in range(0, len(self.todo), num_items)]

    def in_order(self, written: numpy.ndarray) -> numpy.ndarray:
        """Return by item what was written of it, first what was computed and then what was kept, [n, …] each."""
        return written[numpy.concatenate([self.todo, self.kept]).argsort()]

    def is_needless(self, unusable: Mapping[int, tuple[Any, ...]], problems: Mapping[int, UnusableSample]) -> bool:
        """Return whether all that was computed turned out to be as unusable as the cache there is says already."""
        are_same = all(unusable.get(key) == problem.args for key, problem in problems.items())
        return len(self.kept) > 0 and len(problems) == len(self.todo) and are_same


def plan_cache(
    accelerator: Accelerator, kind: type[CacheFolder], folder: Path, fingerprint: Fingerprint, items: Items, what: str
) -> CachePlan:
    """Return what must be computed, and say why: the first process looks for all; collective."""
    plan: Any = None
    if accelerator.is_main_process:
        plan = plan_by(kind.if_whole(folder), fingerprint, items, f"the {what} in {folder}")
    [plan] = broadcast_object_list([plan])
    return plan


def plan_by(old: CacheFolder | None, fingerprint: Fingerprint, items: Items, what: str) -> CachePlan:
    """Return what must be computed beside the cache there is, and say it."""
    stamps = items.stamps  # before anything is computed: what changes meanwhile is noticed at the next start
    changed = [] if old is None else old.what_changed(fingerprint)
    if changed:
        say(f"{what} were computed with other {', '.join(changed)}: they are replaced")
    if old is None or changed:
        return CachePlan.of_all(items)
    rows = old.rows(items.keys, stamps)
    plan = CachePlan(numpy.flatnonzero(rows < 0), numpy.flatnonzero(rows >= 0), rows[rows >= 0])
    say(f"{what} are used again{but_for(items.keys[plan.todo], old, len(items))}")
    return plan


def but_for(keys: numpy.ndarray, old: CacheFolder, num_items: int) -> str:
    """Return the end of a sentence that says how many items, by their keys, are not taken from a cache, and why."""
    were_unusable = numpy.isin(keys, list(old.unusable))
    are_known = numpy.isin(keys, old.keys)
    counts = {
        "changed": (are_known & ~were_unusable).sum(),
        "new": (~are_known).sum(),
        "unusable before": were_unusable.sum(),
    }
    told = [f"{count:,} {word}" for word, count in counts.items() if count]
    return f", but for {', '.join(told)} of {num_items:,}" if told else ""


def say_unusable(num_problems: int, num_items: int) -> None:
    """Say how many items cannot be used, if any."""
    if num_problems:
        say(f"{num_problems:,} of {num_items:,} are unusable; the run says so where it meets them")
