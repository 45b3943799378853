"""Delimited text as columns of strings: .csv, .tsv, and the .txt and .token lists that come with pictures."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import TextIO

import pyarrow

from accel_clip import console
from accel_clip.data.sources.base import SourceOptions
from accel_clip.data.sources.endings import PICTURE_SUFFIXES
from accel_clip.data.sources.tables.columns import CAPTION_COLUMNS, IMAGE_COLUMNS
from accel_clip.data.sources.tables.content import TableContent
from accel_clip.data.sources.tables.picture_cells import is_base64
from accel_clip.data.sources.text_files import open_text
from accel_clip.faults import DataError

ROWS_AT_ONCE = 1000  # ten times as many take twice as long, most of it in the garbage collector
LONGEST_CELL = 1 << 24  # characters; Python's csv stops at 131,072 unless told otherwise
LONGEST_LINE = 1 << 26  # characters; a longer one is no table, and would fill the memory
SEPARATORS = (",", ";", "\t", "|")
CUT_AT_TABS = (".tsv", ".token")
LINES_TO_LOOK_AT = 20
MOST_BROKEN_ROWS = 0.01  # of all; with more the file is not what it is taken for
MOST_BROKEN_KEPT = 100_000
ADDRESSES = ("http://", "https://", "s3://", "gs://")
WITHOUT_QUOTES = "if quotes are plain signs in this file, such as those of inches, set data.quoting: none"


@dataclass(frozen=True)
class Dialect:
    """How rows are written."""

    separator: str
    """the sign between cells"""
    is_spaced: bool
    """whether a space follows each separator"""
    has_quotes: bool
    """whether quotes hold cells together"""


@dataclass
class DelimitedRows:
    """The rows of a file."""

    file: TextIO
    """open, at its beginning"""
    path: Path
    """of the file, for messages"""
    dialect: Dialect
    """how they are written"""
    is_checked: bool
    """whether quotes are looked at twice"""
    width: int = 0
    """cells in a row, known after the first one"""
    num_rows: int = 0
    """so far"""
    broken: dict[int, str] = field(default_factory=dict)
    """what is wrong with rows that have another number of cells, by their place, the first line's being 0; such a row
    is given as `width` empty cells"""
    lines: list[str] = field(default_factory=list)
    """those that the row now read stands in"""

    def __iter__(self) -> Iterator[list[str | None]]:
        reader = csv.reader(
            self.lines_read(),
            delimiter=self.dialect.separator,
            skipinitialspace=self.dialect.is_spaced,
            quoting=csv.QUOTE_MINIMAL if self.dialect.has_quotes else csv.QUOTE_NONE,
            strict=True,
        )
        line = 1
        try:
            for row in reader:
                if row:
                    yield self.checked(row, line)
                line = reader.line_num + 1
                self.lines.clear()
        except csv.Error as error:
            raise DataError(
                f"{self.path}: the row that begins in line {line} cannot be read ({error}): a cell that begins with a "
                f'quote must end with one, and a quote inside of it is written twice (""); {WITHOUT_QUOTES}'
            ) from error

    def lines_read(self) -> Iterator[str]:
        """Yield the lines of the file, and remember those of the row."""
        for line in lines_of_table(self.file, self.path):
            self.lines.append(line)
            yield line

    def checked(self, row: list[str], line: int) -> list[str | None]:
        """Return a row of the usual width; raises `DataError` for one that has swallowed others, and for too many."""
        self.width = self.width or len(row)
        if self.is_checked and len(self.lines) > 1 and self.has_swallowed(row):
            raise DataError(
                f"{self.path}: the row that begins in line {line} has swallowed rows up to line "
                f"{line + len(self.lines) - 1}: a quote opens there and the next one closes it; {WITHOUT_QUOTES}, or "
                "set data.quoting: standard if it is one cell with line breaks"
            )
        self.num_rows += 1
        if len(row) == self.width:
            return list(row)
        self.broken[self.num_rows - 1] = f"the row in line {line} has {len(row)} cells and the header {self.width}"
        if len(self.lines) > 1 or len(self.broken) > MOST_BROKEN_KEPT:
            self.refuse_broken()
        return [None] * self.width

    def has_swallowed(self, row: Sequence[str]) -> bool:
        """Return whether two or more of the lines that a row stands in could be rows themselves.

        Lines of prose may have as many separators as a row, so what else is known of rows, that a cell is a number or
        the name of a picture, must be so in the lines as well. Where nothing is known, all lines must have as many.
        """
        whole = {place: kind_of(cell) for place, cell in enumerate(row[: self.width]) if "\n" not in cell}
        kinds = {place: kind for place, kind in whole.items() if kind}
        cells = [line.strip().split(self.dialect.separator) for line in self.lines]
        if not kinds:
            return all(len(each) == self.width > 1 for each in cells)
        return sum(self.is_like(each, kinds) for each in cells) > 1

    def is_like(self, cells: Sequence[str], kinds: dict[int, str]) -> bool:
        """Return whether cells have what rows have at these places, counted from the left or from the right."""
        if len(cells) < self.width or self.width < 2:
            return False
        return all(kind in (kind_of(cells[n]), kind_of(cells[n - self.width])) for n, kind in kinds.items())

    def refuse_broken(self) -> None:
        """Raise `DataError` for rows with too many or too few cells."""
        raise DataError(
            f"{self.path}: {next(iter(self.broken.values()))}: is a quote or a separator missing, or does a text with "
            f"{self.dialect.separator!r} stand without quotes?"
        )


def read_delimited(path: Path, options: SourceOptions) -> TableContent:
    """Return a file as columns of strings, in which NA and null are words; raises `DataError` with the line.

    A few rows with too many or too few cells are broken, each for itself.
    """
    csv.field_size_limit(LONGEST_CELL)
    with open_text(path, options.encoding) as file:
        dialect = find_dialect(list(islice(lines_of_table(file, path), LINES_TO_LOOK_AT)), path, options.quoting)
        file.seek(0)
        found = DelimitedRows(file, path, dialect, dialect.has_quotes and options.quoting == "auto")
        rows = iter(found)
        first = [cell or "" for cell in next(rows, [])]
        names = names_for(first)
        header = names or [name.strip() for name in first]
        require_header(header, path)
        batches = list(batches_of(rows if names is None else chain([first], rows), header))
    if not batches:
        raise DataError(f"{path}: the table has no rows below its header line")
    if len(found.broken) > MOST_BROKEN_ROWS * found.num_rows:
        found.refuse_broken()
    if names is not None:
        console.say(f"{path}: its first line is a row and no header, read as the columns {', '.join(names)}")
    num_before = 1 if names is None else 0
    broken = {place - num_before: problem for place, problem in found.broken.items()}
    return TableContent(pyarrow.concat_tables(batches), path.parent, broken)


def batches_of(rows: Iterable[Sequence[str | None]], header: list[str]) -> Iterator[pyarrow.Table]:
    """Yield rows as tables of strings."""
    waiting = iter(rows)
    while batch := list(islice(waiting, ROWS_AT_ONCE)):
        cells = zip(header, zip(*batch, strict=True), strict=True)
        yield pyarrow.table({name: pyarrow.array(column, pyarrow.string()) for name, column in cells})


def find_dialect(lines: Sequence[str], path: Path, quoting: str) -> Dialect:
    """Return how a file is written, judged by its first lines.

    A space behind each separator is no part of the cells. With `|` it is how Flickr's lists are written, whose quotes
    are those of the captions.
    """
    separator = "\t" if path.suffix.lower() in CUT_AT_TABS else find_separator(lines)
    cells = lines[0].split(separator) if lines else []
    is_spaced = len(cells) > 1 and all(cell.startswith(" ") for cell in cells[1:])
    return Dialect(separator, is_spaced, quoting != "none" and not (is_spaced and separator == "|"))


def find_separator(lines: Sequence[str]) -> str:
    """Return which of comma, semicolon, tab and bar cuts the first line, and most others like it, into most cells."""

    def worth(separator: str) -> tuple[bool, int, int]:
        widths = [num_cells(line, separator) for line in lines] or [0]
        return widths[0] > 1, widths.count(widths[0]), widths[0]

    return max(SEPARATORS, key=worth)


def num_cells(line: str, separator: str) -> int:
    """Return into how many cells a line is cut, 0 where it cannot be."""
    try:
        return len(next(csv.reader([line], delimiter=separator), []))
    except csv.Error:
        return 0


def lines_of_table(file: TextIO, path: Path) -> Iterator[str]:
    """Yield the lines of a file; raises `DataError` for one that is too long for a row of a table."""
    number = 0
    while line := file.readline(LONGEST_LINE):
        number += 1
        if len(line) == LONGEST_LINE:
            raise DataError(f"{path}: line {number} has more than {LONGEST_LINE:,} characters: is it a table?")
        yield line


def kind_of(cell: str) -> str:
    """Return what a cell is where that shows: a picture, an address, base64 or a number; else nothing."""
    text = cell.strip().strip('"').partition("#")[0]
    if text.startswith(ADDRESSES):
        return "address"
    if is_base64(text):
        return "base64"
    if text.lower().endswith(PICTURE_SUFFIXES):
        return "picture"
    return "number" if text.replace(".", "", 1).isdigit() else ""


def names_for(first: Sequence[str]) -> list[str] | None:
    """Return the names of the columns of a file whose first line is a row already; None for a header line.

    It is a row where it holds a picture and no usual name. Of two columns the other holds captions, or numbers.
    """
    kinds = [kind_of(cell) for cell in first]
    place = next((n for n, kind in enumerate(kinds) if kind in ("picture", "base64", "address")), None)
    usual = {*IMAGE_COLUMNS, *CAPTION_COLUMNS}
    if place is None or any(cell.strip().lower() in usual for cell in first):
        return None
    names = [f"column {number}" for number in range(1, len(first) + 1)]
    names[place] = "image"
    if len(first) == 2:
        names[1 - place] = "label" if kinds[1 - place] == "number" else "caption"
    return names


def require_header(header: list[str], path: Path) -> None:
    """Raise `DataError` for an empty table, and for a name that stands twice in its header line."""
    if not header:
        raise DataError(f"{path}: the table is empty")
    twice = next((name for name in header if name and header.count(name) > 1), None)
    if twice:
        raise DataError(f"{path}: the column '{twice}' stands twice in the header line: rename one")
