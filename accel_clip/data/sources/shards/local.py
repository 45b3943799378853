"""Pairs in tar shards, as WebDataset writes them: `17.jpg`, `17.txt` and `17.json` in one shard make a sample.

What belongs together is seen in the names (see `member_names`); members that no sample uses are counted when shards are
opened.

Shards on a disk are indexed once and then map-style: shuffled over all of them, counted, resumed exactly. Only members
with a usual ending, or one that a setting names, are ever read; none is unpickled or unpacked, and keys are no paths.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy

from accel_clip import console
from accel_clip.data.bad_samples import WITHOUT_PICTURE, UnusableSample
from accel_clip.data.captions import LARGEST_CAPTION_BYTES
from accel_clip.data.sources.base import Pair, SourceOptions
from accel_clip.data.sources.shards.member_names import words_named, words_of_endings
from accel_clip.data.sources.shards.reader import ShardReader
from accel_clip.data.sources.shards.samples import Samples, endings_by_stem, regrouped, samples_of, samples_of_all
from accel_clip.data.sources.shards.tar_index import TarIndex, index_all
from accel_clip.data.sources.shards.texts import (
    LARGEST_PICTURE_BYTES,
    PICTURE_EXTENSIONS,
    RECORD,
    USUAL_TEXTS,
    SampleTexts,
    TextRule,
    endings_named,
    picture_extensions,
    picture_too_large,
    require_texts,
    text_encodings,
    text_rules,
    text_too_large,
    unread_in_words,
)
from accel_clip.data.sources.stamps import numbers_stamp
from accel_clip.data.sources.text_files import require_text_encoding
from accel_clip.faults import DataError
from accel_clip.typed import Count
from accel_clip.typed_json import WrongContent, read_json

NUM_RECORDS_TO_LOOK_AT = 20
SHARDS_TO_LEARN_FROM = 16
MOST_LINES = 10


class TarShards:
    """The pairs of tar shards, shard after shard, in each as their first members stand in it.

    `ends` counts samples up to each shard's end. All that grows with the number of samples is in
    arrays, which loader workers share.
    """

    def __init__(
        self,
        name: str,
        reader: ShardReader,
        samples: Samples,
        ends: Sequence[int],
        keys: bytes,
        captions: TextRule | None,
        labels: TextRule | None,
        encodings: tuple[str, ...],
    ) -> None:
        self.name, self.reader, self.samples, self.ends, self.key_bytes = name, reader, samples, list(ends), keys
        self.caption_rule, self.label_rule, self.encodings = captions, labels, encodings
        self.shard_names = names_from_common_folder(reader.paths)

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> Pair:
        texts = self.texts(index)
        captions, weights = texts.captions(self.caption_rule) if self.caption_rule else ((), ())
        label = texts.label(self.label_rule) if self.label_rule else None
        return Pair(self.picture(index), captions, label, weights=weights)

    def key(self, index: int) -> str:
        """Return the shard's name and the sample's key in it: the same wherever the shards lie."""
        return f"{self.shard_names[self.shard_of(index)]}/{self.member_key(index)}"

    def identity(self, index: int) -> str:
        """Return the key as all sources share it: the shard's absolute path and the sample's key in it."""
        return f"{self.reader.paths[self.shard_of(index)]}/{self.member_key(index)}"

    def stamp(self, index: int) -> int:
        """Return what tells whether a picture's shard has changed, or its place in it."""
        shard, places = self.shard_of(index), self.samples.pictures
        of_shard = self.reader.num_bytes[shard], self.reader.mtime_ns[shard]
        return numbers_stamp(*of_shard, int(places.offsets[index]), int(places.sizes[index]))

    def shard_of(self, index: int) -> int:
        """Return the number of the shard that holds a sample."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        return bisect_right(self.ends, index)

    def member_key(self, index: int) -> str:
        """Return a sample's key in its shard: the path up to the ending."""
        start = int(self.samples.keys.offsets[index])
        return self.key_bytes[start : start + int(self.samples.keys.sizes[index])].decode(errors="backslashreplace")

    def picture(self, index: int) -> bytes:
        """Return a picture's bytes; raises `UnusableSample`."""
        shard, places = self.shard_of(index), self.samples.pictures
        offset, num_bytes = int(places.offsets[index]), int(places.sizes[index])
        if offset < 0:
            raise UnusableSample("missing_file", WITHOUT_PICTURE, self.identity(index))
        if num_bytes > LARGEST_PICTURE_BYTES:
            raise picture_too_large(num_bytes, self.identity(index))
        return self.reader.read(shard, offset, num_bytes)

    def texts(self, index: int) -> SampleTexts:
        """Return the texts of a sample, which are read when they are asked for."""
        content = partial(self.text_content, index)
        return SampleTexts(self.samples.texts, content, self.identity(index), self.encodings)

    def text_content(self, index: int, extension: str) -> bytes | None:
        """Return the bytes of a sample's member with that extension, None without one; raises `UnusableSample`."""
        places = self.samples.texts.get(extension)
        if places is None or places.offsets[index] < 0:
            return None
        offset, num_bytes = int(places.offsets[index]), int(places.sizes[index])
        if num_bytes > LARGEST_CAPTION_BYTES:
            raise text_too_large(num_bytes, f"{self.identity(index)}.{extension}")
        return self.reader.read(self.shard_of(index), offset, num_bytes)


