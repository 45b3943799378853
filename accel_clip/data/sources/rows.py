"""What a source holds, row by row, as numbers by which two starts of a run compare it: names, captions, pictures.

Of all rows the name and the caption are hashed, of files the size and the time are looked at, and of some the content:
of all while that is little to read, else of some that are spread over the rows.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import numpy
import pyarrow
import xxhash
from pyarrow import types

from accel_clip.data.bad_samples import UnusableSample
from accel_clip.data.sources.base import Pair, Source
from accel_clip.data.sources.combine import HasKeys
from accel_clip.data.sources.folders.caption_files import CaptionFiles
from accel_clip.data.sources.shards.local import TarShards
from accel_clip.data.sources.tables.table import TableSource

MOST_FILES = 1 << 16
"""files of a source that are looked at, which takes a second"""
MOST_BYTES = 1 << 28
"""bytes of a source's files that are read for their content, which takes a second"""
MISSING = -1
"""size of a file that is not there"""
ROWS_AT_ONCE = 1000
ODD = numpy.uint64(0x9E3779B97F4A7C15)
"""times this, a hash makes room for the next column's: columns in another order give another sum"""


@dataclass(frozen=True)
class Rows:
    """The rows of a source, or the shards that they stand in; zero is what was not looked at."""

    keys: numpy.ndarray
    """uint64 [n], hashes of what pictures are called"""
    texts: numpy.ndarray
    """uint64 [n], hashes of captions"""
    sizes: numpy.ndarray
    """int64 [n], of files, in bytes"""
    times: numpy.ndarray
    """int64 [n], when files were last changed, in nanoseconds"""
    contents: numpy.ndarray
    """uint64 [n], hashes of what is in files"""

    def __len__(self) -> int:
        return len(self.keys)

    def arrays(self) -> dict[str, numpy.ndarray]:
        """Return all numbers by their name."""
        return {each.name: getattr(self, each.name) for each in fields(self)}


def rows_of(source: Source) -> Rows:
    """Return what a source holds that is neither a part of another one nor made of others."""
    if isinstance(source, TarShards):
        return rows_of_shards(source)
    if isinstance(source, TableSource):
        return rows_of_table(source)
    return rows_of_any(source)


def name_in(source: Source, row: int) -> str:
    """Return what a row is called in a message."""
    return source.reader.paths[row] if isinstance(source, TarShards) else source.key(row)


def rows_of_table(source: TableSource) -> Rows:
    """Return the rows of a table, or of a folder of pictures."""
    looked = looked_at(len(source))
    if isinstance(source, CaptionFiles):
        texts = spread_over_rows(hashes(repr_of(source, row) for row in looked), looked, len(source))
    else:
        texts = texts_of_table(source)
    paths = {row: path for row in looked if (path := file_in_table(source, row)) is not None}
    return Rows(hashes(source.keys()), texts, *file_facts(paths, len(source)))


def repr_of(source: CaptionFiles, row: int) -> str:
    """Return the captions of a picture as one text, or what is wrong with them."""
    try:
        return repr(source.captions(row)[0])
    except UnusableSample as problem:
        return problem.reason


def texts_of_table(source: TableSource) -> numpy.ndarray:
    """Return a hash of what each row holds beside its picture, uint64 [n]: captions, else the label, and numbers."""
    columns = source.columns
    named = [*(columns.captions or [columns.label]), *columns.extra]
    found = numpy.zeros(len(source), numpy.uint64)
    for column in named:
        if column is not None:
            found = found * ODD + hashes(cells(source.table.column(column)))
    return found


def cells(column: pyarrow.ChunkedArray) -> Iterator[str | bytes | memoryview]:
    """Yield what stands in a column's cells as something to be hashed."""
    for chunk in column.chunks:
        if is_list_of_numbers(chunk.type):
            for cell in chunk:
                yield b"" if not cell.is_valid else memoryview(cell.values.to_numpy(zero_copy_only=False)).cast("B")
        else:
            for start in range(0, len(chunk), ROWS_AT_ONCE):
                for value in chunk.slice(start, ROWS_AT_ONCE).to_pylist():
                    yield value if isinstance(value, str) else repr(value)


def is_list_of_numbers(kind: pyarrow.DataType) -> bool:
    """Return whether cells are lists of numbers of one width."""
    inner = getattr(kind, "value_type", None)
    return inner is not None and not types.is_dictionary(kind) and (types.is_floating(inner) or types.is_integer(inner))


