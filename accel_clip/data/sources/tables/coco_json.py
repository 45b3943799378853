"""Captions as COCO has them: a JSON object with `images` and, by their ids, `annotations`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow

from accel_clip.data.sources.base import SourceOptions
from accel_clip.data.sources.tables.content import TableContent
from accel_clip.data.sources.tables.json_rows import stored_texts
from accel_clip.data.sources.tables.picture_folders import folder_of_pictures
from accel_clip.data.sources.tables.written import keys_in_words
from accel_clip.faults import DataError


def is_coco(content: Any) -> bool:
    """Return whether a JSON value has images and annotations."""
    return isinstance(content, dict) and all(isinstance(content.get(key), list) for key in ("images", "annotations"))


def read_coco(content: Any, path: Path, options: SourceOptions) -> TableContent:
    """Return a row for every picture, with all its captions; raises `DataError` for annotations of another kind.

    Captions of a picture that is not listed are rows without one.
    """
    images = [each for each in content["images"] if isinstance(each, dict)]
    annotations = [each for each in content["annotations"] if isinstance(each, dict)]
    if not any("caption" in each for each in annotations):
        found = keys_in_words(annotations[0]) if annotations else "none"
        raise DataError(
            f"{path}: its annotations are no captions ({found}): name the file of captions, such as captions_*.json"
        )
    captions: dict[Any, list[str]] = {}
    for annotation in annotations:
        captions.setdefault(str(annotation.get("image_id")), []).extend(stored_texts(annotation.get("caption")))
    names = [image.get("file_name") for image in images]
    texts = [captions.pop(str(image.get("id")), []) for image in images]
    paths = [name if isinstance(name, str) else None for name in names] + [None] * len(captions)
    columns = [pyarrow.array(paths, pyarrow.string())]
    columns.append(pyarrow.array([*texts, *captions.values()], pyarrow.list_(pyarrow.string())))
    folder = folder_of_pictures(path, filter(None, paths), options)
    return TableContent(pyarrow.table(columns, names=["image", "caption"]), folder)
