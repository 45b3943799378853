"""What the picture cell of a table holds: a path, or the picture: bytes, base64, or bytes as Python prints them."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from typing import Any

import pyarrow

from accel_clip.data.bad_samples import UnusableSample
from accel_clip.data.sources.endings import PICTURE_SUFFIXES
from accel_clip.data.sources.tables.cells import flat_items, path_in, texts_in_cell
from accel_clip.data.sources.tables.columns import holds_bytes, holds_pictures
from accel_clip.data.sources.tables.written import keys_in_words, literal_in, structure_in

Content = memoryview | bytes

LONGEST_PATH = 4096  # characters, as Linux has it
SHORTEST_BASE64 = 40  # characters; the smallest picture takes more
HEAD = 24  # characters, which stand for 18 bytes
HEADS = re.compile(
    rb"\xff\xd8\xff|\x89PNG|GIF8|RIFF....WEBP|BM....\0\0\0\0|II\*\0|MM\0\*|....ftyp|\0\0\0\x0c(JXL |jP  )|\xff\x0a"
    rb"|\0\0\x01\0",
    re.DOTALL,
)
"""how the files of pictures begin"""
DATA_ADDRESS = re.compile(r"data:[^,]{0,200};base64,", re.IGNORECASE)
PRINTED = ("b'", 'b"', "{'", '{"', "[", "<", "bytearray(b")
"""how values begin that were printed into a cell, and hardly a path"""
NUMBERS = re.compile(r"[\[\]\d\s.,e+-]+")
"""what an array of pixels looks like that was printed"""


def picture_in(cell: pyarrow.Scalar) -> tuple[Content | None, str]:
    """Return a cell's picture, bytes of a table not copied, or None and the path that stands there, empty without one.

    Raises `UnusableSample` for what is neither: several pictures, numbers, objects.
    """
    if not cell.is_valid:
        return None, ""
    if isinstance(cell, pyarrow.StructScalar):
        return picture_in_struct(cell)
    if isinstance(cell, (pyarrow.BinaryScalar, pyarrow.FixedSizeBinaryScalar)) and not is_text(cell.type):
        return memoryview(cell.as_buffer()), ""
    if isinstance(cell, pyarrow.ListScalar):
        return picture_in_list(cell.values)
    return picture_in_value(cell.as_py())


def picture_in_list(cells: pyarrow.Array) -> tuple[Content | None, str]:
    """Return what the only item of a list holds; raises `UnusableSample` for several."""
    if len(cells) > 1:
        are_pictures = holds_pictures(cells.type) or holds_bytes(cells.type) or is_text(cells.type)
        raise too_many(len(cells), are_pictures)
    return picture_in(cells[0]) if len(cells) else (None, "")


def is_text(kind: pyarrow.DataType) -> bool:
    """Return whether cells are text; pyarrow's class for it is one of bytes."""
    return pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind) or pyarrow.types.is_string_view(kind)


def picture_in_struct(cell: pyarrow.StructScalar) -> tuple[Content | None, str]:
    """Return the picture or the path in {bytes, path}, as `datasets` stores pictures."""
    names = [field.name for field in cell.type]
    if "bytes" in names and cell["bytes"].is_valid:
        return picture_in(cell["bytes"])
    if "path" in names:
        return picture_in(cell["path"])
    raise UnusableSample("unreadable", f"{keys_in_words(dict.fromkeys(names))} is no picture")


def picture_in_value(value: Any) -> tuple[Content | None, str]:
    """Return the picture or the path in a Python value; raises `UnusableSample`."""
    if isinstance(value, str):  # nearly always, so first
        return picture_in_text(value)
    if isinstance(value, Mapping):
        stored = value.get("bytes") or value.get("path")
        if not isinstance(stored, (str, bytes)):
            raise UnusableSample("unreadable", f"{keys_in_words(dict(value))} is no picture")
        return picture_in_value(stored)
    if isinstance(value, (list, tuple)):
        parts = [part for part in flat_items(value) if part is not None]
        if len(parts) > 1:
            raise too_many(len(parts), not all(isinstance(part, (int, float)) for part in parts))
        return picture_in_value(parts[0]) if parts else (None, "")
    if isinstance(value, (bytes, bytearray)):
        return bytes(value), ""
    return None, path_in("".join(texts_in_cell(value)))


def too_many(number: int, are_pictures: bool) -> UnusableSample:
    """Return the error for a list of several items, of which none is the picture of the row."""
    if are_pictures:
        return UnusableSample("unreadable", f"the cell holds {number} pictures: write a row for each")
    return UnusableSample("unreadable", f"a list of {number} numbers or lists is no picture: store files' bytes")


def picture_in_text(text: str) -> tuple[Content | None, str]:
    """Return the picture or the path that is written in a text; raises `UnusableSample` for what is neither."""
    if is_base64(text):
        return decoded_base64(text), ""
    if text.startswith(PRINTED):
        return printed_picture(text)
    if len(text) > LONGEST_PATH:
        raise UnusableSample("unreadable", f"a text of {len(text):,} characters is neither a path nor a picture")
    return None, path_in(text)


def is_base64(text: str) -> bool:
    """Return whether a text is a picture in base64, judged by how it begins."""
    if text.startswith("data:"):
        return True
    if len(text) < SHORTEST_BASE64 or text.lower().endswith(PICTURE_SUFFIXES):
        return False
    try:
        return HEADS.match(from_base64(text[:HEAD])) is not None
    except ValueError:
        return False


def decoded_base64(text: str) -> bytes:
    """Return the bytes that stand in base64, or in a data: address; raises `UnusableSample`."""
    address = DATA_ADDRESS.match(text)
    if text.startswith("data:") and address is None:
        raise UnusableSample("unreadable", "an address of the kind data: without base64 is not read")
    try:
        return from_base64("".join(text[address.end() if address else 0 :].split()))
    except ValueError as error:
        raise UnusableSample("unreadable", f"the base64 of the picture is broken: {error}") from error


def from_base64(text: str) -> bytes:
    """Return the bytes that stand in base64 of either alphabet, with or without padding; raises `ValueError`."""
    signs = text.rstrip("=").replace("-", "+").replace("_", "/")
    return base64.b64decode(signs + "=" * (-len(signs) % 4), validate=True)


def printed_picture(text: str) -> tuple[Content | None, str]:
    """Return the picture or path in a value that was printed into a text; raises `UnusableSample` for what has none."""
    if text.startswith("<") and text.endswith(">"):
        raise UnusableSample("unreadable", "a printed object of a program is no picture: store its bytes or its path")
    value = structure_in(text)
    if value is None:
        value = literal_in(text.removeprefix("bytearray(").removesuffix(")") if text.startswith("bytearray") else text)
    if value is None and NUMBERS.fullmatch(text):
        raise UnusableSample("unreadable", "a printed array of numbers is no picture: store files' bytes, or paths")
    if value is None and len(text) <= LONGEST_PATH:
        return None, path_in(text)  # a file may be called so
    if value is None:
        raise UnusableSample("unreadable", f"a printed value of {len(text):,} characters is cut off or no picture")
    return picture_in_value(value)
