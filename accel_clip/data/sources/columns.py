"""Which columns of an Arrow table make pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pyarrow
from pyarrow import types

from accel_clip.faults import ConfigError, DataError, nearest
from accel_clip.typed import WrongValue, fit
from accel_clip.typed_json import WrongContent, parse_json

if TYPE_CHECKING:
    from accel_clip.data.sources.resolve import SourceOptions

IMAGE_COLUMNS = ("image", "image_path", "file_name", "filepath", "filename", "path", "img")
CAPTION_COLUMNS = ("caption", "captions", "text", "title")
LABEL_COLUMNS = ("label", "class", "category", "class_name")


@dataclass(frozen=True)
class Columns:
    """The columns that make pairs; weights: how often captions of each are shown, empty for all alike."""

    image: str
    captions: tuple[str, ...]
    label: str | None = None
    extra: tuple[str, ...] = ()
    weights: Mapping[str, float] = field(default_factory=dict)

    def names(self) -> list[str]:
        """Return each column once."""
        return list(dict.fromkeys([self.image, *self.captions, *([self.label] if self.label else []), *self.extra]))


def choose_columns(schema: pyarrow.Schema, options: SourceOptions, name: str) -> Columns:
    """Return the columns that the options name, else those with usual names; raises `ConfigError`."""
    pictures = [field.name for field in schema if holds_pictures(field.type) or holds_bytes(field.type)]
    image = (
        (options.image_key and known_column("data.image_key", options.image_key, schema, name))
        or usual_column(IMAGE_COLUMNS, pictures)
        or (pictures[0] if len(pictures) == 1 else usual_column(IMAGE_COLUMNS, schema.names))
        or missing_column("data.image_key", IMAGE_COLUMNS, schema, name)
    )
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
    raise ConfigError(f"{setting}: {name} has no column '{key}'{hint} Its columns: {', '.join(schema.names)}")


def usual_column(usual: tuple[str, ...], names: list[str]) -> str | None:
    """Return the first of the usual names that is there, in any case."""
    by_lower = {name.lower(): name for name in reversed(names)}
    return next((by_lower[word] for word in usual if word in by_lower), None)


def missing_column(setting: str, usual: tuple[str, ...], schema: pyarrow.Schema, name: str) -> str:
    """Raise `ConfigError` for a table that has none of the usual columns."""
    raise ConfigError(
        f"{setting}: {name} has none of the usual columns ({', '.join(usual)}): name one of those it has: "
        f"{', '.join(schema.names)}"
    )


def require_text(setting: str, column: str, schema: pyarrow.Schema, name: str) -> None:
    """Raise `ConfigError` for a column of pictures or objects where text is needed."""
    kind = schema.field(column).type
    if types.is_nested(getattr(kind, "value_type", kind)):
        raise ConfigError(f"{setting}: the column '{column}' of {name} holds {kind}, not text")


def holds_pictures(kind: pyarrow.DataType) -> bool:
    """Return whether cells are {bytes, path}, as `datasets` stores pictures."""
    return types.is_struct(kind) and {"bytes", "path"} <= {field.name for field in kind}


def holds_bytes(kind: pyarrow.DataType) -> bool:
    """Return whether cells are bytes."""
    return types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind)


@dataclass(frozen=True)
class Info:
    """What `datasets` knows of a table: what each column is."""

    features: dict[str, Any] | None = None


@dataclass(frozen=True)
class Metadata:
    """What `datasets` writes into a table."""

    info: Info | None = None


def class_names(schema: pyarrow.Schema, columns: Sequence[str], name: str) -> dict[str, list[str]]:
    """Return the names of the classes that some of the columns count, as `datasets` writes them into the metadata.

    Raises `DataError` for metadata that name them in no way that can be read.
    """
    written = (schema.metadata or {}).get(b"huggingface", b"{}")
    names = {}
    try:
        info = parse_json(written, Metadata, "'huggingface'").info or Info()
        for column in columns:
            feature = (info.features or {}).get(column)
            if isinstance(feature, dict) and "names" in feature:
                names[column] = fit(feature["names"], list[str], f"'huggingface': info.features.{column}.names")
    except (WrongContent, WrongValue) as error:
        raise DataError(f"{name}: in its metadata {error}: write the table anew, without these metadata") from error
    return names
