"""From a picture as it is stored to 8-bit RGB: the same pixels from every source, and no more of them than needed."""

from __future__ import annotations

import contextlib
import io
import math
import stat
import struct
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

from accel_clip.data.bad_samples import UnusableSample
from accel_clip.data.pictures.deep import load_8_bit
from accel_clip.data.pictures.png import without_metadata

ScaleFor = Callable[[int, int, float], int]
"""from width, height and how many times the pixels needed must be left, in each direction, to 1, 2, 4 or 8: the most
that the picture's sides can be divided by"""

Image.preinit()  # the usual formats: they are tried first
Image.init()  # and all others that Pillow has, so that `readable_formats` knows them

with contextlib.suppress(ImportError):  # HEIC, the pictures of phones: its decoder is no part of Pillow
    from pillow_heif import register_heif_opener

    register_heif_opener()

HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1")
PROGRAM_FORMATS = ("EPS",)  # Pillow hands them to an interpreter of programs (Ghostscript): not for pictures of others
WITH_ALPHA = ("RGBA", "LA", "PA", "RGBa", "La")
TURNS = {  # by EXIF orientation, which says where the first stored row and column belong
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
LYING = (
    *(Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_270),
    *(Image.Transpose.TRANSVERSE, Image.Transpose.ROTATE_90),
)
WITH_SMALLER_COPIES = ("JPEG", "MPO")  # their decoder gives 1/2, 1/4 or 1/8 of the size for much less work
SPARE_WHEN_AVERAGED = 2.0
BYTES_AT_ONCE = 1 << 20  # Pillow's 64 KiB cost a tenth of the time of a large JPEG: its decoder stops at each end
DECODING_ERRORS = (
    *(OSError, EOFError, SyntaxError, ValueError, TypeError, LookupError),
    *(ArithmeticError, struct.error, RuntimeError, MemoryError),
)
"""What Pillow's readers raise for broken files."""


def decode_picture(image: Image.Image | bytes | Path, max_pixels: float) -> Image.Image:
    """Return a picture in mode RGB: first frame, upright by its EXIF orientation, white where it is transparent.

    Raises `UnusableSample` with the reason `unreadable`, `too_large` (seen in the header, before any pixel is decoded)
    or `missing_file`.
    """
    return despite_metadata(image, lambda source: decode_whole(source, max_pixels))


def decode_whole(image: Image.Image | bytes | Path, max_pixels: float) -> Image.Image:
    """Return a picture as `decode_picture` does, unless something beside its pixels is wrong."""
    with readable(image, max_pixels) as picture:
        decoded = upright(picture)
        decoded.info = {}  # an orientation that is left in there would be applied again
        return decoded


def decode_small(image: Image.Image | bytes | Path, max_pixels: float, scale_for: ScaleFor) -> Image.Image:
    """Return a picture as `decode_picture` does, at 1/2, 1/4 or 1/8 of its size where that is enough.

    scale_for: called once, with the upright picture's size. A JPEG is decoded smaller, for much less work. Others are
    averaged after decoding, which spares what comes then work and room; with twice the pixels left in each direction
    this is hardly seen (Pillow's `reducing_gap`). Raises `UnusableSample` as `decode_picture` does.
    """
    return despite_metadata(image, lambda source: decode_reduced(source, max_pixels, scale_for))


def decode_reduced(image: Image.Image | bytes | Path, max_pixels: float, scale_for: ScaleFor) -> Image.Image:
    """Return a picture as `decode_small` does, unless something beside its pixels is wrong."""
    with readable(image, max_pixels) as picture:
        if picture is image or picture.format not in WITH_SMALLER_COPIES:
            decoded = upright(picture)
            scale = scale_for(decoded.width, decoded.height, SPARE_WHEN_AVERAGED)
            return decoded.reduce(scale) if scale > 1 else decoded
        turn = turn_of(picture)
        width, height = reversed(picture.size) if turn in LYING else picture.size
        load_small(picture, scale_for(width, height, 1))
        return to_rgb(turned(picture, turn))


def despite_metadata(
    image: Image.Image | bytes | Path, decode: Callable[[Image.Image | bytes | Path], Image.Image]
) -> Image.Image:
    """Return what decoding gives; a PNG that fails is tried once more without texts and profiles, which may be why."""
    try:
        return decode(image)
    except UnusableSample as problem:
        lean = None if isinstance(image, Image.Image) or problem.reason != "unreadable" else without_metadata(image)
        if lean is None:
            raise
        with contextlib.suppress(UnusableSample):
            return decode(lean)
        raise


def upright(picture: Image.Image) -> Image.Image:
    """Load a picture and return it in mode RGB, turned as its EXIF orientation says."""
    shallow = load_8_bit(picture)
    return to_rgb(turned(shallow, turn_of(picture)))


def load_small(picture: Image.Image, scale: int) -> None:
    """Load a picture at 1/2, 1/4 or 1/8 of its size."""
    width, height = picture.size
    if scale > 1:
        picture.draft(None, (max(1, width // scale), max(1, height // scale)))
    if isinstance(picture, ImageFile.ImageFile):
        picture.decodermaxblock = BYTES_AT_ONCE
    picture.load()


@contextlib.contextmanager
def readable(image: Image.Image | bytes | Path, max_pixels: float) -> Iterator[Image.Image]:
    """Yield a picture of an allowed size with its header read; what Pillow raises becomes `UnusableSample`."""
    path = str(image) if isinstance(image, Path) else getattr(image, "filename", None) or None
    try:
        with pillow_limit(max_pixels), opened(image) as picture:
            require_pixel_count(picture, max_pixels, path)
            yield picture
    except UnusableSample:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise too_large(str(error).partition(" exceeds")[0], max_pixels, path) from error
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise UnusableSample("missing_file", error.strerror or "no such file", path) from error
    except UnidentifiedImageError as error:
        raise UnusableSample("unreadable", f"not a picture that Pillow reads{looks_like(image)}", path) from error
    except DECODING_ERRORS as error:
        raise UnusableSample("unreadable", str(error) or type(error).__name__, path) from error


@contextlib.contextmanager
def pillow_limit(max_pixels: float) -> Iterator[None]:
    """Make Pillow's own check, which also sees pictures inside pictures, refuse what `data.max_pixels` refuses."""
    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None if math.isinf(max_pixels) else int(max_pixels)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks on odd metadata, which name no file
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


@contextlib.contextmanager
def opened(image: Image.Image | bytes | Path) -> Iterator[Image.Image]:
    """Yield the picture with its header read; what was opened here is closed again."""
    if isinstance(image, Image.Image):
        yield image
        return
    if isinstance(image, Path) and not stat.S_ISREG(image.stat().st_mode):
        raise UnusableSample("missing_file", "not a file that holds data", str(image))  # a pipe would be waited for
    with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image, formats=readable_formats()) as picture:
        yield picture


def readable_formats() -> list[str]:
    """Return the names of the formats that are read, those that plugins such as `pillow_heif` add included."""
    return [name for name in Image.ID if name not in PROGRAM_FORMATS]


def require_pixel_count(picture: Image.Image, max_pixels: float, path: str | None) -> None:
    """Raise `UnusableSample` unless the picture has pixels, and not too many."""
    if picture.width * picture.height > max_pixels:
        raise too_large(f"{picture.width} x {picture.height} pixels", max_pixels, path)
    if picture.width < 1 or picture.height < 1:
        raise UnusableSample("unreadable", f"{picture.width} x {picture.height} pixels", path)


def too_large(size: str, max_pixels: float, path: str | None) -> UnusableSample:
    """Return the error for a picture above the limit."""
    return UnusableSample("too_large", f"{size}, and data.max_pixels is {max_pixels:,.0f}", path)


def looks_like(image: Image.Image | bytes | Path) -> str:
    """Return what a file that is no picture often is instead; its text itself is kept out of logs."""
    if isinstance(image, Path):
        with image.open("rb") as file:
            head = file.read(64)
    else:
        head = image[:64] if isinstance(image, bytes) else b""
    head = head.lstrip().lower()
    if not head:
        return " (it is empty)"
    if head[4:8] == b"ftyp" and head[8:12] in HEIF_BRANDS and "HEIF" not in Image.ID:
        return " (it is HEIC: pip install pillow-heif makes Pillow read it)"
    if head.startswith((b"<!doctype html", b"<html")):
        return " (it is a web page)"
    return " (it is a Git LFS pointer: run git lfs pull)" if head.startswith(b"version https://git-lfs") else ""


def turn_of(picture: Image.Image) -> Image.Transpose | None:
    """Return how a picture must be turned by its EXIF orientation; broken EXIF says nothing.

    Pillow's `exif_transpose` also writes the EXIF anew, which fails for some pictures that every viewer shows.
    """
    try:
        return TURNS.get(picture.getexif().get(ExifTags.Base.Orientation, 1))
    except DECODING_ERRORS:
        return None


def turned(picture: Image.Image, turn: Image.Transpose | None) -> Image.Image:
    """Return a picture turned."""
    return picture if turn is None else picture.transpose(turn)


def to_rgb(picture: Image.Image) -> Image.Image:
    """Return the picture in mode RGB, white where it is transparent."""
    if picture.mode in WITH_ALPHA or "transparency" in picture.info:
        layer = picture.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(white, layer).convert("RGB")
    return picture.convert("RGB")
