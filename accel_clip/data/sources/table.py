"""Tables of pictures and captions (.csv, .tsv, .jsonl, .parquet), and the source over an Arrow table.

Rows live in Arrow columns, never in Python lists: loader workers share them without copies.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy
import pyarrow
from pyarrow import types

from accel_clip.data.bad_samples import UnusableSample
from accel_clip.data.captions import require_size, weighted
from accel_clip.data.sources.base import Pair
from accel_clip.data.sources.numbers import numbers_of, usual_width
from accel_clip.data.text_files import open_text
from accel_clip.faults import ConfigError, DataError, nearest

if TYPE_CHECKING:
    from accel_clip.data.sources.resolve import SourceOptions

IMAGE_COLUMNS = ("image", "image_path", "file_name", "filepath", "filename", "path", "img")
CAPTION_COLUMNS = ("caption", "captions", "text", "title")
LABEL_COLUMNS = ("label", "class", "category", "class_name")
ROWS_AT_ONCE = 1000  # ten times as many take twice as long, most of it in the garbage collector
HASHED_PIECE_BYTES = 4096
LONGEST_CELL = 1 << 24  # characters; Python's csv stops at 131,072 unless told otherwise
LONGEST_LINE = 1 << 26  # characters; a longer one is no table, and would fill the memory
REMOTE = ("http://", "https://", "s3://", "gs://")


@dataclass(frozen=True)
class Columns:
    """The columns that make pairs; weights: how often captions of each are shown, empty for all alike."""

    image: str
    captions: tuple[str, ...]
    label: str | None = None
    extra: tuple[str, ...] = ()
    weights: Mapping[str, float] = field(default_factory=dict)

    def names(self) -> list[str]:
        """Return each column once."""
        return list(dict.fromkeys([self.image, *self.captions, *([self.label] if self.label else []), *self.extra]))


class TableSource:
    """Pairs in the rows of an Arrow table; a picture is a path that starts from `root`, or bytes.

    A path must stay inside `limit` (default: `root`), links resolved. `table` may be a memory-mapped one of `datasets`,
    so columns are looked up anew each time: arrays that are held would be copied when the source is pickled.
    """

    def __init__(
        self, name: str, table: pyarrow.Table, columns: Columns, root: Path, limit: Path | None = None
    ) -> None:
        self.name, self.columns = name, columns
        self.table = table.select(columns.names())
        self.class_names = class_names(table.schema)
        self.widths = {column: usual_width(table.column(column), column, name) for column in columns.extra}
        kind = table.schema.field(columns.image).type
        self.has_structs, self.has_bytes = holds_pictures(kind), holds_bytes(kind)
        self.root = os.path.abspath(root)
        self.limit = Path(os.path.realpath(limit or root))

    def __len__(self) -> int:
        return self.table.num_rows

    def __getitem__(self, index: int) -> Pair:
        image, (captions, weights) = self.image(index), self.captions(index)
        return Pair(image, captions, self.label(index), self.extra(index), weights)

    def key(self, index: int) -> str:
        """Return a picture's path from `root`, or a hash of its bytes: the same wherever the data lies."""
        content, path = self.stored(index)
        return path_from(self.root, path) if content is None else hash_of(content)

    def keys(self) -> Iterator[str]:
        """Yield the key of every pair: where pictures are paths, in a fraction of the time that `key` takes."""
        if self.has_structs or self.has_bytes:
            yield from map(self.key, range(len(self)))
            return
        for batch in self.table.select([self.columns.image]).to_batches(max_chunksize=ROWS_AT_ONCE):
            for cell in batch.column(0).to_pylist():
                yield path_from(self.root, path_in(cell))

    def identity(self, index: int) -> str:
        """Return the key as all sources share it: a picture's absolute path, or a hash of its bytes."""
        content, path = self.stored(index)
        return os.path.normpath(os.path.join(self.root, path)) if content is None else hash_of(content)

    def image(self, index: int) -> bytes | Path:
        """Return a picture's bytes, or the file that it is in; raises `UnusableSample`."""
        content, path = self.stored(index)
        return self.file(path) if content is None else bytes(content)

    def captions(self, index: int) -> tuple[tuple[str, ...], tuple[float, ...]]:
        """Return a row's captions without surrounding white space, empty ones left out, and their weights.

        Raises `UnusableSample`.
        """
        texts = {column: self.texts(column, index) for column in self.columns.captions}
        captions, weights = weighted(texts, self.columns.weights)
        return require_size(captions), weights

    def label(self, index: int) -> str | None:
        """Return a row's label, or None when it has none."""
        found = self.texts(self.columns.label, index) if self.columns.label else []
        return next((text.strip() for text in found if text.strip()), None)

    def extra(self, index: int) -> dict[str, numpy.ndarray]:
        """Return the numbers in a row, float32 [D] a column; raises `UnusableSample`."""
        return {
            column: numbers_of(self.table.column(column)[int(index)], column, width)
            for column, width in self.widths.items()
        }

    def texts(self, column: str, index: int) -> list[str]:
        """Return the texts in a cell; the numbers of classes are replaced by their names."""
        value = self.table.column(column)[int(index)].as_py()
        names = self.class_names.get(column)
        if names is not None and isinstance(value, int):
            return [names[value]] if 0 <= value < len(names) else []
        return texts_in(value)

    def stored(self, index: int) -> tuple[memoryview | None, str]:
        """Return a picture's bytes, not copied, or None and its path as it is written."""
        cell = self.table.column(self.columns.image)[int(index)]
        content, path = (cell["bytes"], cell["path"]) if self.has_structs else (cell, cell)
        if (self.has_structs or self.has_bytes) and content.is_valid:
            return memoryview(content.as_buffer()), ""
        return None, path_in(path.as_py())

    def file(self, path: str) -> Path:
        """Return the file that a path stands for, links resolved; raises `UnusableSample` outside of the limit."""
        if not path:
            raise UnusableSample("missing_file", f"the column '{self.columns.image}' is empty")
        try:
            real = Path(os.path.realpath(os.path.join(self.root, path)))
        except ValueError as error:  # a null character
            raise UnusableSample("missing_file", str(error), path) from error
        if not real.is_relative_to(self.limit):
            raise UnusableSample("outside_root", f"{real} is outside of {self.limit} (see data.image_root)", path)
        return real


