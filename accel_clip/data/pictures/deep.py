"""Pictures with more than 8 bits a value, brought to 8: grey of 16 or 32 bits or in floating point, colour of 16 bits.

What stands for white is seldom written down: cameras and scanners of 10, 12 or 14 bits store their values in 16. So the
values decide: white is the first of 255, 1023, 4095, 16383 and 65535 (before them 1, for floating point) that none of
them is above; with values below 0, or above 65535, black and white are the least and the greatest. A PNG that says how
many bits are significant is believed, where its values can be of as many.
"""

from __future__ import annotations

import io
import sys
from typing import Any

import numpy
from PIL import Image, ImageFile

from accel_clip.data.pictures.png import significant_bits

DEEP_GREY = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")
WHITES = tuple(2**bits - 1 for bits in (8, 10, 12, 14, 16))
GREY_WITH_ALPHA = "LA;16B"
SWAPPED = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}
SECOND_BYTES = {
    **{f"{mode};16{order}": f"{mode};16{SWAPPED[order]}" for mode in ("RGB", "RGBA", "RGBX") for order in SWAPPED},
    GREY_WITH_ALPHA: "RGBA",
}
"""Of two bytes Pillow keeps that of more weight: how to get the other one, or all four of grey with alpha."""


def load_8_bit(picture: Image.Image) -> Image.Image:
    """Load a picture, and return it or, where its values have more than 8 bits, another one with these in 8."""
    raw = raw_mode(picture)
    content = unread_content(picture) if ";16" in raw else b""
    bits = significant_bits(content)
    second = with_second_bytes(picture, content, raw)
    picture.load()
    if picture.mode in DEEP_GREY:
        return grey(picture, bits)
    transparent = picture.info.get("transparency")
    if second is None or (transparent is None and numpy.max(picture.convert("RGB").getextrema()) > WHITES[-2] >> 8):
        return picture  # white can only be 65535, and the first bytes say enough
    second.load()
    return colour(values_of(picture, second, raw), transparent, bits)


def grey(picture: Image.Image, bits: int | None) -> Image.Image:
    """Return deep grey as 8-bit grey, or grey with alpha where one value stands for transparent."""
    values = numpy.asarray(picture).astype(numpy.float64)
    transparent = picture.info.get("transparency")
    is_opaque = numpy.isfinite(values)
    if isinstance(transparent, int):
        is_opaque &= values != transparent
    shallow = Image.fromarray(to_8_bit(values, span(values[is_opaque], bits, is_float=picture.mode == "F")))
    if isinstance(transparent, int):
        shallow.putalpha(Image.fromarray(numpy.where(values == transparent, 0, 255).astype(numpy.uint8)))
    return shallow


def colour(values: numpy.ndarray, transparent: object, bits: int | None) -> Image.Image:
    """Return colours of 16 bits, int32 [H, W, 3 or, with alpha, 4], as a picture; transparent: one of them, or None."""
    colours, alpha = values[..., :3], values[..., 3:]
    if isinstance(transparent, tuple):
        alpha = numpy.where((colours == transparent).all(axis=2, keepdims=True), 0, WHITES[-1])
    black, white = span(colours[alpha[..., 0] > 0] if alpha.size else colours, bits)
    parts = [to_8_bit(colours, (black, white))]
    if alpha.size:
        parts.append(to_8_bit(alpha, span(numpy.array([alpha.max(), white]))))
    return Image.fromarray(numpy.concatenate(parts, axis=2))


def values_of(picture: Image.Image, second: Image.Image, raw: str) -> numpy.ndarray:
    """Return values of 16 bits, int32 [H, W, 3 or 4], from two pictures with the first and with the second bytes."""
    bytes_of_second = numpy.asarray(second).astype(numpy.int32)
    if raw == GREY_WITH_ALPHA:
        grey_and_alpha = bytes_of_second[..., 0::2] * 256 + bytes_of_second[..., 1::2]
        return grey_and_alpha[..., [0, 0, 0, 1]]
    return numpy.asarray(picture).astype(numpy.int32) * 256 + bytes_of_second


def to_8_bit(values: numpy.ndarray, black_and_white: tuple[float, float]) -> numpy.ndarray:
    """Return values as uint8, of which what is beyond black and white has these."""
    black, white = black_and_white
    scaled = (numpy.nan_to_num(values.astype(numpy.float64), nan=black) - black) * (255 / (white - black))
    return numpy.rint(scaled.clip(0, 255)).astype(numpy.uint8)


def span(values: numpy.ndarray, bits: int | None = None, is_float: bool = False) -> tuple[float, float]:
    """Return the values that stand for black and white (see the module's text).

    bits: how many are significant, where that is known.
    """
    if not values.size:
        return 0, 1
    low, high = float(values.min()), float(values.max())
    if bits is not None and is_of_bits(values, bits):
        return 0, 2**bits - 1
    whites = (1, *WHITES) if is_float else WHITES if bits is None else WHITES[-1:]
    white = next((each for each in whites if low >= 0 and high <= each), None)
    return (low, max(high, low + 1)) if white is None else (0, white)


def is_of_bits(values: numpy.ndarray, bits: int) -> bool:
    """Return whether values are numbers of so many bits as they are, not spread over 16 as PNG asks for.

    Spread ones have their first bits again behind them, or nothing.
    """
    if values.min() < 0 or values.max() >= 2**bits:
        return False
    whole = values.astype(numpy.int64)
    first = whole >> (16 - bits) << (16 - bits)
    return not ((whole == first).all() or (whole == first | whole >> bits).all())


def raw_mode(picture: Image.Image) -> str:
    """Return how a file that is not loaded yet stores pixels, in Pillow's words, such as RGB;16B; empty if unknown."""
    tiles = getattr(picture, "tile", None)
    arguments = tiles[0].args if tiles else ""
    found = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return found if isinstance(found, str) else ""


def unread_content(picture: Image.Image) -> bytes:
    """Return all bytes of a file that is not loaded yet."""
    assert isinstance(picture, ImageFile.ImageFile) and picture.fp is not None
    place = picture.fp.tell()
    picture.fp.seek(0)
    content = picture.fp.read()
    picture.fp.seek(place)
    return content


def with_second_bytes(picture: Image.Image, content: bytes, raw: str) -> Image.Image | None:
    """Return a picture that loads the second byte of each value, None for one that is not colour of two bytes."""
    if raw not in SECOND_BYTES or picture.format is None:
        return None
    second = Image.open(io.BytesIO(content), formats=[picture.format])
    assert isinstance(second, ImageFile.ImageFile)
    second.tile = [tile._replace(args=with_raw_mode(tile.args, SECOND_BYTES[raw])) for tile in second.tile]
    return second


def with_raw_mode(arguments: tuple[Any, ...] | str | None, raw: str) -> tuple[Any, ...] | str:
    """Return the arguments of a decoder with another way to store pixels."""
    return (raw, *arguments[1:]) if isinstance(arguments, tuple) else raw
