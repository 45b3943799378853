"""How a user's words find a source: registered names, tables, tar shards, folders and saved datasets.

This module imports nothing heavy, so that `locate` finds a missing file before torch, pyarrow or datasets are loaded.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from accel_clip.config import DataConfig, SourceConfig
from accel_clip.data.sources.base import SAVED_DATASET_FILES, SOURCES, Source, SourceOptions, Stream
from accel_clip.data.sources.endings import TABLE_SUFFIXES
from accel_clip.data.sources.shards.names import (
    find_addresses,
    find_shards,
    means_addresses,
    means_shards,
    refuse_address,
)
from accel_clip.faults import ConfigError, DataError, nearest

BUILT_IN = {
    "demo": "accel_clip.data.sources.demo",
    "hf": "accel_clip.data.sources.hub",
    "hf-stream": "accel_clip.data.sources.hub_stream",
    "karpathy": "accel_clip.data.sources.tables.karpathy",
}
"""Registered names of this package, and the modules that register them when they are imported."""

FORMS = (
    f"write a table ({', '.join(TABLE_SUFFIXES)}), tar shards such as shards/{{0000..0041}}.tar or "
    "https://host/{0000..0041}.tar, a folder of pictures, a saved dataset, hf:org/name[:config][:split], "
    "hf-stream:org/name[:config][:split], demo, or name:argument of a registered source"
)


@dataclass(frozen=True)
class Location:
    """Where the pairs are."""

    kind: str
    """registered, table, shards, remote, folder or saved"""
    name: str
    """of a registered source, else what was written: a path, or shards on a disk or at addresses"""
    argument: str = ""
    """what a registered source is given"""
    shards: tuple[Path, ...] = ()
    """the files of shards on a disk, in their order"""
    addresses: tuple[str, ...] = ()
    """those of shards at addresses, in their order"""

    @property
    def path(self) -> Path:
        """Return the file or folder."""
        return Path(self.name).expanduser()


Locations = Mapping[tuple[str, str], Location]
"""Where sources were found, by the setting that names them and what is written there; others are looked for."""
NOT_LOOKED_FOR: Locations = MappingProxyType({})


def open_sources(
    items: Sequence[str | SourceConfig],
    data: DataConfig,
    extra: tuple[str, ...] = (),
    index_folder: Path | None = None,
    locations: Locations = NOT_LOOKED_FOR,
) -> Source:
    """Return the pairs of all items as one source, with the columns `extra`, of one width in all of them."""
    sources = [open_source(item, data, None, extra, index_folder, locations) for item in items]
    require_number_columns(sources, extra)
    return as_one(sources)


def require_number_columns(sources: Sequence[Source | Stream], columns: tuple[str, ...]) -> None:
    """Raise `ConfigError` unless every source has all columns of numbers that a loss asks for."""
    if columns:
        from accel_clip.data.sources.tables import numbers

        numbers.require_columns(sources, columns)


def as_one(sources: Sequence[Source]) -> Source:
    """Return several sources as one."""
    from accel_clip.data.sources.combine import Concatenated

    return sources[0] if len(sources) == 1 else Concatenated(sources)


def open_item(
    item: str | SourceConfig,
    data: DataConfig,
    extra: tuple[str, ...] = (),
    index_folder: Path | None = None,
    locations: Locations = NOT_LOOKED_FOR,
) -> Source | Stream:
    """Return what an item of `data.train` stands for, which may be a stream; raises as `open_source` does."""
    options = complete_options(item, data, None, "captions", extra, index_folder)
    return open_located(location_of(item, setting_of(item, data), locations), options)


def open_source(
    item: str | SourceConfig,
    data: DataConfig,
    label_key: str | None = None,
    extra: tuple[str, ...] = (),
    index_folder: Path | None = None,
    locations: Locations = NOT_LOOKED_FOR,
) -> Source:
    """Return a source of pictures with captions, and with labels where it has them (`label_key`, or the usual names).

    extra: columns of numbers that a table must have; other sources may go without (see `numbers.require_columns`).
    Raises `DataError` for what cannot be found or read, `ConfigError` for columns that are not there, and for streams.
    """
    setting = setting_of(item, data)
    options = complete_options(item, data, label_key, "captions", extra, index_folder)
    return map_style(open_located(location_of(item, setting, locations), options), setting)


def open_labelled(
    item: str | SourceConfig,
    data: DataConfig,
    label_key: str | None = None,
    index_folder: Path | None = None,
    locations: Locations = NOT_LOOKED_FOR,
) -> Source:
    """Return a source of pictures with labels, for zero-shot classification; it may have no captions."""
    setting = "eval.zero_shot"
    options = complete_options(item, data, label_key, "labels", index_folder=index_folder)
    return map_style(open_located(location_of(item, setting, locations), options), setting)


def map_style(source: Source | Stream, setting: str) -> Source:
    """Return a source that knows its pairs; raises `ConfigError` for a stream."""
    if isinstance(source, Stream):
        raise ConfigError(
            f"{setting}: '{source.name}' is a stream, which knows neither its length nor its pairs beforehand: streams "
            "are for data.train; download this data and name it on the disk"
        )
    return source


def setting_of(item: str | SourceConfig, data: DataConfig) -> str:
    """Return the setting that an item stands in, for messages."""
    return "data.val" if item in (data.val or []) and item not in data.train else "data.train"


def complete_options(
    item: str | SourceConfig,
    data: DataConfig,
    label_key: str | None,
    needs: str,
    extra: tuple[str, ...] = (),
    index_folder: Path | None = None,
) -> SourceOptions:
    """Return an item's settings, with those of the `data` section where it has none of its own."""
    own = item if isinstance(item, SourceConfig) else SourceConfig(item)
    return SourceOptions(
        source=own.source,
        image_key=own.image_key or data.image_key,
        image_root=own.image_root or data.image_root,
        caption_key=own.caption_key or data.caption_key,
        captions=weight_by_column(own.caption_key or data.caption_key or ()),
        encoding=data.encoding,
        quoting=data.quoting,
        caption_lines=data.caption_lines,
        label_key=label_key,
        needs=needs,
        extra=extra,
        index_folder=index_folder,
    )


