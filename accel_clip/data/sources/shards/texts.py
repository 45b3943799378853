"""Captions and labels in the members of a sample of tar shards: in text members, or under keys of the .json member."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from accel_clip.data.bad_samples import UnusableSample
from accel_clip.data.captions import caption_too_large, weighted
from accel_clip.data.sources.base import SourceOptions
from accel_clip.data.sources.endings import PICTURE_SUFFIXES
from accel_clip.data.sources.tables.cells import captions_in, captions_of_text, storable
from accel_clip.data.sources.tables.columns import CAPTION_COLUMNS, LABEL_COLUMNS, usual_column
from accel_clip.data.sources.text_files import decode_text
from accel_clip.faults import ConfigError, DataError, nearest, some_of

PICTURE_EXTENSIONS = tuple(sorted(suffix.removeprefix(".") for suffix in PICTURE_SUFFIXES))
CAPTION_EXTENSIONS = ("txt", "caption")
LABEL_EXTENSIONS = ("cls", "label")
USUAL_TEXTS = (*CAPTION_EXTENSIONS, *LABEL_EXTENSIONS)
RECORD = "json"
LARGEST_PICTURE_BYTES = 1 << 30


@dataclass(frozen=True)
class TextRule:
    """Where captions, or labels, are: in members with an extension of theirs, or under a key of the .json member."""

    setting: str
    """that names them, for messages"""
    named: Mapping[str, float]
    """extensions and JSON keys, all of which are read, with their weights; without any, the first usual one there is"""
    usual_extensions: tuple[str, ...]
    """of members, the preferred first"""
    usual_keys: tuple[str, ...]
    """of the .json member, the preferred first"""
    each_line: bool | None = None
    """whether each line of a text is one; None = unless blank lines are between them"""

    def extensions(self, present: Collection[str]) -> list[str]:
        """Return the extensions of members that hold such a text and nothing else."""
        return [word for word in self.named or self.usual_extensions if word in present and word != RECORD]

    def keys(self, present: Collection[str]) -> list[str]:
        """Return the JSON keys that are named: the words that are no extension."""
        return [word for word in self.named if word not in self.extensions(present)]


@dataclass(frozen=True)
class SampleTexts:
    """The texts of one sample."""

    extensions: Collection[str]
    """those that are known to be of members with texts"""
    content: Callable[[str], bytes | None]
    """from an extension to the member's bytes, None without one (it may raise `UnusableSample`)"""
    path: str
    """of the sample, for messages"""
    encodings: tuple[str, ...]
    """that texts are tried with, in order"""

    def captions(self, rule: TextRule) -> tuple[tuple[str, ...], tuple[float, ...]]:
        """Return the captions and their weights (see `captions.weighted`); raises `UnusableSample`."""
        try:
            return weighted(self.by_key(rule), rule.named)
        except UnusableSample as problem:
            raise UnusableSample(problem.reason, problem.detail, problem.path or self.path) from problem

    def label(self, rule: TextRule) -> str | None:
        """Return the first label, or None when there is none; raises `UnusableSample`."""
        return next(iter(weighted(self.by_key(rule), {})[0]), None)

    def by_key(self, rule: TextRule) -> dict[str, list[str]]:
        """Return the texts in all that the setting names, else in the first usual member or under a usual JSON key."""
        if rule.named:
            keys = rule.keys(self.extensions)
            record = self.record() if keys else {}
            return {
                word: texts_in_json(record.get(word)) if word in keys else self.texts(word, rule) or []
                for word in rule.named
            }
        for extension in rule.extensions(self.extensions):
            texts = self.texts(extension, rule)
            if texts is not None:
                return {extension: texts}
        record = self.record()
        key = usual_column(rule.usual_keys, list(record))
        return {} if key is None else {key: texts_in_json(record[key])}

    def record(self) -> dict[str, Any]:
        """Return the object in the .json member, empty without one; raises `UnusableSample`."""
        text = self.text(RECORD)
        record = {} if text is None else self.parsed(text, RECORD)
        return record if isinstance(record, dict) else {}

    def parsed(self, text: str, extension: str) -> Any:
        """Return the JSON value in the member with that extension; raises `UnusableSample`."""
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            detail, path = f"the member is not JSON that can be read: {error}", f"{self.path}.{extension}"
            raise UnusableSample("caption_encoding", detail, path) from error

    def texts(self, extension: str, rule: TextRule) -> list[str] | None:
        """Return the texts in the member with that extension, None without one; raises `UnusableSample`."""
        text = self.text(extension)
        if text is None:
            return None
        if extension.endswith(f".{RECORD}"):
            return texts_in_json(usual_value(self.parsed(text, extension), rule))
        return captions_of_text(text, rule.each_line)

    def text(self, extension: str) -> str | None:
        """Return the text in the member with that extension, None without one; raises `UnusableSample`."""
        content = self.content(extension)
        try:
            return None if content is None else decode_text(content, self.encodings)
        except UnicodeDecodeError as error:
            detail = f"{error}: name the encoding of captions by data.encoding"
            raise UnusableSample("caption_encoding", detail, f"{self.path}.{extension}") from error


