"""The chunks of PNG files: what they say of the values, and the pixels without what may be wrong beside them."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SIGNATURE = b"\x89PNG\r\n\x1a\n"
NEEDED = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
OF_USE = (b"sBIT", b"eXIf")  # kept where they are whole
LARGEST_BYTES = 1 << 30
KINDS_WITH_ALPHA = (4, 6)
PLACE_OF_KIND = 25  # of colour, in the file: behind size and depth


@dataclass(frozen=True)
class PngChunk:
    """A part of a file."""

    name: bytes
    """four letters that say what it holds"""
    start: int
    """where it begins in the file, with its length and its name"""
    end: int
    """where it ends, behind its checksum"""


def png_chunks(content: bytes) -> Iterator[PngChunk]:
    """Yield the chunks of a PNG, the last of which may be cut; none for other content."""
    start = len(SIGNATURE) if content.startswith(SIGNATURE) else len(content)
    while start < len(content):
        end = start + 12 + int.from_bytes(content[start : start + 4], "big")
        yield PngChunk(content[start + 4 : start + 8], start, end)
        start = end


def significant_bits(content: bytes) -> int | None:
    """Return how many bits of grey or colour a PNG says are significant, None for one that does not, or no PNG."""
    for chunk in png_chunks(content):
        if chunk.name == b"IDAT":
            break
        if chunk.name == b"sBIT":
            bits = content[chunk.start + 8 : chunk.end - 4]
            return max(bits[:-1] if content[PLACE_OF_KIND] in KINDS_WITH_ALPHA else bits, default=0) or None
    return None


def without_metadata(image: bytes | Path) -> bytes | None:
    """Return a PNG without texts, profiles and the like, None where there are none, or it is no PNG; raises OSError.

    Pillow refuses a picture for texts or a profile above its limits, and for a wrong checksum of one.
    """
    content = image if isinstance(image, bytes) else png_content(image)
    kept = [
        chunk
        for chunk in png_chunks(content)
        if chunk.name in NEEDED or (chunk.name in OF_USE and has_its_checksum(content, chunk))
    ]
    lean = SIGNATURE + b"".join(content[chunk.start : chunk.end] for chunk in kept)
    return lean if kept and len(lean) < len(content) else None


def png_content(file: Path) -> bytes:
    """Return the bytes of a file, none of one that is no PNG or too large to be held."""
    with file.open("rb") as opened:
        is_small_png = opened.read(len(SIGNATURE)) == SIGNATURE and file.stat().st_size <= LARGEST_BYTES
        return SIGNATURE + opened.read() if is_small_png else b""


def has_its_checksum(content: bytes, chunk: PngChunk) -> bool:
    """Return whether a chunk has the checksum that is written behind it."""
    return zlib.crc32(content[chunk.start + 4 : chunk.end - 4]).to_bytes(4, "big") == content[chunk.end - 4 : chunk.end]
