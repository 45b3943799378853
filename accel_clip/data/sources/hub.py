"""Pairs of the `datasets` library: from the Hugging Face Hub, or saved in a folder."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from accel_clip.data.sources.base import SAVED_DATASET_FILES, SOURCES, Source, SourceOptions
from accel_clip.data.sources.tables.parquet_files import broken_table_errors
from accel_clip.faults import DataError
from accel_clip.process.network import go_offline_without_hub

if TYPE_CHECKING:
    from datasets import Dataset


T = TypeVar("T")
WRITTEN = re.compile(r"(?P<name>.+?)(:(?P<config>[^:/\\\[\]]+))?(:(?P<split>[^:/\\\[\]]+(\[[^\]]*\])?))?")
DEFAULT_SPLIT = "train"
UNPICKLING = "pandas"  # the one reader of `datasets` that unpickles, whatever lies in the current folder


@dataclass(frozen=True)
class DatasetChoice:
    """A dataset that a user has chosen."""

    kind: str
    """by which it was: hf or hf-stream"""
    name: str
    """on the Hub, or of a folder"""
    meant: tuple[tuple[str | None, str], ...]
    """the configuration, None for the only or usual one, and the split; where one word may be either, both"""

    def __str__(self) -> str:
        config, split = self.meant[0]
        return ":".join(word for word in (self.kind, self.name, config, split) if word)


@SOURCES.register("hf")
def open_hub(argument: str, options: SourceOptions) -> Source:
    """A dataset of the Hugging Face Hub, or a local folder that `datasets` loads: hf:org/name[:config][:split]."""
    chosen = parsed(argument, "hf")
    local, saved = Path(chosen.name).expanduser(), saved_folder(chosen)
    if saved is not None:
        return source_of(load_saved(saved), f"hf:{argument}", saved, options)
    if not local.is_dir():
        go_offline_without_hub()
    dataset = load_hub(chosen, str(local) if local.is_dir() else chosen.name)
    return source_of(dataset, f"hf:{argument}", local if local.is_dir() else cache_folder(), options)


def parsed(argument: str, kind: str) -> DatasetChoice:
    """Return what a user has chosen by `name[:config][:split]`; raises `DataError` for no name."""
    match = WRITTEN.fullmatch(argument)
    if match is None:
        raise DataError(f"'{kind}:{argument}' names no dataset: write {kind}:org/name[:configuration][:split]")
    name, word, split = match["name"], match["config"], match["split"]
    if word is None or split is not None:
        return DatasetChoice(kind, name, ((word, split or DEFAULT_SPLIT),))
    return DatasetChoice(kind, name, ((None, word), (word, DEFAULT_SPLIT)))


def open_saved(folder: Path, options: SourceOptions) -> Source:
    """Return the pairs of a dataset that `save_to_disk` wrote; of one with several splits, `train`."""
    return source_of(load_saved(folder), str(folder), folder, options)


def saved_folder(chosen: DatasetChoice) -> Path | None:
    """Return the folder in which the chosen split was saved by `save_to_disk`, None for other datasets.

    Raises `DataError` for a split that is not there.
    """
    folder = Path(chosen.name).expanduser()
    is_written = chosen.meant != ((None, DEFAULT_SPLIT),)
    split = chosen.meant[0][1]
    if is_saved(folder / split):
        return folder / split
    if not is_saved(folder):
        return None
    if is_written:
        splits = sorted(place.name for place in folder.iterdir() if is_saved(place))
        has = f"the splits {', '.join(splits)}" if splits else "one split, which has no name"
        raise DataError(f"{chosen}: the saved dataset {folder} has {has}, and no '{split}'")
    return folder


def is_saved(folder: Path) -> bool:
    """Return whether a folder is one that `save_to_disk` wrote."""
    return any((folder / file).is_file() for file in SAVED_DATASET_FILES)


def load_hub(chosen: DatasetChoice, path: str) -> Dataset:
    """Return a split of a dataset; raises `DataError` naming the dataset, in one line."""
    from datasets import load_dataset

    refuse_unpickling(path)
    try:
        return load_meant(chosen, path, lambda config, split: load_dataset(path, config, split=split))
    except broken_table_errors() as error:  # RuntimeError: a script instead of data
        raise DataError(f"{chosen} cannot be loaded: {first_error_line(error)}") from error


def load_meant(chosen: DatasetChoice, path: str, load: Callable[[str | None, str], T]) -> T:
    """Return what loads of what a user may have meant; raises `DataError` saying what there is, and what `load` does.

    load: from a configuration and a split; it raises ValueError where the dataset has none of that name.
    """
    problems = []
    for config, split in chosen.meant:
        try:
            return load(config, split)
        except ValueError as error:
            problems.append(error)
    names, asked = configurations(path), chosen.meant[-1][0]
    if len(names) > 1 and asked not in names:
        example = f"{chosen.kind}:{chosen.name}:{names[0]}"
        raise DataError(
            f"{chosen} cannot be loaded: the dataset has the configurations {', '.join(names)}: name one, as "
            f"{example}, and a split behind it where it is not {DEFAULT_SPLIT}, as {example}:test"
        ) from problems[0]
    problem = problems[-1] if asked in names else problems[0]
    raise DataError(f"{chosen} cannot be loaded: {first_error_line(problem)}") from problem


def configurations(path: str) -> list[str]:
    """Return the names of a dataset's configurations, none where they cannot be found."""
    from datasets import get_dataset_config_names

    with contextlib.suppress(*broken_table_errors()):
        return get_dataset_config_names(path)
    return []


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
        raise DataError(f"{folder}: the saved dataset cannot be loaded: {first_error_line(error)}") from error
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
    from accel_clip.data.sources.tables.opening import source_over

    return source_over(dataset.data, name, folder, options)


def cache_folder() -> Path:
    """Return the folder in which downloaded pictures lie, where a dataset stores their paths and not their bytes."""
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME)


def first_error_line(error: Exception) -> str:
    """Return what went wrong in one line."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__
