"""Pairs in tar shards, as WebDataset writes them: `17.jpg`, `17.txt` and `17.json` in one shard make a sample.

Shards on a disk are indexed once and then map-style: shuffled over all of them, counted, resumed exactly. Only members
with a usual ending, or one that a setting names, are ever read; none is unpickled or unpacked, and keys are no paths.
"""

from __future__ import annotations

import json
import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy

from accel_clip import console
from accel_clip.data.bad_samples import UnusableSample
from accel_clip.data.captions import LARGEST_CAPTION_BYTES, caption_too_large
from accel_clip.data.sources.base import Pair
from accel_clip.data.sources.shard_names import find_shards
from accel_clip.data.sources.shard_reader import ShardReader
from accel_clip.data.sources.shard_samples import Samples, joined, samples_of
from accel_clip.data.sources.table import CAPTION_COLUMNS, LABEL_COLUMNS, parts_of, storable, usual_column
from accel_clip.data.sources.tar_index import TarIndex, index_all
from accel_clip.data.text_files import decode_text, require_text_encoding
from accel_clip.faults import ConfigError, DataError, nearest

if TYPE_CHECKING:
    from accel_clip.data.sources.resolve import SourceOptions

PICTURE_EXTENSIONS = ("bmp", "gif", "jpeg", "jpg", "png", "ppm", "tif", "tiff", "webp")
CAPTION_EXTENSIONS = ("txt",)
LABEL_EXTENSIONS = ("cls", "label")
RECORD = "json"
LARGEST_PICTURE_BYTES = 1 << 30
NUM_RECORDS_TO_LOOK_AT = 20
MOST_NAMES_SHOWN = 20
MOST_LINES = 10


