"""From .csv, .tsv, .jsonl and .parquet files to Arrow tables."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

import pyarrow

from accel_clip.data.sources.cells import parts_of, storable, texts_in
from accel_clip.data.sources.columns import class_names
from accel_clip.data.text_files import open_text
from accel_clip.faults import DataError

ROWS_AT_ONCE = 1000  # ten times as many take twice as long, most of it in the garbage collector
LONGEST_CELL = 1 << 24  # characters; Python's csv stops at 131,072 unless told otherwise
LONGEST_LINE = 1 << 26  # characters; a longer one is no table, and would fill the memory


def read_delimited(path: Path, encoding: str | None) -> pyarrow.Table:
    """Return a .csv or .tsv as columns of strings, in which NA and null are words; raises `DataError` with the line."""
    csv.field_size_limit(LONGEST_CELL)
    with open_text(path, encoding) as file:
        separator = "\t" if path.suffix.lower() == ".tsv" else find_separator(file.readline(LONGEST_LINE))
        file.seek(0)
        rows = delimited_rows(file, separator, path)
        header = [name.strip() for name in next(rows, [])]
        require_header(header, path)
        batches = []
        while batch := list(islice(rows, ROWS_AT_ONCE)):
            cells = zip(header, zip(*batch, strict=True), strict=True)
            batches.append(pyarrow.table({name: pyarrow.array(column, pyarrow.string()) for name, column in cells}))
    if not batches:
        raise DataError(f"{path}: the table has no rows below its header line")
    return pyarrow.concat_tables(batches)


def find_separator(header: str) -> str:
    """Return which of comma, semicolon and tab cuts a header line into the most names."""
    return max((",", ";", "\t"), key=lambda separator: len(next(csv.reader([header], delimiter=separator), [])))


def delimited_rows(file: TextIO, separator: str, path: Path) -> Iterator[list[str]]:
    """Yield the header and the rows, which must be as long; blank lines are passed over."""
    reader = csv.reader(lines_of(file, path), delimiter=separator, strict=True)
    width, line = None, 1
    try:
        for row in reader:
            width = width or len(row)
            if row and len(row) != width:
                raise DataError(
                    f"{path}: the row in line {line} has {len(row)} cells and the header {width}: is a quote or a "
                    f"separator missing, or does a text with {separator!r} stand without quotes?"
                )
            if row:
                yield row
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{path}: the row that begins in line {line} cannot be read ({error}): a cell that begins with a quote "
            'must end with one, and a quote inside of it is written twice ("")'
        ) from error


def lines_of(file: TextIO, path: Path) -> Iterator[str]:
    """Yield the lines of a file; raises `DataError` for one that is too long for a row of a table."""
    number = 0
    while line := file.readline(LONGEST_LINE):
        number += 1
        if len(line) == LONGEST_LINE:
            raise DataError(f"{path}: line {number} has more than {LONGEST_LINE:,} characters: is it a table?")
        yield line


def require_header(header: list[str], path: Path) -> None:
    """Raise `DataError` for an empty table, and for a name that stands twice in its header line."""
    if not header:
        raise DataError(f"{path}: the table is empty")
    twice = next((name for name in header if name and header.count(name) > 1), None)
    if twice:
        raise DataError(f"{path}: the column '{twice}' stands twice in the header line: rename one")


def read_json_lines(path: Path, encoding: str | None) -> pyarrow.Table:
    """Return a .jsonl as columns of lists of strings; raises `DataError` with the line."""
    with open_text(path, encoding) as file:
        rows = json_rows(file, path)
        batches = []
        while batch := list(islice(rows, ROWS_AT_ONCE)):
            batches.append(text_columns(batch))
    if not batches:
        raise DataError(f"{path}: the table is empty")
    return pyarrow.concat_tables(batches, promote_options="default")


def json_rows(file: TextIO, path: Path) -> Iterator[dict[str, Any]]:
    """Yield the object of every line; blank lines are passed over, and NaN is an empty cell."""
    for number, line in enumerate(lines_of(file, path), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, parse_constant=lambda word: None)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}: line {number} is not JSON ({error}): write one object a line") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}: line {number} is no JSON object: write one object a line")
        yield row


def text_columns(rows: list[dict[str, Any]]) -> pyarrow.Table:
    """Return rows as columns of lists of strings; columns that hold objects are left out."""
    names = dict.fromkeys(name for row in rows for name in row)
    flat = [name for name in names if not any(holds_objects(row.get(name)) for row in rows)]
    columns = [[[storable(text) for text in texts_in(row.get(name))] for row in rows] for name in flat]
    kind = pyarrow.list_(pyarrow.string())
    return pyarrow.table([pyarrow.array(column, kind) for column in columns], names=flat)


def holds_objects(value: Any) -> bool:
    """Return whether a JSON value is or contains an object."""
    return any(isinstance(part, dict) for part in parts_of(value))


def read_parquet(path: Path, encoding: str | None) -> pyarrow.Table:
    """Return a .parquet through the cache of `datasets`: memory-mapped, so that pictures in it need no memory."""
    from datasets import Dataset
    from pyarrow import parquet

    try:
        schema = parquet.read_schema(path)
        class_names(schema, schema.names, str(path))
        return Dataset.from_parquet(str(path)).data
    except broken_table_errors() as error:
        raise DataError(f"{path}: not a parquet table that can be read: {str(error).partition(chr(10))[0]}") from error


def broken_table_errors() -> tuple[type[Exception], ...]:
    """Return what `datasets` raises for broken data, and for descriptions of them that are of another kind."""
    from datasets.exceptions import DatasetsError

    of_another_kind = (TypeError, AttributeError, LookupError, RecursionError, AssertionError)
    return (DatasetsError, OSError, ValueError, RuntimeError, pyarrow.ArrowException, *of_another_kind)


READERS: dict[str, Callable[[Path, str | None], pyarrow.Table]] = {
    ".csv": read_delimited,
    ".tsv": read_delimited,
    ".jsonl": read_json_lines,
    ".parquet": read_parquet,
}