def open_shards(written: str, paths: Sequence[Path], options: SourceOptions) -> TarShards:
    """Return the pairs of tar shards, and say on the console which shards are cut short.

    written: what the user calls them. Raises `DataError` for shards without samples, `ConfigError` for members that are
    not there.
    """
    require_text_encoding(options.encoding)
    captions, labels = text_rules(options)
    rule = captions or labels
    assert rule is not None
    kept = index_all(paths, written, options.index_folder)
    indexes = with_whole_endings(kept, endings_named(rule, options.image_key))
    present = list(dict.fromkeys(extension for index in indexes for extension in index.extensions if extension))
    pictures = picture_extensions(present, options.image_key, written)
    texts = [*rule.extensions(present), RECORD]
    parts = [samples_of(index, pictures, texts) for index in indexes]
    source = TarShards(
        name=written,
        reader=ShardReader(paths, [index.num_bytes for index in indexes], [index.mtime_ns for index in indexes]),
        samples=samples_of_all(parts, indexes),
        ends=list(accumulate(len(part.keys.sizes) for part in parts)),
        keys=b"".join(index.keys for index in indexes),
        captions=captions,
        labels=labels,
        encodings=text_encodings(options.encoding),
    )
    say_what_is_lost(paths, indexes, [len(part.keys.sizes) for part in parts])
    say_members_left_out(written, indexes, source.samples, {*pictures, *texts})
    require_texts(written, rule, present, source.samples.texts, some_records(source))
    require_common_names(source)
    return source


def with_whole_endings(indexes: Sequence[TarIndex], named: Iterable[str]) -> list[TarIndex]:
    """Return indexes in which samples are what `member_names` takes for one, by the names in some of the shards.

    named: the endings that settings name.
    """
    words = words_named(named)
    for index in indexes[:: len(indexes) // SHARDS_TO_LEARN_FROM + 1]:
        words |= words_of_endings(endings_by_stem(index), PICTURE_EXTENSIONS, USUAL_TEXTS)
    return [regrouped(index, words) for index in indexes]


def names_from_common_folder(paths: Sequence[str]) -> list[str]:
    """Return the paths of shards from the folder that all lie in: their file names when there is but one folder."""
    folder = os.path.commonpath([os.path.dirname(path) for path in paths])
    return [os.path.relpath(path, folder).replace(os.sep, "/") for path in paths]


def some_records(source: TarShards) -> Iterator[dict[str, Any]]:
    """Yield some of the objects in .json members, from all over the source."""
    places = source.samples.texts.get(RECORD)
    having = numpy.flatnonzero(places.offsets >= 0) if places else numpy.zeros(0, numpy.int64)
    for index in having[:: len(having) // NUM_RECORDS_TO_LOOK_AT + 1]:
        try:
            yield source.texts(int(index)).record()
        except UnusableSample:
            continue


def require_common_names(source: TarShards) -> None:
    """Raise `DataError` for shards with pictures and with texts of which no two have one name."""
    pictures = source.samples.pictures.offsets >= 0
    texts = numpy.zeros_like(pictures)
    for places in source.samples.texts.values():
        texts |= places.offsets >= 0
    if pictures.any() and texts.any() and not (pictures & texts).any():
        names = source.member_key(int(pictures.argmax())), source.member_key(int(texts.argmax()))
        raise DataError(
            f"{source.name}: no text has the name of a picture (a picture is called {names[0]}, a text {names[1]}), "
            "and names, folders included, say what belongs together: pack them as 17.jpg and 17.txt"
        )


def say_members_left_out(name: str, indexes: Sequence[TarIndex], samples: Samples, read: Collection[str]) -> None:
    """Say how many members no sample uses: by their endings, and those whose sample has another of their kind."""
    counts = Counter[str]()
    for index in indexes:
        numbers = numpy.bincount(index.members["extension"], minlength=len(index.extensions)).tolist()
        counts.update(dict(zip(index.extensions, numbers, strict=True)))
    used = [samples.pictures, *samples.texts.values()]
    num_spare = sum(counts[each] for each in read) - sum(int((places.offsets >= 0).sum()) for places in used)
    unread = Counter({each: number for each, number in counts.items() if each not in read})
    if unread or num_spare:
        console.say(f"{name}: of {counts.total():,} members these are not read: {unread_in_words(unread, num_spare)}")


def say_what_is_lost(paths: Sequence[Path], indexes: Sequence[TarIndex], num_samples: Sequence[int]) -> None:
    """Say which shards are cut short, or hold fewer samples than the `sizes.json` beside them counts."""
    expected = {folder: written_sizes(folder / "sizes.json") for folder in {path.parent for path in paths}}
    lines = []
    for path, index, found in zip(paths, indexes, num_samples, strict=True):
        count = expected[path.parent].get(path.name)
        lost = f"; sizes.json counts {count:,}, so {count - found:,} are lost" if count and count > found else ""
        if index.problem or lost:
            lines.append(f"{path}: {index.problem or 'samples are missing'}: {found:,} samples found{lost}")
    for line in lines[:MOST_LINES]:
        console.say(f"warning: {line}")
    if len(lines) > MOST_LINES:
        console.say(f"warning: {len(lines) - MOST_LINES} more shards are cut short or lack samples")


def written_sizes(file: Path) -> dict[str, int]:
    """Return how many samples each shard has by the `sizes.json` that WebDataset's programs write, empty without."""
    if not file.is_file():
        return {}
    try:
        sizes: dict[str, int] = read_json(file, dict[str, Count])
        return sizes
    except (OSError, WrongContent) as error:
        console.say(f"warning: {file} cannot be read and is left out: {error}")
        return {}
