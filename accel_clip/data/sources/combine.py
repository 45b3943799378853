"""Sources made of sources: several as one, a part of one, and the part held out for evaluation."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from typing import Protocol, runtime_checkable

import numpy

from accel_clip.data.sources.base import HasHeldOut, Pair, Source
from accel_clip.randomness import fractions_of


@runtime_checkable
class HasIdentity(Protocol):
    """A source whose pictures other sources may show too: `identity` is a key that holds over all of them."""

    def identity(self, index: int) -> str:
        """Return the key that every source with this picture gives it."""
        ...


@runtime_checkable
class HasKeys(Protocol):
    """A source that gives all its keys faster together than one by one."""

    def keys(self) -> Iterator[str]:
        """Yield the key of every pair."""
        ...


class Concatenated:
    """The pairs of several sources, one source after the other."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self.sources = list(sources)
        self.name = " + ".join(source.name for source in sources)
        self.ends = list(accumulate(len(source) for source in sources))

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> Pair:
        number, inside = self.place(index)
        return self.sources[number][inside]

    def key(self, index: int) -> str:
        """Return a key that pictures of different sources share only when they are the same file or bytes."""
        number, inside = self.place(index)
        source, original = origin(self.sources[number], inside)
        return source.identity(original) if isinstance(source, HasIdentity) else f"{number}:{source.key(original)}"

    def place(self, index: int) -> tuple[int, int]:
        """Return the number of the source that holds a pair, and the pair's index in it."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = bisect_right(self.ends, index)
        return number, int(index) - (self.ends[number - 1] if number else 0)


class Subset:
    """The pairs of a source at `indices`, int64 [N]."""

    def __init__(self, source: Source, indices: numpy.ndarray) -> None:
        self.source, self.indices, self.name = source, indices, source.name

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Pair:
        return self.source[int(self.indices[index])]

    def key(self, index: int) -> str:
        """Return the key that the pair has in the whole source."""
        return self.source.key(int(self.indices[index]))


def origin(source: Source, index: int) -> tuple[Source, int]:
    """Return the source that a pair comes from and its index there, through subsets and concatenations."""
    if isinstance(source, Subset):
        return origin(source.source, int(source.indices[index]))
    if isinstance(source, Concatenated):
        number, inside = source.place(index)
        return origin(source.sources[number], inside)
    return source, index


def bases(source: Source) -> list[Source]:
    """Return the sources that a source is made of, through subsets and concatenations."""
    if isinstance(source, Subset):
        return bases(source.source)
    if isinstance(source, Concatenated):
        return [base for part in source.sources for base in bases(part)]
    return [source]


def source_names(source: Source) -> list[str]:
    """Return the names of the sources that were put together, made different where two are the same."""
    return told_apart(part.name for part in (source.sources if isinstance(source, Concatenated) else [source]))


def told_apart(names: Iterable[str]) -> list[str]:
    """Return names with a number behind those that stood there before."""
    found: list[str] = []
    for each in names:
        name, number = each, 2
        while name in found:
            name, number = f"{each} ({number})", number + 1
        found.append(name)
    return found


def count_by_source(source: Source, samples: numpy.ndarray) -> dict[str, int]:
    """Return how many of some samples, int64 [n], each source that was put together holds, by name."""
    if not isinstance(source, Concatenated):
        return {source.name: len(samples)}
    numbers = numpy.searchsorted(source.ends, samples, side="right")
    counts = numpy.bincount(numbers, minlength=len(source.ends))
    return dict(zip(source_names(source), counts.tolist(), strict=True))


def split_held_out(source: Source, fraction: float) -> tuple[Source, Source | None]:
    """Return the training part of a source and its held-out part, None when that has no pairs.

    A source that brings a held-out part keeps it. Of others about `fraction` of the pictures is held out, chosen by a
    hash of each picture's key alone: the same on every machine, for every seed, and when data is added.
    """
    if fraction == 0:
        return source, None
    if isinstance(source, Concatenated):
        training, held_out = zip(*(split_held_out(part, fraction) for part in source.sources), strict=True)
        present = [part for part in held_out if part is not None]
        return Concatenated(training), Concatenated(present) if present else None
    if isinstance(source, HasHeldOut):
        return source, source.held_out()
    keys = source.keys() if isinstance(source, HasKeys) else map(source.key, range(len(source)))
    chosen = numpy.fromiter((each < fraction for each in fractions_of("held out", keys)), bool, len(source))
    if not chosen.any():
        return source, None
    return Subset(source, numpy.flatnonzero(~chosen)), Subset(source, numpy.flatnonzero(chosen))
