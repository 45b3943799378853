"""Pictures: as the bytes of files, and written into folders."""

from __future__ import annotations

import io
from pathlib import Path

import numpy
from PIL import Image

Colour = str | tuple[int, int, int]


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    """Return a picture as the bytes of a file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(width: int = 40, height: int = 30, seed: int = 0) -> Image.Image:
    """Return a picture of coloured noise."""
    return Image.fromarray(numpy.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=numpy.uint8))


def plain(colour: Colour = "red", size: tuple[int, int] = (8, 8), kind: str = "PNG") -> bytes:
    """Return a picture of one colour as the bytes of a file."""
    return encoded(Image.new("RGB", size, colour), kind)


def numbered_picture(number: int, size: tuple[int, int] = (4, 4)) -> bytes:
    """Return a picture whose red and green say its number, which no reader changes."""
    return plain((number % 256, number // 256, 0), size)


def write_plain(path: Path, colour: Colour = "red") -> Path:
    """Write a picture of one colour and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(plain(colour))
    return path


def write_coloured_pictures(folder: Path, number: int) -> list[str]:
    """Write pictures that are each of another colour and a little noise; return rows of a table that name it."""
    generator, rows = numpy.random.default_rng(0), []
    for each in range(number):
        colour = generator.integers(0, 255, 3)
        pixels = numpy.clip(colour + generator.integers(0, 40, (40, 36, 3)), 0, 255).astype(numpy.uint8)
        Image.fromarray(pixels).save(folder / f"{each}.png")
        rows.append(f"{each}.png,picture {each} of colour {colour[0]}")
    return rows
