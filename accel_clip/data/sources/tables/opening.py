"""From a file of pairs, or what was read of one, to a source over its rows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pyarrow

from accel_clip.data.sources.base import SourceOptions
from accel_clip.data.sources.tables.columns import choose_columns
from accel_clip.data.sources.tables.content import TableContent
from accel_clip.data.sources.tables.files import read_table
from accel_clip.data.sources.tables.first_rows import look_at_rows
from accel_clip.data.sources.tables.table import TableSource
from accel_clip.faults import ConfigError, DataError


def open_table(path: Path, options: SourceOptions) -> TableSource:
    """Return the pairs of a table file; paths start from `data.image_root`, by default the table's folder."""
    return open_content(read_table(path, options), str(path), options)


def open_content(content: TableContent, name: str, options: SourceOptions) -> TableSource:
    """Return the pairs of what was read from a file."""
    return source_over(content.table, name, content.folder, options, content.broken)


def source_over(
    table: pyarrow.Table, name: str, folder: Path, options: SourceOptions, broken: Mapping[int, str] | None = None
) -> TableSource:
    """Return the pairs of an Arrow table, its columns chosen by the options; raises `ConfigError` and `DataError`."""
    if table.num_rows == 0:
        raise DataError(f"{name}: the table has no rows")
    root = Path(options.image_root).expanduser() if options.image_root else folder
    if options.image_root and not root.is_dir():
        raise ConfigError(f"data.image_root: '{root}' is no folder: name the folder that picture paths start from")
    source = TableSource(name, table, choose_columns(table.schema, options, name), root, broken=broken)
    look_at_rows(source)
    return source
