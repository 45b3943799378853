"""Parquet tables, one or the parts of one: memory-mapped, with only the columns that are asked for."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pyarrow
from pyarrow import parquet

from accel_clip import console
from accel_clip.data.sources.base import SourceOptions
from accel_clip.data.sources.tables.columns import choose_columns, class_names
from accel_clip.data.sources.tables.content import TableContent
from accel_clip.faults import DataError, one_line

PART_OF_MANY = re.compile(r"(?P<stem>.*?)-?(?P<number>\d{5,})-of-(?P<total>\d{5,})(-\w+)?")
"""as the Hugging Face hub names them: train-00000-of-00002.parquet"""
SPLITS = frozenset({"train", "training", "val", "valid", "validation", "dev", "test"})
TRAINING = ("train", "training")


def read_parquet(path: Path, options: SourceOptions) -> TableContent:
    """Return a .parquet through the cache of `datasets`: memory-mapped, so that pictures in it need no memory."""
    return read_parts([path], path, path.parent, options)


def read_parts(files: Sequence[Path], path: Path, folder: Path, options: SourceOptions) -> TableContent:
    """Return the parts of a table as one; raises `DataError` for what is no parquet and for parts that do not fit."""
    from datasets import Dataset, Features

    try:
        schema = pyarrow.unify_schemas([parquet.read_schema(file) for file in files], promote_options="permissive")
        filled = [str(file) for file in files if parquet.read_metadata(file).num_rows]  # Spark writes empty parts too
        if not filled:
            raise DataError(f"{path}: the table has no rows")
        names = choose_columns(schema, options, str(path)).names()
        class_names(schema, names, str(path))
        chosen = pyarrow.schema([schema.field(name) for name in names], schema.metadata)
        features = Features.from_arrow_schema(chosen)
        table = Dataset.from_parquet(filled, columns=names, features=features).data
    except broken_table_errors() as error:
        raise DataError(f"{path}: not a parquet table that can be read: {one_line(error)}") from error
    return TableContent(table, folder)


def broken_table_errors() -> tuple[type[Exception], ...]:
    """Return what `datasets` raises for broken data, and for descriptions of them that are of another kind."""
    from datasets.exceptions import DatasetsError

    of_another_kind = (TypeError, AttributeError, LookupError, RecursionError, AssertionError)
    return (DatasetsError, OSError, ValueError, RuntimeError, pyarrow.ArrowException, *of_another_kind)


def read_folder(folder: Path, files: Sequence[Path], options: SourceOptions) -> TableContent:
    """Return the parquet files of a folder as one table: those of its training split where their names tell splits.

    Raises `DataError` for several tables in several folders, for splits without one for training, and for lost parts.
    """
    homes = sorted({home_of(file) for file in files})
    if len(homes) > 1:
        raise DataError(f"{folder}: it holds parquet tables in {len(homes)} folders: name one, such as {homes[0]}")
    by_split: dict[str, list[Path]] = {}
    for file in files:
        by_split.setdefault(split_of(file), []).append(file)
    named = {split: found for split, found in by_split.items() if split.lower() in SPLITS}
    if named and len(by_split) > 1:
        chosen = next((split for split in named if split.lower() in TRAINING), None)
        others = ", ".join(sorted(by_split.keys() - {chosen}))
        if chosen is None:
            raise DataError(
                f"{folder}: it holds the splits {others} and no train: name one, such as hf:{folder}:{others}"
            )
        console.say(f"{folder}: of its splits {chosen} is read, and {others} not; hf:{folder}:validation reads another")
        files = by_split[chosen]
    require_all_parts(folder, files)
    is_a_table = folder.suffix.lower() == ".parquet"  # Spark calls a folder as others call a file
    return read_parts(files, folder, folder.parent if is_a_table else folder, options)


def home_of(file: Path) -> Path:
    """Return the folder of a table: that of its file, without those that stand for values of a column (year=2020)."""
    return next(folder for folder in file.parents if "=" not in folder.name)


def split_of(file: Path) -> str:
    """Return the split that a file is of by its name, or nothing."""
    part = PART_OF_MANY.fullmatch(file.stem)
    stem = part["stem"] if part else file.stem
    return stem if part or stem.lower() in SPLITS else ""


def require_all_parts(folder: Path, files: Sequence[Path]) -> None:
    """Raise `DataError` where the names of parts count more than there are."""
    parts = [part for file in files if (part := PART_OF_MANY.fullmatch(file.stem))]
    total = max((int(part["total"]) for part in parts), default=0)
    missing = sorted(set(range(total)) - {int(part["number"]) for part in parts})
    if parts and missing:
        raise DataError(
            f"{folder}: of {total} parts {len(missing)} are missing, the first is number {missing[0]:05d}: download "
            "them, or name the files that are there"
        )