def picture_too_large(num_bytes: int, path: str) -> UnusableSample:
    """Return the error for a picture above the limit."""
    return UnusableSample("too_large", f"the picture takes {num_bytes:,} bytes", path)


def text_too_large(num_bytes: int, path: str) -> UnusableSample:
    """Return the error for a member with a text above the limit."""
    return caption_too_large(f"the member takes {num_bytes:,} bytes", path)


def text_encodings(encoding: str | None) -> tuple[str, ...]:
    """Return the encodings that texts are tried with, in order."""
    return ("utf-8",) if encoding is None else ("utf-8", encoding)


def text_rules(options: SourceOptions) -> tuple[TextRule | None, TextRule | None]:
    """Return where captions are and where labels are; only what is needed is read."""
    if options.needs == "labels":
        named = {options.label_key: 1.0} if options.label_key else {}
        return None, TextRule("eval.label_key", named, LABEL_EXTENSIONS, LABEL_COLUMNS, each_line=False)
    named = dict(options.captions)
    return TextRule("data.caption_key", named, CAPTION_EXTENSIONS, CAPTION_COLUMNS, options.caption_lines), None


def texts_in_json(value: Any) -> list[str]:
    """Return the texts in a JSON value: one, or those in a list; raises `UnusableSample` for objects."""
    return [storable(text) for text in captions_in(value)]


def usual_value(value: Any, rule: TextRule) -> Any:
    """Return what stands in an object under a usual key, or under its only one; other values as they are."""
    if not isinstance(value, dict):
        return value
    key = usual_column(rule.usual_keys, list(value)) or (next(iter(value)) if len(value) == 1 else None)
    return value if key is None else value[key]


def endings_named(rule: TextRule, image_key: str | None) -> list[str]:
    """Return the words of settings that may be endings of members."""
    return [*rule.named, *([image_key.removeprefix(".")] if image_key else [])]


def unread_in_words(counts: Mapping[str, int], num_spare: int = 0) -> str:
    """Return how many members with each ending are not read, and how many whose sample has another of their kind."""
    usual = sorted(counts, key=lambda ending: (-counts[ending], ending))
    words = [f"{counts[ending]:,} {f'.{ending}' if ending else 'hidden or without an ending'}" for ending in usual]
    spare = [f"{num_spare:,} whose sample has another picture, or another of that name"] if num_spare else []
    return some_of([*spare, *words])


def picture_extensions(present: Sequence[str], image_key: str | None, name: str) -> tuple[str, ...]:
    """Return the extensions of pictures, the preferred first; raises `ConfigError` when no member has one."""
    if not present:
        raise DataError(f"{name}: the shards hold no samples: they need members such as 17.jpg and 17.txt")
    if image_key is not None:
        named = image_key.lower().removeprefix(".")
        if named not in present:
            hint = nearest(named, present) or "."
            raise ConfigError(f"data.image_key: {name} has no members '.{named}'{hint} It has: {some_of(present)}")
        return (named,)
    if not set(PICTURE_EXTENSIONS) & set(present):
        raise ConfigError(
            f"data.image_key: {name} has no pictures by their usual endings ({', '.join(PICTURE_EXTENSIONS)}): name "
            f"one of those it has: {some_of(present)}"
        )
    return PICTURE_EXTENSIONS


def require_texts(
    name: str, rule: TextRule, present: Sequence[str], texts: Collection[str], records: Iterable[dict[str, Any]]
) -> None:
    """Raise `ConfigError` unless samples have the captions or labels that the rule reads.

    present: the extensions of all members; texts: of those that may hold texts; records: some of the .json members.
    """
    keys, extensions = rule.keys(texts), rule.extensions(texts)
    if extensions and not keys:
        return
    looked_at = list(records)
    if not looked_at and RECORD in texts:
        return  # none of those looked at can be read: each is counted when its turn comes
    known = list(dict.fromkeys(key for record in looked_at for key in record))
    unknown = next((key for key in keys if key not in known), None)
    members = f"Its members: {some_of(present)}" + (f"; keys in .json: {some_of(known)}" if known else "")
    if unknown is not None:
        hint = nearest(unknown, [*present, *known]) or "."
        raise ConfigError(f"{rule.setting}: {name} has no member or JSON key '{unknown}'{hint} {members}")
    if not keys and usual_column(rule.usual_keys, known) is None:
        usual = f".{', .'.join(rule.usual_extensions)} members or JSON keys {', '.join(rule.usual_keys)}"
        raise ConfigError(f"{rule.setting}: {name} has none of the usual {usual}: name another. {members}")
