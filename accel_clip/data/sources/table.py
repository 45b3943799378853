"""Pairs in the rows of an Arrow table: a picture is a path, or bytes.

Rows live in Arrow columns, never in Python lists: loader workers share them without copies.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy
import pyarrow
import xxhash

from accel_clip.data.bad_samples import UnusableSample
from accel_clip.data.captions import require_size, weighted
from accel_clip.data.sources.base import Pair
from accel_clip.data.sources.cells import path_in, texts_in
from accel_clip.data.sources.columns import Columns, choose_columns, class_names, holds_bytes, holds_pictures
from accel_clip.data.sources.numbers import numbers_of, usual_width
from accel_clip.data.sources.stamps import NO_FILE, file_stamp
from accel_clip.data.sources.table_files import READERS, ROWS_AT_ONCE
from accel_clip.faults import ConfigError, DataError

if TYPE_CHECKING:
    from accel_clip.data.sources.resolve import SourceOptions

REMOTE = ("http://", "https://", "s3://", "gs://")


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
        self.class_names = class_names(table.schema, columns.names(), name)
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

    def stamp(self, index: int) -> int:
        """Return what tells whether a picture's file has changed; bytes have their key."""
        content, path = self.stored(index)
        return NO_FILE if content is not None else file_stamp(self.file(path))

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


def path_from(root: str, path: str) -> str:
    """Return a path relative to a folder, without looking at the disk."""
    if not os.path.isabs(path) and "./" not in path and "//" not in path:
        return path
    return os.path.relpath(os.path.join(root, path), root).replace(os.sep, "/")


def hash_of(content: memoryview) -> str:
    """Return a key for bytes, all of them: equal bytes share it, and no others do."""
    return f"bytes:{xxhash.xxh3_128_hexdigest(content)}"