def file_in_table(source: TableSource, row: int) -> str | Path | None:
    """Return the file that a row's picture is in, or should be; None for one whose bytes are in the table."""
    try:
        content, path = source.stored(row)
    except UnusableSample:
        return None
    if content is not None:
        return None
    likely = os.path.join(source.root, path)
    if os.path.isfile(likely):
        return likely
    try:
        return source.file(path)
    except UnusableSample:
        return likely


def rows_of_shards(source: TarShards) -> Rows:
    """Return the shards of a source: their names, what stands where in them, and the files."""
    starts, samples = [0, *source.ends[:-1]], source.samples
    members = [samples.keys, samples.pictures, *samples.texts.values()]
    parts = [slice(start, end) for start, end in zip(starts, source.ends, strict=True)]
    places = (b"".join(each.offsets[part].tobytes() + each.sizes[part].tobytes() for each in members) for part in parts)
    paths = dict(enumerate(source.reader.paths))
    return Rows(hashes(source.shard_names), hashes(places), *file_facts(paths, len(paths)))


def rows_of_any(source: Source) -> Rows:
    """Return the rows of a source of another kind, which is asked for its pairs unless it makes their pictures."""
    num_rows = len(source)
    keys = source.keys() if isinstance(source, HasKeys) else map(source.key, range(num_rows))
    looked = looked_at(num_rows) if stores_pictures(source) else range(0)
    pairs = [fetched(source, row) for row in looked]
    texts = hashes(repr(None if pair is None else pair.captions) for pair in pairs)
    images = {row: pair.image for row, pair in zip(looked, pairs, strict=True) if pair is not None}
    paths = {row: image for row, image in images.items() if isinstance(image, Path)}
    return Rows(hashes(keys), spread_over_rows(texts, looked, num_rows), *file_facts(paths, num_rows))


def fetched(source: Source, row: int) -> Pair | None:
    """Return a pair, None where it cannot be used."""
    try:
        return source[row]
    except UnusableSample:
        return None


def stores_pictures(source: Source) -> bool:
    """Return whether a source's first usable pairs have pictures that are files or bytes."""
    found = (fetched(source, row) for row in range(min(len(source), 100)))
    first = next((pair for pair in found if pair is not None), None)
    return first is not None and isinstance(first.image, (bytes, Path))


def looked_at(num_rows: int) -> range:
    """Return the rows whose files are looked at: all, or every second, third, … one."""
    return range(0, num_rows, -(-num_rows // MOST_FILES) or 1)


def hashes(values: Iterable[str | bytes | memoryview]) -> numpy.ndarray:
    """Return a hash of each value, uint64 [n]."""
    return numpy.fromiter(map(value_hash, values), numpy.uint64)


def spread_over_rows(values: numpy.ndarray, rows: range, num_rows: int) -> numpy.ndarray:
    """Return the values of some rows in their places among all, uint64 [n], 0 elsewhere."""
    found = numpy.zeros(num_rows, numpy.uint64)
    found[rows] = values
    return found


def value_hash(value: str | bytes | memoryview) -> int:
    """Return a hash below 2 ** 64."""
    return xxhash.xxh3_64_intdigest(value.encode("utf-8", "surrogatepass") if isinstance(value, str) else value)


def file_facts(paths: Mapping[int, str | Path], num_rows: int) -> tuple[numpy.ndarray, numpy.ndarray, numpy.ndarray]:
    """Return sizes and times of the files of all rows, int64 [n], and hashes of contents, uint64 [n]."""
    sizes, times = numpy.zeros(num_rows, numpy.int64), numpy.zeros(num_rows, numpy.int64)
    contents = numpy.zeros(num_rows, numpy.uint64)
    for row, path in paths.items():
        sizes[row], times[row] = status_of(path)
    step = max(1, -(-int(sizes.clip(min=0).sum()) // MOST_BYTES))
    for row in numpy.flatnonzero((sizes > 0) & (sizes <= MOST_BYTES))[::step].tolist():
        contents[row] = content_hash(paths[row])
    return sizes, times, contents


def status_of(path: str | Path) -> tuple[int, int]:
    """Return the size and the time of a file; a size of -1 where it is missing."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # ValueError: a null character
        return MISSING, 0
    return status.st_size, status.st_mtime_ns


def content_hash(path: str | Path) -> int:
    """Return a hash of all bytes of a file, 0 where it cannot be read."""
    try:
        return xxhash.xxh3_64_intdigest(Path(path).read_bytes())
    except OSError:
        return 0
