"""Pictures whose captions stand in files beside them: `a.txt`, `a.caption` or `a.png.txt` beside `a.png`, or `a.json`.

The same rule as in shards says which of them are read, and what in them is a caption.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pyarrow

from accel_clip import console
from accel_clip.data.bad_samples import UnusableSample
from accel_clip.data.captions import LARGEST_CAPTION_BYTES, caption_too_large
from accel_clip.data.sources.base import SourceOptions
from accel_clip.data.sources.class_names import some_names
from accel_clip.data.sources.folders.picture_files import PictureFiles
from accel_clip.data.sources.shards.texts import CAPTION_EXTENSIONS, RECORD, SampleTexts, TextRule, text_rules
from accel_clip.data.sources.tables.columns import Columns, usual_column
from accel_clip.data.sources.text_files import decodes, guess_encoding, require_text_encoding

ENDINGS = (*CAPTION_EXTENSIONS, RECORD)
FILES_TO_LOOK_AT = 500
RECORDS_TO_LOOK_AT = 20


class CaptionFiles(PictureFiles):
    """Pictures with files beside them, which are read when they are fetched; `endings` are columns of the table."""

    def __init__(
        self, name: str, table: pyarrow.Table, root: Path, limit: Path, rule: TextRule, encodings: tuple[str, ...]
    ) -> None:
        self.endings = [column for column in table.column_names if column in ENDINGS]
        super().__init__(name, table, Columns("image", tuple(self.endings), "label"), root, limit)
        self.rule, self.encodings = rule, encodings

    def captions(self, index: int) -> tuple[tuple[str, ...], tuple[float, ...]]:
        """Return the captions beside a picture and their weights; raises `UnusableSample`."""
        return self.beside(index).captions(self.rule)

    def beside(self, index: int) -> SampleTexts:
        """Return the texts beside a picture, which are read when they are asked for."""
        stem = os.path.splitext(self.stored(index)[1])[0]
        return SampleTexts(self.endings, partial(self.content, index), stem, self.encodings)

    def content(self, index: int, ending: str) -> bytes | None:
        """Return what is in the file with an ending beside a picture, None without one; raises `UnusableSample`."""
        name = self.table.column(ending)[int(index)].as_py() if ending in self.endings else None
        if name is None:
            return None
        try:
            file = self.file(name)
            if not file.is_file():  # reading a pipe would wait for ever
                raise UnusableSample("no_caption", f"{name} is no file", name)
            if (num_bytes := file.stat().st_size) > LARGEST_CAPTION_BYTES:
                raise caption_too_large(f"the file takes {num_bytes:,} bytes", name)
            return file.read_bytes()
        except OSError as error:
            raise UnusableSample("no_caption", f"{name}: {error.strerror or error}", name) from error


def open_caption_files(
    folder: Path, files: Sequence[str], pictures: pyarrow.Table, limit: Path, options: SourceOptions
) -> CaptionFiles | None:
    """Return pictures with the captions that stand in files beside them, None where none do.

    files: all in the folder, relative to it; pictures: the columns image and label; limit: what links must stay in.
    """
    names = pictures.column("image").to_pylist()
    beside = {ending: files_beside(names, files, f".{ending}") for ending in ENDINGS}
    found = {ending: sorted({name for name in column if name}) for ending, column in beside.items() if any(column)}
    rule = rule_for(folder, found, limit, options)
    if rule is None:
        return None
    texts = sorted(name for ending in found if ending != RECORD for name in found[ending])
    say_texts_left_out(folder, files, texts)
    encodings = caption_encodings(folder, texts, options.encoding, limit)
    for ending in found:
        pictures = pictures.append_column(ending, pyarrow.array(beside[ending], pyarrow.string()))
    return CaptionFiles(str(folder), pictures, folder, limit, rule, encodings)


def say_texts_left_out(folder: Path, files: Sequence[str], texts: Sequence[str]) -> None:
    """Say how many texts are those of no picture, as shards do; texts: those that are."""
    endings = tuple(f".{ending}" for ending in CAPTION_EXTENSIONS)
    others = {name for name in files if name.lower().endswith(endings)}.difference(texts)
    if others:
        why = "no picture is called so, or it has another"
        console.say(f"{folder}: {len(others):,} texts are not read, since {why}: {some_names(others)}")


def files_beside(pictures: Sequence[str], files: Sequence[str], ending: str) -> list[str | None]:
    """Return for each picture the file that is called as it is, with that ending for its own or behind it, or None."""
    by_stem = {name[: -len(ending)]: name for name in files if name.lower().endswith(ending)}
    return [by_stem.get(name) or by_stem.get(os.path.splitext(name)[0]) for name in pictures]


def rule_for(folder: Path, found: Mapping[str, Sequence[str]], limit: Path, options: SourceOptions) -> TextRule | None:
    """Return which of the files beside pictures hold captions, None where none do; says which of several are read.

    Words of `data.caption_key` that mean nothing here are columns of other sources.
    """
    keys = keys_of_records(folder, found.get(RECORD, ()), limit)
    texts = [ending for ending in found if ending != RECORD]
    rule, _ = text_rules(replace(options, needs="captions"))
    assert rule is not None, "captions are asked for"
    named = {word: weight for word, weight in rule.named.items() if word in texts or word in keys}
    if not (named or texts or usual_column(rule.usual_keys, keys)):
        return None
    if len(texts) > 1 and not named:
        console.say(f"{folder}: captions are read from .{texts[0]} files; data.caption_key {texts[1]} reads the others")
    return replace(rule, named=named)


def keys_of_records(folder: Path, names: Sequence[str], limit: Path) -> list[str]:
    """Return the keys of some of the objects in .json files."""
    keys: dict[str, None] = {}
    for name in names[:: len(names) // RECORDS_TO_LOOK_AT + 1]:
        try:
            record = json.loads(small_content(folder / name, limit) or b"null")
        except (ValueError, RecursionError):
            continue  # it is said when its turn comes
        keys.update(dict.fromkeys(record if isinstance(record, dict) else ()))
    return list(keys)


def caption_encodings(folder: Path, names: Sequence[str], encoding: str | None, limit: Path) -> tuple[str, ...]:
    """Return the encodings that captions are tried with: the given one, else UTF-8 and then what some look like."""
    require_text_encoding(encoding)
    if encoding is not None:
        return (encoding,)
    step = len(names) // FILES_TO_LOOK_AT + 1
    contents = [raw for name in names[::step] if (raw := small_content(folder / name, limit)) is not None]
    guess = guess_encoding(line for raw in contents if not decodes(raw) for line in raw.splitlines(keepends=True))
    if guess is None:
        return ("utf-8",)
    console.say(f"{folder}: captions that are not UTF-8 are read as {guess}; if they look wrong, set data.encoding")
    return ("utf-8", guess)


def small_content(file: Path, limit: Path) -> bytes | None:
    """Return the bytes of a file, None for one that holds no captions or lies outside: said when it is fetched."""
    try:
        real = file.resolve()
        small = real.is_file() and real.stat().st_size <= LARGEST_CAPTION_BYTES
        return real.read_bytes() if small and real.is_relative_to(limit.resolve()) else None
    except OSError:
        return None