@dataclass(frozen=True)
class TextRule:
    """Where captions, or labels, are: in members with an extension of theirs, or under a key of the .json member."""

    setting: str
    named: tuple[str, ...]
    """extensions and JSON keys, all of which are read; without any, the first usual one that a sample has"""
    usual_extensions: tuple[str, ...]
    usual_keys: tuple[str, ...]

    def extensions(self, present: Iterable[str]) -> list[str]:
        """Return the extensions of members that hold such a text and nothing else."""
        return [word for word in self.named or self.usual_extensions if word in present and word != RECORD]

    def keys(self, present: Iterable[str]) -> list[str]:
        """Return the JSON keys that are named: the words that are no extension."""
        return [word for word in self.named if word not in self.extensions(present)]


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
        captions = self.read_texts(index, self.caption_rule) if self.caption_rule else []
        labels = self.read_texts(index, self.label_rule) if self.label_rule else []
        return Pair(self.picture(index), tuple(captions), next(iter(labels), None))

    def key(self, index: int) -> str:
        """Return the shard's name and the sample's key in it: the same wherever the shards lie."""
        return f"{self.shard_names[self.shard_of(index)]}/{self.member_key(index)}"

    def identity(self, index: int) -> str:
        """Return the key as all sources share it: the shard's absolute path and the sample's key in it."""
        return f"{self.reader.paths[self.shard_of(index)]}/{self.member_key(index)}"

    def shard_of(self, index: int) -> int:
        """Return the number of the shard that holds a sample."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        return bisect_right(self.ends, index)

    def member_key(self, index: int) -> str:
        """Return a sample's key in its shard: the path up to the first dot of the file name."""
        start = int(self.samples.keys.offsets[index])
        return self.key_bytes[start : start + int(self.samples.keys.sizes[index])].decode(errors="backslashreplace")

    def picture(self, index: int) -> bytes:
        """Return a picture's bytes; raises `UnusableSample`."""
        shard, places = self.shard_of(index), self.samples.pictures
        offset, num_bytes = int(places.offsets[index]), int(places.sizes[index])
        if offset < 0:
            raise UnusableSample("missing_file", "the sample has no picture", self.identity(index))
        if num_bytes > LARGEST_PICTURE_BYTES:
            raise UnusableSample("too_large", f"the picture takes {num_bytes:,} bytes", self.identity(index))
        return self.reader.read(shard, offset, num_bytes)

    def read_texts(self, index: int, rule: TextRule) -> list[str]:
        """Return a sample's captions or labels without surrounding white space, empty ones left out."""
        found = self.named_texts(index, rule) if rule.named else self.usual_texts(index, rule)
        return [text.strip() for text in found if text.strip()]

    def named_texts(self, index: int, rule: TextRule) -> list[str]:
        """Return the texts in all members and under all JSON keys that the setting names."""
        keys = rule.keys(self.samples.texts)
        record = self.record(index) if keys else {}
        texts = (
            [self.text(word, index) or ""] if word not in keys else texts_in(record.get(word)) for word in rule.named
        )
        return [text for several in texts for text in several]

    def usual_texts(self, index: int, rule: TextRule) -> list[str]:
        """Return the text in the first usual member that the sample has, else under the first usual JSON key."""
        for extension in rule.extensions(self.samples.texts):
            text = self.text(extension, index)
            if text is not None:
                return [text]
        record = self.record(index)
        return texts_in(record.get(usual_column(rule.usual_keys, list(record)) or ""))

    def record(self, index: int) -> dict[str, Any]:
        """Return the object in a sample's .json member, empty without one; raises `UnusableSample`."""
        text = self.text(RECORD, index)
        try:
            record = {} if text is None else json.loads(text)
        except (ValueError, RecursionError) as error:
            path = f"{self.identity(index)}.{RECORD}"
            raise UnusableSample(
                "caption_encoding", f"the member is not JSON that can be read: {error}", path
            ) from error
        return record if isinstance(record, dict) else {}

    def text(self, extension: str, index: int) -> str | None:
        """Return the text in a sample's member with that extension, None without one; raises `UnusableSample`."""
        shard, places = self.shard_of(index), self.samples.texts.get(extension)
        if places is None or places.offsets[index] < 0:
            return None
        offset, num_bytes, path = (
            int(places.offsets[index]),
            int(places.sizes[index]),
            f"{self.identity(index)}.{extension}",
        )
        if num_bytes > LARGEST_CAPTION_BYTES:
            raise caption_too_large(f"the member takes {num_bytes:,} bytes", path)
        try:
            return decode_text(self.reader.read(shard, offset, num_bytes), self.encodings)
        except UnicodeDecodeError as error:
            detail = f"{error}: name the encoding of captions by data.encoding"
            raise UnusableSample("caption_encoding", detail, path) from error


def open_shards(written: str, options: SourceOptions) -> TarShards:
    """Return the pairs of tar shards, and say on the console which shards are cut short.

    Raises `DataError` for shards that are missing or hold no samples, `ConfigError` for members that are not there.
    """
    require_text_encoding(options.encoding)
    paths = find_shards(written)
    indexes = index_all(paths, written)
    present = list(dict.fromkeys(extension for index in indexes for extension in index.extensions))
    pictures = picture_extensions(present, options.image_key, written)
    captions, labels = text_rules(options)
    texts = [word for rule in (captions, labels) if rule for word in rule.extensions(present)]
    parts = [samples_of(index, pictures, [*texts, RECORD]) for index in indexes]
    source = TarShards(
        name=written,
        reader=ShardReader(paths, [index.num_bytes for index in indexes], [index.mtime_ns for index in indexes]),
        samples=joined(parts, indexes),
        ends=list(accumulate(len(part.keys.sizes) for part in parts)),
        keys=b"".join(index.keys for index in indexes),
        captions=captions,
        labels=labels,
        encodings=("utf-8",) if options.encoding is None else ("utf-8", options.encoding),
    )
    say_what_is_lost(paths, indexes, [len(part.keys.sizes) for part in parts])
    require_texts(source, captions or labels, present)
    return source