def open_table(path: Path, options: SourceOptions) -> TableSource:
    """Return the pairs of a table file; paths start from `data.image_root`, by default the table's folder."""
    table = READERS[path.suffix.lower()](path, options.encoding)
    return source_over(table, str(path), path.parent, options)


def source_over(table: pyarrow.Table, name: str, folder: Path, options: SourceOptions) -> TableSource:
    """Return the pairs of an Arrow table, its columns chosen by the options; raises `ConfigError` and `DataError`."""
    if table.num_rows == 0:
        raise DataError(f"{name}: the table has no rows")
    root = Path(options.image_root).expanduser() if options.image_root else folder
    if options.image_root and not root.is_dir():
        raise ConfigError(f"data.image_root: '{root}' is no folder: name the folder that picture paths start from")
    source = TableSource(name, table, choose_columns(table.schema, options, name), root)
    if source.stored(0)[1].startswith(REMOTE):
        raise DataError(f"{name}: the column '{source.columns.image}' holds addresses: download the pictures first")
    return source


def choose_columns(schema: pyarrow.Schema, options: SourceOptions, name: str) -> Columns:
    """Return the columns that the options name, else those with usual names; raises `ConfigError`."""
    pictures = [field.name for field in schema if holds_pictures(field.type) or holds_bytes(field.type)]
    image = (
        (options.image_key and known_column("data.image_key", options.image_key, schema, name))
        or usual_column(IMAGE_COLUMNS, pictures)
        or (pictures[0] if len(pictures) == 1 else usual_column(IMAGE_COLUMNS, schema.names))
        or missing_column("data.image_key", IMAGE_COLUMNS, schema, name)
    )
    label = usual_column(LABEL_COLUMNS, schema.names)
    if options.label_key:
        label = known_column("eval.label_key", options.label_key, schema, name)
    if options.needs == "labels":
        return Columns(image, (), label or missing_column("eval.label_key", LABEL_COLUMNS, schema, name))
    captions = tuple(known_column("data.caption_key", key, schema, name) for key in options.captions)
    usual = usual_column(CAPTION_COLUMNS, [column for column in schema.names if column != image])
    captions = captions or (usual or missing_column("data.caption_key", CAPTION_COLUMNS, schema, name),)
    for column in captions:
        require_text("data.caption_key", column, schema, name)
    extra = tuple(known_column("loss.options", key, schema, name) for key in options.extra)
    return Columns(image, captions, label, extra, options.captions)


def known_column(setting: str, key: str, schema: pyarrow.Schema, name: str) -> str:
    """Return the column that a setting names; raises `ConfigError` when there is no such column."""
    if key in schema.names:
        return key
    hint = nearest(key, schema.names) or "."
    raise ConfigError(f"{setting}: {name} has no column '{key}'{hint} Its columns: {', '.join(schema.names)}")


