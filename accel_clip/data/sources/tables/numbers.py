"""Columns of numbers, such as stored features: what a cell holds, and that every source has what the loss asks for."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from itertools import islice
from typing import Any

import numpy
import pyarrow

from accel_clip.data.bad_samples import UnusableSample
from accel_clip.data.sources.base import Pair, Source, Stream
from accel_clip.faults import ConfigError, nearest

ROWS_TO_LOOK_AT = 100  # at most, for one that can be read


def numbers_of_width(cell: pyarrow.Scalar, column: str, width: int) -> numpy.ndarray:
    """Return the numbers in a cell, float32 [width]; raises `UnusableSample` for anything else."""
    try:
        numbers = numbers_in_cell(cell)
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise UnusableSample("unreadable", f"the column '{column}' holds no list of numbers: {error}") from error
    if len(numbers) != width:
        raise UnusableSample("unreadable", f"the column '{column}' holds {len(numbers)} numbers, in other rows {width}")
    if not numpy.isfinite(numbers).all():
        raise UnusableSample("unreadable", f"the column '{column}' holds a number that is not finite")
    return numbers


def numbers_in_cell(cell: pyarrow.Scalar) -> numpy.ndarray:
    """Return the numbers in a cell, float32 [n]: a list, a JSON list in a text, or one number; raises `ValueError`."""
    content: Any = cell.values if isinstance(cell, pyarrow.ListScalar) else cell.as_py()
    if content is None:
        raise ValueError("the cell is empty")
    if isinstance(content, pyarrow.Array):
        content = content.to_numpy(zero_copy_only=False)
        if content.dtype == object:  # tables of JSON lines keep numbers as they are written
            content = content.astype(numpy.float64)
    elif isinstance(content, str):
        content = json.loads(content)
    numbers = numpy.atleast_1d(content)
    if numbers.ndim != 1 or numbers.dtype.kind not in "fiu":
        raise ValueError(f"{numbers.dtype} in {numbers.ndim} dimensions")
    with numpy.errstate(over="ignore"):  # too large is infinite, which is told of
        return numbers.astype(numpy.float32)


def usual_width(cells: pyarrow.ChunkedArray, column: str, name: str) -> int:
    """Return how many numbers most of the first cells hold; raises `ConfigError` when the first rows have none."""
    problem: Exception | None = None
    widths: Counter[int] = Counter()
    for cell in cells[:ROWS_TO_LOOK_AT]:
        try:
            widths[len(numbers_in_cell(cell))] += 1
        except (ValueError, TypeError, OverflowError, RecursionError) as error:
            problem = problem or error
    del widths[0]
    if not widths:
        raise ConfigError(f"loss.options: the column '{column}' of {name} holds no lists of numbers ({problem})")
    return widths.most_common(1)[0][0]


def require_columns(sources: Sequence[Source | Stream], columns: Sequence[str]) -> None:
    """Raise `ConfigError` unless every source has all columns, each of one width; looks at one pair of each source."""
    pairs = [(source.name, pair) for source in sources if (pair := first_usable(source)) is not None]
    for column in columns:
        for name, pair in pairs:
            if column not in pair.extra:
                hint = nearest(column, pair.extra) or ":"
                raise ConfigError(
                    f"loss.options: the source '{name}' has no column '{column}'{hint} columns of numbers stand in "
                    "tables, in metadata files of folders, and in datasets"
                )
        widths = {len(pair.extra[column]): name for name, pair in pairs}
        if len(widths) > 1:
            found = ", ".join(f"{width} numbers in {name}" for width, name in widths.items())
            raise ConfigError(f"loss.options: the column '{column}' holds {found}: it must hold as many everywhere")


def first_usable(source: Source | Stream) -> Pair | None:
    """Return the first pair of a source that can be fetched, None when the first rows have none."""
    if isinstance(source, Stream):
        items = islice(source.read(0, 0), ROWS_TO_LOOK_AT)
        return next((item.pair for item in items if isinstance(item.pair, Pair)), None)
    for index in range(min(len(source), ROWS_TO_LOOK_AT)):
        try:
            return source[index]
        except UnusableSample:
            continue
    return None
