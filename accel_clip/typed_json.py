"""JSON files that anybody may have written, read into dataclasses: bounded, typed, and named where they are wrong."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any, TypeVar

from accel_clip.faults import one_line
from accel_clip.typed import WrongValue, fit

T = TypeVar("T")
MOST_BYTES = 1 << 28  # of a file; a checkpoint that has listed a million unusable samples takes a tenth of it


class WrongContent(Exception):
    """A file that does not hold what it should; the message, one line, names the file, the key, the value, the rule."""


def read_json(file: Path, kind: Any, most_bytes: int = MOST_BYTES) -> Any:
    """Return what a JSON file holds as an annotation says (see `typed.fit`), such as a dataclass.

    Raises `WrongContent` for any other content, and OSError for a file that cannot be read.
    """
    return parse_json(read_bytes(file, most_bytes), kind, file.name)


def parse_json(raw: bytes, kind: Any, name: str) -> Any:
    """Return what JSON text holds as an annotation says; raises `WrongContent`. name: what the text is called."""
    try:
        return fit_json(json.loads(raw), kind, name)
    except ValueError as error:  # no JSON, no UTF-8, or a number of thousands of digits
        raise WrongContent(f"{name} is not JSON: {one_line(error)}") from error
    except RecursionError as error:
        raise WrongContent(f"{name}: its values nest too deeply") from error


def fit_json(value: Any, kind: Any, name: str) -> Any:
    """Return what JSON gave as an annotation says; raises `WrongContent`. name: what the text was called."""
    try:
        return fit(value, kind, "")
    except WrongValue as error:
        raise WrongContent(f"{name}: {str(error).removeprefix(': ')}") from error
    except RecursionError as error:
        raise WrongContent(f"{name}: its values nest too deeply") from error


def read_bytes(file: Path, most_bytes: int) -> bytes:
    """Return the bytes of a file of limited size; raises `WrongContent` for a larger one, and for a pipe or device."""
    if not stat.S_ISREG(file.stat().st_mode):
        raise WrongContent(f"{file.name} is not a file that holds data")
    with file.open("rb") as opened:
        raw = opened.read(most_bytes + 1)
    if len(raw) > most_bytes:
        raise WrongContent(f"{file.name} has more than {most_bytes:,} bytes")
    return raw