def usual_column(usual: tuple[str, ...], names: list[str]) -> str | None:
    """Return the first of the usual names that is there, in any case."""
    by_lower = {name.lower(): name for name in reversed(names)}
    return next((by_lower[word] for word in usual if word in by_lower), None)


def missing_column(setting: str, usual: tuple[str, ...], schema: pyarrow.Schema, name: str) -> str:
    """Raise `ConfigError` for a table that has none of the usual columns."""
    raise ConfigError(
        f"{setting}: {name} has none of the usual columns ({', '.join(usual)}): name one of those it has: "
        f"{', '.join(schema.names)}"
    )


def require_text(setting: str, column: str, schema: pyarrow.Schema, name: str) -> None:
    """Raise `ConfigError` for a column of pictures or objects where text is needed."""
    kind = schema.field(column).type
    if types.is_nested(getattr(kind, "value_type", kind)):
        raise ConfigError(f"{setting}: the column '{column}' of {name} holds {kind}, not text")


def holds_pictures(kind: pyarrow.DataType) -> bool:
    """Return whether cells are {bytes, path}, as `datasets` stores pictures."""
    return types.is_struct(kind) and {"bytes", "path"} <= {field.name for field in kind}


def holds_bytes(kind: pyarrow.DataType) -> bool:
    """Return whether cells are bytes."""
    return types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind)


def texts_in(value: Any) -> list[str]:
    """Return the texts in a cell: none in an empty one, several in a list; raises `UnusableSample` for broken bytes."""
    texts = []
    for part in parts_of(value):
        if part is None or (isinstance(part, float) and math.isnan(part)):
            continue
        try:
            texts.append(part.decode() if isinstance(part, bytes) else str(part))
        except UnicodeDecodeError as error:
            raise UnusableSample("caption_encoding", str(error)) from error
    return texts


def path_in(cell: Any) -> str:
    """Return the path that is written in a cell, empty without one.

    Tables written on Windows separate folders by backslashes; elsewhere no picture has one in its name.
    """
    written = [cell] if isinstance(cell, str) else texts_in(cell)
    return written[0].replace("\\", "/") if written else ""


def parts_of(value: Any) -> Iterator[Any]:
    """Yield what nested lists hold, in order; they may nest deeper than Python calls do."""
    waiting = [value]
    while waiting:
        part = waiting.pop()
        if isinstance(part, (list, tuple)):
            waiting.extend(reversed(part))
        else:
            yield part


def path_from(root: str, path: str) -> str:
    """Return a path relative to a folder, without looking at the disk."""
    if not os.path.isabs(path) and "./" not in path and "//" not in path:
        return path
    return os.path.relpath(os.path.join(root, path), root).replace(os.sep, "/")


def hash_of(content: memoryview) -> str:
    """Return a key for bytes by their length and three pieces: equal bytes share it, and big data is not all read."""
    digest = hashlib.blake2b(str(len(content)).encode(), digest_size=16)
    last = max(len(content) - HASHED_PIECE_BYTES, 0)
    for start in (0, last // 2, last):
        digest.update(content[start : start + HASHED_PIECE_BYTES])
    return f"bytes:{digest.hexdigest()}"


def class_names(schema: pyarrow.Schema) -> dict[str, list[str]]:
    """Return the names of the classes that columns count, as `datasets` writes them into a table's metadata."""
    written = (schema.metadata or {}).get(b"huggingface")
    features = json.loads(written)["info"]["features"] if written else {}
    return {column: feature["names"] for column, feature in features.items() if "names" in feature}


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


def storable(text: str) -> str:
    """Return a text without halves of characters, which JSON can write and UTF-8 cannot."""
    return text.encode("utf-8", errors="replace").decode()


def read_parquet(path: Path, encoding: str | None) -> pyarrow.Table:
    """Return a .parquet through the cache of `datasets`: memory-mapped, so that pictures in it need no memory."""
    from datasets import Dataset
    from datasets.exceptions import DatasetsError

    try:
        return Dataset.from_parquet(str(path)).data
    except (DatasetsError, OSError, ValueError, pyarrow.ArrowException) as error:
        raise DataError(f"{path}: not a parquet table that can be read: {str(error).partition(chr(10))[0]}") from error


READERS: dict[str, Callable[[Path, str | None], pyarrow.Table]] = {
    ".csv": read_delimited,
    ".tsv": read_delimited,
    ".jsonl": read_json_lines,
    ".parquet": read_parquet,
}
