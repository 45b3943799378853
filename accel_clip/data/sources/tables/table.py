"""Pairs in the rows of an Arrow table: a picture is a path, or bytes.

Rows live in Arrow columns, never in Python lists: loader workers share them without copies.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import pyarrow
import xxhash

from accel_clip.data.bad_samples import UnusableSample
from accel_clip.data.captions import require_caption_size, weighted
from accel_clip.data.sources.base import Pair
from accel_clip.data.sources.class_names import class_name
from accel_clip.data.sources.stamps import NO_FILE, file_stamp
from accel_clip.data.sources.tables.cells import captions_in, flat_items
from accel_clip.data.sources.tables.columns import Columns, class_names, of_one
from accel_clip.data.sources.tables.delimited import ROWS_AT_ONCE
from accel_clip.data.sources.tables.numbers import numbers_of_width, usual_width
from accel_clip.data.sources.tables.picture_cells import Content, is_text, picture_in, picture_in_value
from accel_clip.data.sources.tables.picture_paths import find_picture


class TableSource:
    """Pairs in the rows of an Arrow table; a picture is a path that starts from `root`, or the picture itself.

    A path must stay inside `limit` (default: `root`), links resolved. broken: what is wrong with rows that are no
    pairs, by place. `table` may be a memory-mapped one of `datasets`, so columns are looked up anew each time: arrays
    that are held would be copied when the source is pickled.
    """

    def __init__(
        self,
        name: str,
        table: pyarrow.Table,
        columns: Columns,
        root: Path,
        limit: Path | None = None,
        broken: Mapping[int, str] | None = None,
    ) -> None:
        self.name, self.columns, self.broken = name, columns, dict(broken or {})
        self.table = table.select(columns.names())
        self.class_names = class_names(table.schema, columns.names(), name)
        self.widths = {column: usual_width(table.column(column), column, name) for column in columns.extra}
        self.has_texts = is_text(of_one(table.schema.field(columns.image).type))
        self.root = os.path.abspath(root)
        self.limit = Path(os.path.realpath(limit or root))

    def __len__(self) -> int:
        return self.table.num_rows

    def __getitem__(self, index: int) -> Pair:
        if index in self.broken:
            raise UnusableSample("unreadable", self.broken[index], self.name)
        image, (captions, weights) = self.image(index), self.captions(index)
        return Pair(image, captions, self.label(index), self.extra(index), weights)

    def key(self, index: int) -> str:
        """Return a picture's path from `root`, or a hash of its bytes: the same wherever the data lies."""
        content, path = self.found(index)
        return path_from(self.root, path) if content is None else content_key(memoryview(content))

    def keys(self) -> Iterator[str]:
        """Yield the key of every pair: where pictures are paths, in a fraction of the time that `key` takes."""
        if not self.has_texts:
            yield from map(self.key, range(len(self)))
            return
        for batch in self.table.select([self.columns.image]).to_batches(max_chunksize=ROWS_AT_ONCE):
            for cell in batch.column(0).to_pylist():
                content, path = without_problem(partial(picture_in_value, cell))
                yield path_from(self.root, path) if content is None else content_key(memoryview(content))

    def identity(self, index: int) -> str:
        """Return the key as all sources share it: a picture's absolute path, or a hash of its bytes."""
        content, path = self.found(index)
        whole = os.path.normpath(os.path.join(self.root, path))
        return whole if content is None else content_key(memoryview(content))

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

        Raises `UnusableSample` where no column has any and one of them holds something else.
        """
        texts: dict[str, list[str]] = {}
        problems: list[UnusableSample] = []
        for column in self.columns.captions:
            try:
                texts[column] = self.texts(column, index)
            except UnusableSample as problem:
                problems.append(problem)
        captions, weights = weighted(texts, self.columns.weights)
        if problems and not captions:
            raise problems[0]
        return require_caption_size(captions), weights

    def label(self, index: int) -> str | None:
        """Return a row's label, or None when it has none, or none that is text."""
        try:
            found = self.texts(self.columns.label, index) if self.columns.label else []
        except UnusableSample:
            return None
        return next((text.strip() for text in found if text.strip()), None)

    def extra(self, index: int) -> dict[str, numpy.ndarray]:
        """Return the numbers in a row, float32 [D] a column; raises `UnusableSample`."""
        return {
            column: numbers_of_width(self.table.column(column)[int(index)], column, width)
            for column, width in self.widths.items()
        }

    def texts(self, column: str, index: int) -> list[str]:
        """Return the captions in a cell; the numbers of classes are replaced by their names."""
        value = self.table.column(column)[int(index)].as_py()
        names = self.class_names.get(column)
        try:
            found = captions_in(
                value if names is None else [class_by_number(number, names) for number in flat_items(value)]
            )
        except UnusableSample as problem:
            raise UnusableSample(problem.reason, f"the column '{column}': {problem.detail}") from problem
        return [class_name(text) for text in found] if names is not None or column == self.columns.label else found

    def stored(self, index: int) -> tuple[Content | None, str]:
        """Return a picture's bytes, those of the table not copied, or None and its path; raises `UnusableSample`."""
        try:
            return picture_in(self.table.column(self.columns.image)[int(index)])
        except UnusableSample as problem:
            detail = f"the column '{self.columns.image}': {problem.detail}"
            raise UnusableSample(problem.reason, detail, f"{self.name}, row {index + 1}") from problem

    def found(self, index: int) -> tuple[Content | None, str]:
        """Return what `stored` does, and an empty path where that raises: such rows share a key."""
        return without_problem(partial(self.stored, index))

    def file(self, path: str) -> Path:
        """Return the file that a path means, links resolved; raises `UnusableSample` outside of the limit."""
        if not path:
            raise UnusableSample("missing_file", f"the column '{self.columns.image}' is empty")
        return find_picture(self.root, self.limit, path)[0]


def without_problem(stored: Callable[[], tuple[Content | None, str]]) -> tuple[Content | None, str]:
    """Return a picture's bytes or its path, which is empty where there is neither."""
    try:
        return stored()
    except UnusableSample:
        return None, ""


def class_by_number(number: Any, names: Sequence[str]) -> str | None:
    """Return the name of a class by its number; None where it has none, as -1 stands for no class."""
    is_number = isinstance(number, int) and not isinstance(number, bool)
    return (names[number] if 0 <= number < len(names) else None) if is_number else number


def path_from(root: str, path: str) -> str:
    """Return a path relative to a folder, without looking at the disk."""
    if not os.path.isabs(path) and "./" not in path and "//" not in path:
        return path
    return os.path.relpath(os.path.join(root, path), root).replace(os.sep, "/")


def content_key(content: memoryview) -> str:
    """Return a key for bytes, all of them: equal bytes share it, and no others do."""
    return f"bytes:{xxhash.xxh3_128_hexdigest(content)}"
