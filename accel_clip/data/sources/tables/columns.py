"""Which columns of an Arrow table make pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow
from pyarrow import types

from accel_clip.data.sources.base import SourceOptions
from accel_clip.faults import ConfigError, DataError, nearest, some_of
from accel_clip.typed import WrongValue, fit
from accel_clip.typed_json import WrongContent, parse_json

IMAGE_COLUMNS = ("image", "image_path", "file_name", "filepath", "filename", "path", "img", "image_name", "images")
CAPTION_COLUMNS = ("caption", "captions", "text", "title", "comment")
LABEL_COLUMNS = ("label", "class", "category", "class_name")
USUAL_COLUMNS = frozenset((*IMAGE_COLUMNS, *CAPTION_COLUMNS, *LABEL_COLUMNS))


@dataclass(frozen=True)
class Columns:
    """The columns that make pairs."""

    image: str
    """the one with pictures"""
    captions: tuple[str, ...]
    """those with captions"""
    label: str | None = None
    """the one with class names, None without one"""
    extra: tuple[str, ...] = ()
    """those with numbers that a loss asks for"""
    weights: Mapping[str, float] = field(default_factory=dict)
    """how often captions of each column are shown beside the others, empty for all alike"""

    def names(self) -> list[str]:
        """Return each column once."""
        return list(dict.fromkeys([self.image, *self.captions, *([self.label] if self.label else []), *self.extra]))


def choose_columns(schema: pyarrow.Schema, options: SourceOptions, name: str) -> Columns:
    """Return the columns that the options name, else those with usual names; raises `ConfigError`."""
    pictures = [field.name for field in schema if holds_pictures(of_one(field.type)) or holds_bytes(of_one(field.type))]
    image = (
        (options.image_key and known_column("data.image_key", options.image_key, schema, name))
        or usual_column(IMAGE_COLUMNS, pictures)
        or (pictures[0] if len(pictures) == 1 else usual_column(IMAGE_COLUMNS, schema.names))
        or missing_column("data.image_key", IMAGE_COLUMNS, schema, name)
    )
    require_pictures("data.image_key", image, schema, name)
    label = usual_column(LABEL_COLUMNS, schema.names)
    if options.label_key:
        label = known_column("eval.label_key", options.label_key, schema, name)
    if options.needs == "labels":
        return Columns(image, (), label or missing_column("eval.label_key", LABEL_COLUMNS, schema, name))
    captions = tuple(known_column("data.caption_key", key, schema, name) for key in options.captions)
    usual = usual_column(CAPTION_COLUMNS, [column for column in schema.names if column != image])
    captions = captions or (usual or missing_column("data.caption_key", CAPTION_COLUMNS, schema, name),)
    for column in captions:
        require_text("data.caption_key", column, schema, name)
    extra = tuple(known_column("loss.options", key, schema, name) for key in options.extra)
    return Columns(image, captions, label, extra, options.captions)


def known_column(setting: str, key: str, schema: pyarrow.Schema, name: str) -> str:
    """Return the column that a setting names; raises `ConfigError` when there is no such column."""
    if key in schema.names:
        return key
    hint = nearest(key, schema.names) or "."
    raise ConfigError(f"{setting}: {name} has no column '{key}'{hint} Its columns: {some_columns(schema.names)}")


def usual_column(usual: tuple[str, ...], names: list[str]) -> str | None:
    """Return the first of the usual names that is there, in any case."""
    by_lower = {name.lower(): name for name in reversed(names)}
    return next((by_lower[word] for word in usual if word in by_lower), None)


def missing_column(setting: str, usual: tuple[str, ...], schema: pyarrow.Schema, name: str) -> str:
    """Raise `ConfigError` for a table that has none of the usual columns."""
    raise ConfigError(
        f"{setting}: {name} has none of the usual columns ({', '.join(usual)}): name one of those it has: "
        f"{some_columns(schema.names)}"
    )


def some_columns(names: Sequence[str]) -> str:
    """Return the names of columns for a message; where a file has no header line they are what stands in it."""
    return some_of(names, longest=60)


def is_asked_for(column: str, options: SourceOptions) -> bool:
    """Return whether a column may be one of a pair's: named by a setting, or with a usual name."""
    named = (options.image_key, options.label_key, *options.captions, *options.extra)
    return column in named or column.lower() in USUAL_COLUMNS


def require_text(setting: str, column: str, schema: pyarrow.Schema, name: str) -> None:
    """Raise `ConfigError` for a column of pictures or objects where text is needed."""
    kind = schema.field(column).type
    if types.is_nested(getattr(kind, "value_type", kind)):
        raise ConfigError(f"{setting}: the column '{column}' of {name} holds {kind}, not text")


def require_pictures(setting: str, column: str, schema: pyarrow.Schema, name: str) -> None:
    """Raise `ConfigError` for a column that holds neither pictures nor paths, whatever its cells are."""
    whole = schema.field(column).type
    kind = of_one(whole)
    is_path_or_bytes = not types.is_nested(kind) and (kind == whole or not types.is_primitive(kind))
    if not (is_path_or_bytes or holds_pictures(kind)):
        raise ConfigError(
            f"{setting}: the column '{column}' of {name} holds {str(whole)[:200]}, no pictures: store the bytes of "
            "picture files, or their paths"
        )


def of_one(kind: pyarrow.DataType) -> pyarrow.DataType:
    """Return the type of an item where cells are lists, else that of a cell."""
    is_list = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    return kind.value_type if is_list or types.is_list_view(kind) or types.is_large_list_view(kind) else kind


def holds_pictures(kind: pyarrow.DataType) -> bool:
    """Return whether cells are {bytes, path}, as `datasets` stores pictures."""
    return types.is_struct(kind) and {"bytes", "path"} <= {field.name for field in kind}


def holds_bytes(kind: pyarrow.DataType) -> bool:
    """Return whether cells are bytes."""
    return any(of_kind(kind) for of_kind in BINARY)


BINARY = (types.is_binary, types.is_large_binary, types.is_fixed_size_binary, types.is_binary_view)


@dataclass(frozen=True)
class DatasetInfo:
    """What `datasets` knows of a table."""

    features: dict[str, Any] | None = None
    """what each column is, by its name"""


@dataclass(frozen=True)
class TableMetadata:
    """What `datasets` writes into a table."""

    info: DatasetInfo | None = None
    """of the table"""


def class_names(schema: pyarrow.Schema, columns: Sequence[str], name: str) -> dict[str, list[str]]:
    """Return the names of the classes that some of the columns count, as `datasets` writes them into the metadata.

    Raises `DataError` for metadata that name them in no way that can be read.
    """
    written = (schema.metadata or {}).get(b"huggingface", b"{}")
    names = {}
    try:
        info = parse_json(written, TableMetadata, "'huggingface'").info or DatasetInfo()
        for column in columns:
            feature = of_classes((info.features or {}).get(column))
            if feature is not None:
                names[column] = fit(feature["names"], list[str], f"'huggingface': info.features.{column}.names")
    except (WrongContent, WrongValue) as error:
        raise DataError(f"{name}: in its metadata {error}: write the table anew, without these metadata") from error
    return names


def of_classes(feature: Any) -> dict[str, Any] | None:
    """Return what is written about classes, also where cells are lists of their numbers; None for other columns."""
    while isinstance(feature, (dict, list)):
        if isinstance(feature, dict) and "names" in feature:
            return feature
        feature = feature.get("feature") if isinstance(feature, dict) else next(iter(feature), None)
    return None
