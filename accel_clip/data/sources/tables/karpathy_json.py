"""Captions as Karpathy's splits have them: a JSON object whose `images` carry `sentences` and their `split`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow

from accel_clip import console
from accel_clip.data.sources.base import SourceOptions
from accel_clip.data.sources.tables.content import TableContent
from accel_clip.data.sources.tables.json_rows import stored_texts
from accel_clip.data.sources.tables.picture_folders import folder_of_pictures
from accel_clip.faults import DataError, nearest

TRAINING = "train"
SPLITS = {TRAINING: (TRAINING, "restval")}
"""by what a split is called, what it is made of; restval is the rest of COCO's validation part, which is trained on"""


def is_karpathy(content: Any) -> bool:
    """Return whether a JSON value lists pictures with their sentences."""
    images = content.get("images") if isinstance(content, dict) else None
    return isinstance(images, list) and any("sentences" in image for image in images[:1] if isinstance(image, dict))


def read_karpathy(content: Any, path: Path, options: SourceOptions, split: str = TRAINING) -> TableContent:
    """Return a row for every picture of a split, with all its captions, and say which others there are.

    Raises `DataError` for a split that is not there.
    """
    images = [image for image in content["images"] if isinstance(image, dict)]
    sizes = Counter(str(image.get("split", split)) for image in images)
    parts = SPLITS.get(split, (split,))
    chosen = [image for image in images if str(image.get("split", split)) in parts]
    if not chosen:
        hint = nearest(split, sizes) or ":"
        raise DataError(f"{path}: no picture is of the split '{split}'{hint} it has {', '.join(sorted(sizes))}")
    others = sorted(sizes.keys() - set(parts))
    if others:
        read = ", ".join(f"{part} {sizes[part]:,}" for part in parts if sizes[part])
        console.say(f"{path}: of its splits {read} are read; karpathy:{path}:{others[0]} reads another one")
    paths = [path_of(image) for image in chosen]
    captions = pyarrow.array([sentences_of(image) for image in chosen], pyarrow.list_(pyarrow.string()))
    columns = [pyarrow.array(paths, pyarrow.string()), captions]
    return TableContent(
        pyarrow.table(columns, names=["image", "caption"]), folder_of_pictures(path, filter(None, paths), options)
    )


def path_of(image: Mapping[str, Any]) -> str | None:
    """Return a picture's path: its name behind that of its folder, where one is given."""
    name, folder = image.get("filename"), image.get("filepath")
    if not isinstance(name, str):
        return None
    return f"{folder}/{name}" if isinstance(folder, str) and folder else name


def sentences_of(image: Mapping[str, Any]) -> list[str]:
    """Return the captions of a picture: as they were written, or their words where only those are kept."""
    found: list[str] = []
    for sentence in image.get("sentences") or []:
        if isinstance(sentence, dict):
            words = sentence.get("tokens")
            joined = " ".join(map(str, words)) if isinstance(words, list) else None
            found.extend(stored_texts(sentence.get("raw", joined)))
        else:
            found.extend(stored_texts(sentence))
    return found
