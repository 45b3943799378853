"""The file that a picture's path means: the one that is written, or one that is written in another way."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Literal
from urllib.parse import unquote

from accel_clip.data.bad_samples import UnusableSample

FORMS: tuple[Literal["NFC", "NFD"] | None, ...] = (None, "NFC", "NFD")


def find_picture(root: str, limit: Path, path: str) -> tuple[Path, str]:
    """Return the file that a path means, links resolved, and how the path was read, empty for as it is written.

    A path starts from `root`, and no reading of it may leave `limit`: raises `UnusableSample` outside of it, and for
    what can be no path. Where no reading leads to a file, it is the one that is written and is not there.
    """
    written = real_path(root, path)
    if not written.is_relative_to(limit):
        raise UnusableSample("outside_root", f"{written} is outside of {limit} (see data.image_root)", path)
    if os.path.exists(written):
        return written, ""
    for reading, how in other_readings(path):
        file = real_path(root, reading)
        if file.is_relative_to(limit) and os.path.isfile(file):
            return file, how
    return written, ""


def real_path(root: str, path: str) -> Path:
    """Return the absolute path of a file, links resolved; raises `UnusableSample` for what can be no path."""
    try:
        return Path(os.path.realpath(os.path.join(root, path)))
    except ValueError as error:  # a null character
        raise UnusableSample("missing_file", str(error), path) from error


def other_readings(path: str) -> Iterator[tuple[str, str]]:
    """Yield what a path may mean beside what is written, the likeliest first, and how it is read then."""
    texts = {path: "", path.strip(): "without the spaces around it", unquote(path): "with its %xx decoded"}
    seen = {path}
    for (text, how), form in product(texts.items(), FORMS):
        stem, ending = os.path.splitext(text if form is None else unicodedata.normalize(form, text))
        for cased in dict.fromkeys((ending, ending.lower(), ending.upper(), ending.title())):
            if stem + cased not in seen:
                seen.add(stem + cased)
                changes = (how, form and f"in Unicode's {form}", cased != ending and f"with the ending {cased}")
                yield stem + cased, ", ".join(str(change) for change in changes if change)