def weight_by_column(written: Sequence[str] | Mapping[str, float] | str) -> dict[str, float]:
    """Return columns with their weights; those without any weigh 1."""
    if isinstance(written, Mapping):
        return dict(written)
    return dict.fromkeys([written] if isinstance(written, str) else written, 1.0)


def as_written(item: str | SourceConfig) -> str:
    """Return the words of an item that say where its pairs are."""
    return item.source if isinstance(item, SourceConfig) else item


def location_of(item: str | SourceConfig, setting: str, locations: Locations) -> Location:
    """Return where an item's pairs are: where they were found before, else by a look."""
    return locations.get((setting, as_written(item))) or locate(item, setting)


def locate(item: str | SourceConfig, setting: str = "data.train") -> Location:
    """Return where an item's pairs are, without opening them; raises `DataError` saying what the setting takes."""
    written = as_written(item)
    name, _, argument = written.partition(":")
    if name in SOURCES or name in BUILT_IN:
        return Location("registered", name, argument)
    refuse_address(written, setting)
    if means_addresses(written):
        return Location("remote", written, addresses=tuple(find_addresses(written, setting)))
    path = Path(written).expanduser()
    if written and means_shards(written):
        return Location("shards", written, shards=tuple(find_shards(written, setting)))
    if not written or not path.exists():
        raise DataError(f"{setting}: nothing is found under '{written}'{suggestion(name, path)} {FORMS}")
    if path.is_dir():
        saved = any((path / file).is_file() for file in SAVED_DATASET_FILES)
        return Location("saved" if saved else "folder", written)
    if not path.is_file():
        raise DataError(f"{setting}: '{written}' is neither a file nor a folder: {FORMS}")
    if path.suffix.lower() not in TABLE_SUFFIXES:
        raise DataError(f"{setting}: '{written}' is a file of the unknown kind '{path.suffix}'; {FORMS}")
    return Location("table", written)


def suggestion(name: str, path: Path) -> str:
    """Return the end of a sentence that names the registered source or the neighbouring file most like it."""
    registered = [*BUILT_IN, *(word for entry in SOURCES for word in (entry.name, *entry.aliases))]
    neighbours = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    return nearest(name, registered) or nearest(path.name, neighbours) or ";"


def open_located(location: Location, options: SourceOptions) -> Source | Stream:
    """Return the source at a location."""
    match location.kind:
        case "registered":
            if location.name in BUILT_IN:
                importlib.import_module(BUILT_IN[location.name])
            return SOURCES.get(location.name)(location.argument, options)
        case "saved":
            from accel_clip.data.sources.hub import open_saved

            return open_saved(location.path, options)
        case "shards":
            from accel_clip.data.sources.shards.local import open_shards

            return open_shards(location.name, location.shards, options)
        case "remote":
            from accel_clip.data.sources.shards.remote import open_remote_shards

            return open_remote_shards(location.name, location.addresses, options)
        case "folder":
            from accel_clip.data.sources.folders.folder import open_folder

            return open_folder(location.path, options)
        case _:
            from accel_clip.data.sources.tables.opening import open_table

            return open_table(location.path, options)


def register_built_in() -> None:
    """Import the modules of this package that register sources, for a list of all there are."""
    for module in BUILT_IN.values():
        importlib.import_module(module)
