"""What a cell of a table, or a value in JSON, holds: texts and paths."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from accel_clip.data.bad_samples import UnusableSample


def texts_in(value: Any) -> list[str]:
    """Return the texts in a cell: none in an empty one, several in a list; raises `UnusableSample` for broken bytes."""
    texts = []
    for part in parts_of(value):
        if part is None or (isinstance(part, float) and math.isnan(part)):
            continue
        try:
            texts.append(part.decode() if isinstance(part, bytes) else str(part))
        except UnicodeDecodeError as error:
            raise UnusableSample("caption_encoding", str(error)) from error
    return texts


def path_in(cell: Any) -> str:
    """Return the path that is written in a cell, empty without one.

    Tables written on Windows separate folders by backslashes; elsewhere no picture has one in its name.
    """
    written = [cell] if isinstance(cell, str) else texts_in(cell)
    return written[0].replace("\\", "/") if written else ""


def parts_of(value: Any) -> Iterator[Any]:
    """Yield what nested lists hold, in order; they may nest deeper than Python calls do."""
    waiting = [value]
    while waiting:
        part = waiting.pop()
        if isinstance(part, (list, tuple)):
            waiting.extend(reversed(part))
        else:
            yield part


def storable(text: str) -> str:
    """Return a text without halves of characters, which JSON can write and UTF-8 cannot."""
    return text.encode("utf-8", errors="replace").decode()
