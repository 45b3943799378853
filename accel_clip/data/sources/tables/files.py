"""The formats of files with pairs: one table of how each is recognised and read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from accel_clip.data.sources.base import SourceOptions
from accel_clip.data.sources.tables.chinese_clip import is_chinese_clip, read_chinese_clip
from accel_clip.data.sources.tables.content import TableContent
from accel_clip.data.sources.tables.delimited import read_delimited
from accel_clip.data.sources.tables.json_files import read_json_table
from accel_clip.data.sources.tables.json_rows import read_json_lines
from accel_clip.data.sources.tables.parquet_files import read_parquet


def by_its_ending(path: Path) -> bool:
    """Return that a file with the right ending is of the format."""
    return True


@dataclass(frozen=True)
class TableFormat:
    """A format of tables."""

    suffixes: tuple[str, ...]
    """of its files"""
    read: Callable[[Path, SourceOptions], TableContent]
    """what a file holds"""
    fits: Callable[[Path], bool] = by_its_ending
    """whether a file has it"""


FORMATS = (
    TableFormat((".tsv", ".jsonl"), read_chinese_clip, is_chinese_clip),
    TableFormat((".csv", ".tsv", ".txt", ".token"), read_delimited),
    TableFormat((".jsonl",), read_json_lines),
    TableFormat((".json",), read_json_table),
    TableFormat((".parquet",), read_parquet),
)
"""The first that fits is what a file is."""


def read_table(path: Path, options: SourceOptions) -> TableContent:
    """Return what a file of pairs holds; raises `DataError` and `ConfigError`."""
    suffix = path.suffix.lower()
    form = next(form for form in FORMATS if suffix in form.suffixes and form.fits(path))
    return form.read(path, options)
