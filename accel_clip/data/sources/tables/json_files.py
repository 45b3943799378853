"""Captions in .json files: which of the shapes that people have is in one, by its content."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accel_clip.data.sources.base import SourceOptions
from accel_clip.data.sources.tables.coco_json import is_coco, read_coco
from accel_clip.data.sources.tables.columns import USUAL_COLUMNS
from accel_clip.data.sources.tables.content import TableContent
from accel_clip.data.sources.tables.delimited import kind_of
from accel_clip.data.sources.tables.json_rows import read_json_lines, table_of
from accel_clip.data.sources.tables.karpathy_json import is_karpathy, read_karpathy
from accel_clip.data.sources.tables.written import keys_in_words
from accel_clip.data.sources.text_files import read_text
from accel_clip.faults import DataError

MORE_THAN_ONE_VALUE = "Extra data"  # how Python's json says it
KEYS_TO_LOOK_AT = 20


@dataclass(frozen=True)
class JsonShape:
    """A way to write pairs in JSON."""

    fits: Callable[[Any], bool]
    """whether a value has it"""
    read: Callable[[Any, Path, SourceOptions], TableContent]
    """what the value holds"""


def read_json_table(path: Path, options: SourceOptions) -> TableContent:
    """Return the pairs of a .json file, also of one with an object a line; raises `DataError` saying what is in it."""
    try:
        content = read_whole(path, options)
    except DataError as error:
        if MORE_THAN_ONE_VALUE in str(error):
            return read_json_lines(path, options)
        raise
    shape = next((shape for shape in SHAPES if shape.fits(content)), None)
    if shape is None:
        found = keys_in_words(content) if isinstance(content, dict) else f"a {type(content).__name__}"
        raise DataError(
            f"{path}: {found} is no list of pairs: what is read is a list of objects with a picture and a caption, "
            "{picture: caption}, COCO's captions_*.json and Karpathy's dataset_*.json"
        )
    return shape.read(content, path, options)


def read_whole(path: Path, options: SourceOptions) -> Any:
    """Return the value in a JSON file, NaN being an empty cell; raises `DataError`."""
    try:
        return json.loads(read_text(path, options.encoding), parse_constant=lambda word: None)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: it is not JSON that can be read: {error}") from error


def is_list_of_objects(content: Any) -> bool:
    """Return whether a value is a list of objects, or an object with one such list, or an object of rows by number."""
    return bool(rows_in(content))


def rows_in(content: Any) -> list[dict[str, Any]]:
    """Return a list of objects that are rows, or the only one in an object; an empty one without any."""
    if isinstance(content, list):
        return content if all(isinstance(row, dict) for row in content) else []
    inside = list(content.values()) if isinstance(content, dict) else []
    lists = [rows for rows in inside if isinstance(rows, list) and rows_in(rows)]
    by_number = all(isinstance(row, dict) and any(name.lower() in USUAL_COLUMNS for name in row) for row in inside)
    return lists[0] if len(lists) == 1 else inside if by_number else []


def read_json_rows(content: Any, path: Path, options: SourceOptions) -> TableContent:
    """Return a list of objects as rows."""
    return TableContent(table_of(rows_in(content), path, options), path.parent)


def is_by_name(content: Any) -> bool:
    """Return whether a value has captions by the names of pictures."""
    names = list(content)[:KEYS_TO_LOOK_AT] if isinstance(content, dict) else []
    return bool(names) and all(kind_of(name) in ("picture", "address") for name in names)


def read_by_name(content: Mapping[str, Any], path: Path, options: SourceOptions) -> TableContent:
    """Return captions, or objects with captions, by the names of pictures as rows."""
    objects = (found if isinstance(found, dict) else {"caption": found} for found in content.values())
    rows = ({**each, "image": name} for name, each in zip(content, objects, strict=True))
    return TableContent(table_of(rows, path, options), path.parent)


def is_by_column(content: Any) -> bool:
    """Return whether a value has columns as long as each other, as lists or by the number of the row."""
    columns = list(content.values()) if isinstance(content, dict) else []
    alike = all(isinstance(each, list) for each in columns) or all(isinstance(each, dict) for each in columns)
    return len(columns) > 1 and alike and len({len(each) for each in columns}) == 1 and bool(columns[0])


def read_by_column(content: Mapping[str, Any], path: Path, options: SourceOptions) -> TableContent:
    """Return columns as rows."""
    return TableContent(table_of(rows_of_columns(content), path, options), path.parent)


def rows_of_columns(content: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield what stands in columns row after row."""
    for place in next(iter(content.values())) if is_by_number(content) else range(len(next(iter(content.values())))):
        yield {name: column[place] for name, column in content.items()}


def is_by_number(content: Mapping[str, Any]) -> bool:
    """Return whether columns are objects, whose keys are the numbers of rows."""
    return isinstance(next(iter(content.values())), dict)


SHAPES = (
    JsonShape(is_karpathy, read_karpathy),
    JsonShape(is_coco, read_coco),
    JsonShape(is_by_name, read_by_name),
    JsonShape(is_list_of_objects, read_json_rows),
    JsonShape(is_by_column, read_by_column),
)
"""The first that fits is what a file is."""
