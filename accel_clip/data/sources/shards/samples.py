"""The samples of tar shards as arrays: where the picture, the texts and the key of each one lie."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, replace

import numpy

from accel_clip.data.sources.shards.member_names import key_and_ending
from accel_clip.data.sources.shards.tar_index import KEY_END, TarIndex


@dataclass(frozen=True)
class ByteRanges:
    """Where one thing of every sample lies, -1 where there is none."""

    offsets: numpy.ndarray
    """in bytes, int64 [N]"""
    sizes: numpy.ndarray
    """in bytes, int64 [N]"""

    def of(self, chosen: numpy.ndarray) -> ByteRanges:
        """Return the places of some of the samples."""
        return ByteRanges(self.offsets[chosen], self.sizes[chosen])


@dataclass(frozen=True)
class Samples:
    """The samples of a shard, or of all."""

    keys: ByteRanges
    """where the keys are"""
    pictures: ByteRanges
    """where the pictures are"""
    texts: dict[str, ByteRanges]
    """where the texts are, by extension"""


def stems_of(index: TarIndex) -> Iterator[bytes]:
    """Yield the keys of a shard's samples."""
    start = 0
    for end in index.key_ends.tolist():
        yield index.keys[start:end]
        start = end


def endings_by_stem(index: TarIndex) -> dict[bytes, set[str]]:
    """Return the endings of the members that each key has."""
    found: dict[bytes, set[str]] = {stem: set() for stem in stems_of(index)}
    by_number = list(found.values())
    for sample, extension in zip(index.members["sample"].tolist(), index.members["extension"].tolist(), strict=True):
        by_number[sample].add(index.extensions[extension])
    return found


def regrouped(index: TarIndex, words: Set[bytes]) -> TarIndex:
    """Return an index whose endings have the words that belong to them, and whose samples have the shorter keys."""
    stems = list(stems_of(index)) if words else []
    shortened = [key_and_ending(stem, "", words) for stem in stems]
    if all(not before_ending for _, before_ending in shortened):
        return index
    keys: dict[bytes, int] = {}
    samples = numpy.array([keys.setdefault(key, len(keys)) for key, _ in shortened], "<u4")
    befores = list(dict.fromkeys(before_ending for _, before_ending in shortened))
    before = numpy.array([befores.index(before_ending) for _, before_ending in shortened])
    members = index.members.copy()
    pairs, numbers = numpy.unique(
        numpy.stack([before[members["sample"]], members["extension"]], axis=1), axis=0, return_inverse=True
    )
    members["sample"], members["extension"] = samples[members["sample"]], numbers.reshape(-1)
    extensions = tuple(f"{befores[first]}{index.extensions[last]}" for first, last in pairs.tolist())
    key_ends = numpy.cumsum([len(key) for key in keys], dtype=KEY_END)
    return replace(index, members=members, key_ends=key_ends, keys=b"".join(keys), extensions=extensions)


def samples_of(index: TarIndex, pictures: Sequence[str], texts: Sequence[str]) -> Samples:
    """Return the samples of a shard that have a picture or a text."""
    ends = index.key_ends.astype(numpy.int64)
    sizes = numpy.diff(ends, prepend=0)
    by_extension = {extension: places_of(index, [extension]) for extension in texts}
    picture = places_of(index, pictures)
    is_sample = picture.offsets >= 0
    for places in by_extension.values():
        is_sample |= places.offsets >= 0
    chosen = numpy.flatnonzero(is_sample)
    by_extension = {extension: places.of(chosen) for extension, places in by_extension.items()}
    return Samples(ByteRanges(ends - sizes, sizes).of(chosen), picture.of(chosen), by_extension)


def places_of(index: TarIndex, extensions: Sequence[str]) -> ByteRanges:
    """Return where each key's member with the first of the extensions lies; of two with one name the later counts."""
    offsets, sizes = numpy.full((2, index.num_samples), -1, numpy.int64)
    for extension in reversed(extensions):
        if extension in index.extensions:
            members = index.members[index.members["extension"] == index.extensions.index(extension)]
            offsets[members["sample"]] = members["offset"]
            sizes[members["sample"]] = members["size"]
    return ByteRanges(offsets, sizes)


def samples_of_all(parts: Sequence[Samples], indexes: Sequence[TarIndex]) -> Samples:
    """Return the samples of all shards; keys are counted from the first shard's first."""
    starts = numpy.cumsum([0, *(len(index.keys) for index in indexes)])
    keys = [ByteRanges(part.keys.offsets + start, part.keys.sizes) for part, start in zip(parts, starts, strict=False)]
    texts = {extension: concatenated([part.texts[extension] for part in parts]) for extension in parts[0].texts}
    present = {extension: places for extension, places in texts.items() if (places.offsets >= 0).any()}
    return Samples(concatenated(keys), concatenated([part.pictures for part in parts]), present)


def concatenated(parts: Sequence[ByteRanges]) -> ByteRanges:
    """Return the places of several shards as those of one."""
    offsets = numpy.concatenate([part.offsets for part in parts])
    return ByteRanges(offsets, numpy.concatenate([part.sizes for part in parts]))
