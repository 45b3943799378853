"""Pairs of the `datasets` library: from the Hugging Face Hub, or saved in a folder."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from accel_clip.data.sources.base import SOURCES, Source
from accel_clip.data.sources.table_files import broken_table_errors
from accel_clip.faults import DataError
from accel_clip.network import go_offline_without_hub

if TYPE_CHECKING:
    from datasets import Dataset

    from accel_clip.data.sources.resolve import SourceOptions

NAME_AND_SPLIT = re.compile(r"(?P<name>.+?)(:(?P<split>[^:/\\\[\]]+(\[[^\]]*\])?))?")
DEFAULT_SPLIT = "train"
UNPICKLING = "pandas"  # the one reader of `datasets` that unpickles, whatever lies in the current folder


@SOURCES.register("hf")
def open_hub(argument: str, options: SourceOptions) -> Source:
    """A dataset of the Hugging Face Hub, or a local folder that `datasets` loads: hf:org/name[:split]."""
    match = NAME_AND_SPLIT.fullmatch(argument)
    if match is None:
        raise DataError(f"'hf:{argument}' names no dataset: write hf:org/name or hf:org/name:split")
    name, split = match["name"], match["split"] or DEFAULT_SPLIT
    local = Path(name).expanduser()
    if not local.is_dir():
        go_offline_without_hub()
    dataset = load_hub(str(local) if local.is_dir() else name, split)
    return source_of(dataset, f"hf:{argument}", local if local.is_dir() else cache_folder(), options)


def open_saved(folder: Path, options: SourceOptions) -> Source:
    """Return the pairs of a dataset that `save_to_disk` wrote; of one with several splits, `train`."""
    return source_of(load_saved(folder), str(folder), folder, options)


def load_hub(name: str, split: str) -> Dataset:
    """Return a split of a dataset; raises `DataError` naming the dataset, in one line."""
    from datasets import load_dataset

    refuse_unpickling(name)
    try:
        return load_dataset(name, split=split)
    except broken_table_errors() as error:  # RuntimeError: a script instead of data
        raise DataError(f"hf:{name}:{split} cannot be loaded: {first_line(error)}") from error


def refuse_unpickling(name: str) -> None:
    """Raise `DataError` for a name that stands for a reader which unpickles what lies in the current folder."""
    if name == UNPICKLING:
        raise DataError(f"hf:{name} is no dataset but a reader of pickled tables, which run programs: save a .parquet")


def load_saved(folder: Path) -> Dataset:
    """Return a saved dataset; raises `DataError` for one that is broken, or has several splits but no `train`."""
    from datasets import DatasetDict, load_from_disk

    try:
        dataset = load_from_disk(str(folder))
    except broken_table_errors() as error:  # LookupError: it has no rows
        raise DataError(f"{folder}: the saved dataset cannot be loaded: {first_line(error)}") from error
    if not isinstance(dataset, DatasetDict):
        return dataset
    if DEFAULT_SPLIT not in dataset:
        raise DataError(
            f"{folder}: the saved dataset has the splits {', '.join(dataset)} and no '{DEFAULT_SPLIT}': name the "
            f"folder of one, such as {folder / next(iter(dataset))}"
        )
    return dataset[DEFAULT_SPLIT]


def source_of(dataset: Dataset, name: str, folder: Path, options: SourceOptions) -> Source:
    """Return the pairs of a dataset's Arrow table, in which pictures are not decoded and classes have names."""
    from accel_clip.data.sources.table import source_over

    return source_over(dataset.data, name, folder, options)


def cache_folder() -> Path:
    """Return the folder in which downloaded pictures lie, where a dataset stores their paths and not their bytes."""
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME)


def first_line(error: Exception) -> str:
    """Return what went wrong in one line."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__
