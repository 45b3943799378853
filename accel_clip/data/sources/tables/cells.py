"""What a cell of a table, or a value in JSON, holds: captions, texts and paths."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

from accel_clip.data.bad_samples import UnusableSample
from accel_clip.data.sources.tables.written import keys_in_words, structure_in

NUMBER_OF_A_CAPTION = re.compile(r"(?<=\.\w{3})#\d+$|(?<=\.\w{4})#\d+$")
"""behind a picture's name, in the lists that come with Flickr8k and Flickr30k"""


def captions_in(value: Any) -> list[str]:
    """Return the captions in a cell: one, or those of a list, also of one that is written out in a text.

    Objects are no captions. Raises `UnusableSample` where there is nothing else, and for bytes that are no text.
    """
    captions: list[str] = []
    objects: list[dict[Any, Any]] = []
    waiting = [value]
    while waiting:
        part = waiting.pop()
        structure = structure_in(part) if isinstance(part, str) else part
        if isinstance(structure, dict):
            objects.append(structure)
        elif isinstance(structure, (list, tuple)):
            waiting.extend(reversed(structure))
        else:
            captions.extend(texts_in_cell(part))
    if objects and not captions:
        raise UnusableSample("no_caption", f"{keys_in_words(objects[0])} is no caption")
    return captions


def captions_of_text(text: str, each_line: bool | None) -> list[str]:
    """Return the captions in the text beside a picture: those of a list that it writes out, its lines, or all of it.

    each_line: whether each line is a caption; None = it is, unless blank lines part the text into paragraphs. Raises
    `UnusableSample` for an object.
    """
    if structure_in(text) is not None:
        return captions_in(text)
    lines = text.strip().splitlines()
    has_paragraphs = not all(line.strip() for line in lines)
    return [text] if each_line is False or (each_line is None and has_paragraphs) else lines


def texts_in_cell(value: Any) -> list[str]:
    """Return the texts in a cell: none in an empty one, several in a list; raises `UnusableSample` for broken bytes."""
    texts = []
    for part in flat_items(value):
        if part is None or (isinstance(part, float) and math.isnan(part)):
            continue
        try:
            texts.append(part.decode() if isinstance(part, bytes) else str(part))
        except UnicodeDecodeError as error:
            raise UnusableSample("caption_encoding", str(error)) from error
    return texts


def path_in(text: str) -> str:
    """Return the path that is written in a cell.

    Tables written on Windows separate folders by backslashes; elsewhere no picture has one in its name.
    """
    return NUMBER_OF_A_CAPTION.sub("", text.replace("\\", "/")) if "#" in text else text.replace("\\", "/")


def flat_items(value: Any) -> Iterator[Any]:
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
