"""Pairs as Chinese-CLIP has them: `train_imgs.tsv` with base64 by number, and `train_texts.jsonl` with captions."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow

from accel_clip.data.sources.base import SourceOptions
from accel_clip.data.sources.tables.content import TableContent
from accel_clip.data.sources.tables.delimited import LONGEST_LINE, lines_of_table
from accel_clip.data.sources.tables.json_rows import json_rows, stored_texts
from accel_clip.data.sources.tables.picture_cells import is_base64
from accel_clip.data.sources.text_files import open_text
from accel_clip.faults import DataError

PICTURES, TEXTS = "_imgs.tsv", "_texts.jsonl"


def is_chinese_clip(path: Path) -> bool:
    """Return whether a file has pictures by their numbers, or texts with the numbers of pictures, by its first line."""
    try:
        with path.open("rb") as file:
            line = file.readline(LONGEST_LINE)
    except OSError:
        return False  # who reads it says why it cannot be read
    if path.suffix.lower() == ".tsv":
        number, _, picture = line.decode("ascii", errors="replace").strip().partition("\t")
        return is_base64(picture) and not is_base64(number)
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(row, dict) and {"text", "image_ids"} <= row.keys()


def read_chinese_clip(path: Path, options: SourceOptions) -> TableContent:
    """Return a row for every picture, with all its captions; raises `DataError` where one of the two files is missing.

    Captions of a picture that is not there are rows without one.
    """
    pictures, texts = both_files(path)
    captions: dict[str, list[str]] = {}
    with open_text(texts, options.encoding) as file:
        for row in json_rows(file, texts):
            for number in picture_numbers(row):
                captions.setdefault(number, []).extend(stored_texts(row.get("text")))
    with open_text(pictures, options.encoding) as file:
        rows = [tuple(line.rstrip("\r\n").split("\t", 1)) for line in lines_of_table(file, pictures) if line.strip()]
    found = [row[1] if len(row) == 2 else None for row in rows]
    known = [captions.pop(row[0].strip(), []) for row in rows]
    columns = [pyarrow.array([*found, *[None] * len(captions)], pyarrow.large_string())]
    columns.append(pyarrow.array([*known, *captions.values()], pyarrow.list_(pyarrow.string())))
    return TableContent(pyarrow.table(columns, names=["image", "caption"]), path.parent)


def picture_numbers(row: dict[str, Any]) -> Iterator[str]:
    """Yield the numbers of the pictures that a text belongs to."""
    numbers = row.get("image_ids")
    yield from (str(number) for number in (numbers if isinstance(numbers, list) else [numbers]))


def both_files(path: Path) -> tuple[Path, Path]:
    """Return the file of pictures and that of texts, of which one is given; raises `DataError` without the other."""
    is_pictures = path.suffix.lower() == ".tsv"
    own, other = (PICTURES, TEXTS) if is_pictures else (TEXTS, PICTURES)
    beside = path.with_name(path.name.removesuffix(own) + other)
    if not path.name.endswith(own) or not beside.is_file():
        what, missing = ("pictures", "captions") if is_pictures else ("captions", "pictures")
        raise DataError(
            f"{path}: it holds {what} by number, as Chinese-CLIP has them; their {missing} are looked for in "
            f"{beside.name if path.name.endswith(own) else 'name' + other} beside name{own}"
        )
    return (path, beside) if is_pictures else (beside, path)
