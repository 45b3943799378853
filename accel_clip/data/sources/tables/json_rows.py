"""Rows of JSON as columns of lists of strings: .jsonl files, and lists of objects in .json files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

import pyarrow

from accel_clip.data.sources.base import SourceOptions
from accel_clip.data.sources.tables.cells import flat_items, storable, texts_in_cell
from accel_clip.data.sources.tables.columns import is_asked_for
from accel_clip.data.sources.tables.content import TableContent
from accel_clip.data.sources.tables.delimited import ROWS_AT_ONCE, lines_of_table
from accel_clip.data.sources.text_files import open_text
from accel_clip.faults import DataError


def read_json_lines(path: Path, options: SourceOptions) -> TableContent:
    """Return a .jsonl as columns of lists of strings; raises `DataError` with the line."""
    with open_text(path, options.encoding) as file:
        return TableContent(table_of(json_rows(file, path), path, options), path.parent)


def table_of(rows: Iterable[Mapping[str, Any]], path: Path, options: SourceOptions) -> pyarrow.Table:
    """Return objects as columns; those that nothing asks for keep their names alone. Raises `DataError` without any."""
    waiting = iter(rows)
    batches = []
    while batch := list(islice(waiting, ROWS_AT_ONCE)):
        names = dict.fromkeys(name for row in batch for name in row)
        batches.append(pyarrow.table({name: column_of(batch, name, options) for name in names}))
    if not batches:
        raise DataError(f"{path}: the table is empty")
    return pyarrow.concat_tables(batches, promote_options="default")


def column_of(rows: list[Mapping[str, Any]], name: str, options: SourceOptions) -> pyarrow.Array:
    """Return what stands in rows under a name."""
    if not is_asked_for(name, options):
        return pyarrow.nulls(len(rows))
    return pyarrow.array([stored_texts(row.get(name)) for row in rows], pyarrow.list_(pyarrow.string()))


def stored_texts(value: Any) -> list[str]:
    """Return a JSON value as texts; an object is one as JSON writes it, which who reads the cell recognises."""
    parts = (json.dumps(part, ensure_ascii=False) if isinstance(part, dict) else part for part in flat_items(value))
    return [storable(text) for part in parts for text in texts_in_cell(part)]


def json_rows(file: TextIO, path: Path) -> Iterator[dict[str, Any]]:
    """Yield the object of every line; blank lines are passed over, and NaN is an empty cell."""
    for number, line in enumerate(lines_of_table(file, path), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, parse_constant=lambda word: None)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}: line {number} is not JSON ({error}): write one object a line") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}: line {number} is no JSON object: write one object a line")
        yield row
