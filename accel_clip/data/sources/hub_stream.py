"""Pairs of the `datasets` library that are read from front to back while they are trained on, not downloaded before."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import httpx2
import pyarrow

from accel_clip.data.bad_samples import UnusableSample
from accel_clip.data.sources.base import SOURCES, Pair, SourceOptions, Stream, StreamItem
from accel_clip.data.sources.connections import Patience
from accel_clip.data.sources.hub import (
    DatasetChoice,
    cache_folder,
    first_error_line,
    load_meant,
    load_saved,
    parsed,
    refuse_unpickling,
    saved_folder,
)
from accel_clip.data.sources.remote_file import WORTH_ANOTHER_ATTEMPT
from accel_clip.data.sources.tables.columns import Columns
from accel_clip.data.sources.tables.numbers import numbers_of_width
from accel_clip.data.sources.tables.opening import source_over
from accel_clip.data.sources.tables.table import TableSource
from accel_clip.faults import DataError
from accel_clip.process.network import go_offline_without_hub
from accel_clip.redaction import masked

if TYPE_CHECKING:
    from datasets import IterableDataset


ROWS_AT_ONCE = 100
MOST_SHARDS_OF_SAVED = 64
END = 1 << 62
"""the place behind all rows of a shard"""
OF_THE_NETWORK = (OSError, httpx2.HTTPError, asyncio.TimeoutError, EOFError, RuntimeError)


class HubStream:
    """A stream of the rows of a dataset, shard after shard as `datasets` cuts it; places are numbers of rows.

    widths: how many numbers each further column holds. `datasets` itself tries for minutes to read on.
    """

    def __init__(
        self,
        name: str,
        dataset: IterableDataset,
        columns: Columns,
        root: Path,
        widths: Mapping[str, int],
        patience: Patience | None = None,
    ) -> None:
        self.name, self.dataset, self.num_shards = name, dataset, dataset.num_shards
        self.columns, self.root, self.widths = replace(columns, extra=()), root, dict(widths)
        self.patience = patience or Patience()

    def read(self, shard: int, start: int) -> Iterator[StreamItem]:
        """Yield what a shard holds from row `start` on, 0 or the `end` of what it gave before.

        A shard that cannot be read, or on, ends with an `UnusableSample` that says why.
        """
        row, num_failed = start, 0
        while row < END:
            try:
                for item in self.rows(shard, row):
                    row, num_failed = item.end, 0
                    yield item
                return
            except of_the_data() as error:
                problem = UnusableSample("unreadable", first_error_line(error), self.place(shard))
            except OF_THE_NETWORK as error:
                num_failed += 1
                if is_worth_another_attempt(error) and num_failed <= len(self.patience.waits_seconds):
                    self.patience.sleep(self.patience.waits_seconds[num_failed - 1])
                    continue
                last = f"{type(error).__name__}: {first_error_line(error)}"
                detail = f"{num_failed} attempts have failed, the last by {last}"
                problem = UnusableSample("missing_file", masked(detail), self.place(shard))
            yield StreamItem(self.place(shard), problem, END)
            return

    def rows(self, shard: int, start: int) -> Iterator[StreamItem]:
        """Yield what stands in the rows of a shard; raises what `datasets` does."""
        dataset = self.dataset.shard(self.num_shards, shard).skip(start).with_format("arrow")
        row = start
        for table in dataset.iter(ROWS_AT_ONCE):
            source = TableSource(self.name, table, self.columns, self.root)
            for index in range(table.num_rows):
                row += 1
                key, pair = self.outcome(source, table, index)
                yield StreamItem(key or f"{self.place(shard)}, row {row}", pair, row)

    def outcome(self, source: TableSource, table: pyarrow.Table, index: int) -> tuple[str, Pair | UnusableSample]:
        """Return the key of a row's picture, empty without one, and the row as a pair, or why it is none."""
        key, columns = "", self.widths.items()
        try:
            key = source.key(index)
            pair = source[index]
            extra = {name: numbers_of_width(table[name][index], name, width) for name, width in columns}
        except UnusableSample as problem:
            return key, UnusableSample(*problem.args)  # a new one: what was raised keeps the table in memory
        return key, replace(pair, extra=extra)

    def place(self, shard: int) -> str:
        """Return what a shard is called."""
        return f"{self.name}, shard {shard}"


@SOURCES.register("hf-stream")
def open_hub_stream(argument: str, options: SourceOptions) -> Stream:
    """A dataset of the Hugging Face Hub, read from the network in training: hf-stream:org/name[:config][:split]."""
    chosen = parsed(argument, "hf-stream")
    name, folder = f"hf-stream:{argument}", Path(chosen.name).expanduser()
    saved = saved_folder(chosen)
    if saved is not None:
        return stream_of(cut_saved(saved, name), name, saved, options)
    is_local = folder.is_dir()
    if not is_local:
        go_offline_without_hub()
    dataset = load_stream(chosen, str(folder) if is_local else chosen.name)
    return stream_of(dataset, name, folder if is_local else cache_folder(), options)


def cut_saved(folder: Path, name: str) -> IterableDataset:
    """Return a saved dataset in shards of equal size; raises `DataError`."""
    dataset = load_saved(folder).with_format(None)
    if len(dataset) == 0:
        raise DataError(f"{name}: the dataset has no rows")
    return dataset.to_iterable_dataset(num_shards=min(MOST_SHARDS_OF_SAVED, len(dataset)))


def load_stream(chosen: DatasetChoice, path: str) -> IterableDataset:
    """Return a split of a dataset, of which nothing is downloaded yet; raises `DataError` in one line."""
    from datasets import load_dataset

    refuse_unpickling(path)
    try:
        return load_meant(chosen, path, lambda config, split: load_dataset(path, config, split=split, streaming=True))
    except of_either() as error:
        raise DataError(f"{chosen} cannot be loaded: {first_error_line(error)}") from error


def stream_of(dataset: IterableDataset, name: str, folder: Path, options: SourceOptions) -> HubStream:
    """Return the pairs of a dataset after a look at its first rows; raises `DataError` and `ConfigError`."""
    from datasets import Features

    try:
        first = next(dataset.with_format("arrow").iter(ROWS_AT_ONCE), None)
    except of_either() as error:
        raise DataError(f"{name} cannot be read: {first_error_line(error)}") from error
    if first is None:
        raise DataError(f"{name}: the dataset has no rows")
    source = source_over(first, name, folder, options)
    if "://" in source.found(0)[1]:
        raise DataError(
            f"{name}: its pictures are files of their own, which are not streamed: write hf: for hf-stream:"
        )
    if dataset.features is None:
        dataset = dataset.cast(Features.from_arrow_schema(first.schema))
    return HubStream(name, dataset, source.columns, Path(source.root), source.widths)


def of_the_data() -> tuple[type[Exception], ...]:
    """Return the errors that another attempt does not better."""
    from datasets.exceptions import DatasetsError

    of_another_kind = (ValueError, TypeError, LookupError, AttributeError, RecursionError, ArithmeticError)
    return (*of_another_kind, DatasetsError, pyarrow.ArrowException)


def of_either() -> tuple[type[Exception], ...]:
    """Return the errors of the data and of the network."""
    return *of_the_data(), *OF_THE_NETWORK


def is_worth_another_attempt(error: Exception) -> bool:
    """Return whether an error may pass: a file that is not there, or not for us, stays so."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        return status in WORTH_ANOTHER_ATTEMPT
    return not isinstance(error, (FileNotFoundError, PermissionError))
