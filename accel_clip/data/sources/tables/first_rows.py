"""What some rows of a table show: columns that are not what they are taken for, and paths written in another way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from accel_clip import console
from accel_clip.data.bad_samples import UnusableSample
from accel_clip.data.sources.tables.delimited import ADDRESSES
from accel_clip.data.sources.tables.picture_paths import find_picture
from accel_clip.data.sources.tables.table import TableSource
from accel_clip.faults import ConfigError, DataError

ROWS_TO_LOOK_AT = 200
Found = TypeVar("Found")


def look_at_rows(source: TableSource) -> None:
    """Raise for a column in which most cells are no pictures, or no captions, and say how paths are read.

    A column is what most of its cells are; the others are counted when their turn comes. Raises `ConfigError`, and
    `DataError` for addresses.
    """
    stored = most_of(source, "data.image_key", source.stored)
    for column in source.columns.captions:
        most_of(source, "data.caption_key", partial(source.texts, column))
    paths = [path for content, path in stored if content is None and path]
    if sum(path.startswith(ADDRESSES) for path in paths) > len(paths) / 2:
        raise DataError(
            f"{source.name}: the column '{source.columns.image}' holds addresses: download the pictures first, for "
            "example by img2dataset, and name the shards that it writes"
        )
    say_how_they_are_read(source, paths)


def most_of(source: TableSource, setting: str, read_row: Callable[[int], Found]) -> list[Found]:
    """Return what a look at rows from all over a table gives; raises `ConfigError` where most of them have nothing."""
    found, problems = [], []
    for row in range(0, len(source), -(-len(source) // ROWS_TO_LOOK_AT)):
        try:
            found.append(read_row(row))
        except UnusableSample as problem:
            problems.append(problem.detail)
    if len(problems) > len(found):
        raise ConfigError(
            f"{setting}: {source.name}: {problems[0]} (as in most rows): name another column by {setting}"
        )
    return found


def say_how_they_are_read(source: TableSource, paths: list[str]) -> None:
    """Say how many of some paths lead to a file only when they are read in another way, and what that way is."""
    ways: Counter[str] = Counter()
    for path in paths:
        try:
            ways[find_picture(source.root, source.limit, path)[1]] += 1
        except UnusableSample:
            continue
    del ways[""]
    for way, number in ways.items():
        console.say(
            f"{source.name}: of {len(paths)} picture paths looked at {number} lead to no file as they are written, and "
            f"are read {way}"
        )