def picture_extensions(present: Sequence[str], image_key: str | None, name: str) -> tuple[str, ...]:
    """Return the extensions of pictures, the preferred first; raises `ConfigError` when no member has one."""
    if not present:
        raise DataError(f"{name}: the shards hold no samples: they need members such as 17.jpg and 17.txt")
    if image_key is not None:
        named = image_key.lower().removeprefix(".")
        if named not in present:
            hint = nearest(named, present) or "."
            raise ConfigError(f"data.image_key: {name} has no members '.{named}'{hint} It has: {shown(present)}")
        return (named,)
    if not set(PICTURE_EXTENSIONS) & set(present):
        raise ConfigError(
            f"data.image_key: {name} has no pictures by their usual endings ({', '.join(PICTURE_EXTENSIONS)}): name "
            f"one of those it has: {shown(present)}"
        )
    return PICTURE_EXTENSIONS


def text_rules(options: SourceOptions) -> tuple[TextRule | None, TextRule | None]:
    """Return where captions are and where labels are; only what is needed is read."""
    if options.needs == "labels":
        named = (options.label_key,) if options.label_key else ()
        return None, TextRule("eval.label_key", named, LABEL_EXTENSIONS, LABEL_COLUMNS)
    return TextRule("data.caption_key", tuple(options.captions), CAPTION_EXTENSIONS, CAPTION_COLUMNS), None


def names_from_common_folder(paths: Sequence[str]) -> list[str]:
    """Return the paths of shards from the folder that all lie in: their file names when there is but one folder."""
    folder = os.path.commonpath([os.path.dirname(path) for path in paths])
    return [os.path.relpath(path, folder).replace(os.sep, "/") for path in paths]


def texts_in(value: Any) -> list[str]:
    """Return the texts in a JSON value: one, or those in a list; objects and what is no text have none."""
    parts = (part for part in parts_of(value) if isinstance(part, (str, int)) and not isinstance(part, bool))
    return [storable(str(part)) for part in parts]


def require_texts(source: TarShards, rule: TextRule | None, present: Sequence[str]) -> None:
    """Raise `ConfigError` unless samples have the captions or labels that the rule reads."""
    assert rule is not None
    keys, extensions = rule.keys(source.samples.texts), rule.extensions(source.samples.texts)
    if extensions and not keys:
        return
    records = list(some_records(source))
    if not records and RECORD in source.samples.texts:
        return  # none of those looked at can be read: each is counted when its turn comes
    known = list(dict.fromkeys(key for record in records for key in record))
    unknown = next((key for key in keys if key not in known), None)
    members = f"Its members: {shown(present)}" + (f"; keys in .json: {shown(known)}" if known else "")
    if unknown is not None:
        hint = nearest(unknown, [*present, *known]) or "."
        raise ConfigError(f"{rule.setting}: {source.name} has no member or JSON key '{unknown}'{hint} {members}")
    if not keys and usual_column(rule.usual_keys, known) is None:
        usual = f".{', .'.join(rule.usual_extensions)} members or JSON keys {', '.join(rule.usual_keys)}"
        raise ConfigError(f"{rule.setting}: {source.name} has none of the usual {usual}: name another. {members}")


def some_records(source: TarShards) -> Iterator[dict[str, Any]]:
    """Yield some of the objects in .json members, from all over the source."""
    places = source.samples.texts.get(RECORD)
    having = numpy.flatnonzero(places.offsets >= 0) if places else numpy.zeros(0, numpy.int64)
    for index in having[:: len(having) // NUM_RECORDS_TO_LOOK_AT + 1]:
        try:
            yield source.record(int(index))
        except UnusableSample:
            continue


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
    try:
        written = json.loads(file.read_bytes())
        return {str(name): int(count) for name, count in written.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        console.say(f"warning: {file} cannot be read and is left out: {error}")
        return {}


def shown(names: Sequence[str]) -> str:
    """Return names for a message, the first of many."""
    return ", ".join(names[:MOST_NAMES_SHOWN]) + (", …" if len(names) > MOST_NAMES_SHOWN else "")
