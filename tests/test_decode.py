"""Decoding: the same upright RGB pixels from every kind of file, and a named reason for each that cannot be used."""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from pathlib import Path

import numpy
import pytest
from PIL import EpsImagePlugin, Image

from accel_clip.data.bad_samples import UnusableSample
from accel_clip.data.decode import decode_picture

MAX_PIXELS = 1e6
ORIENTATION = 0x0112


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def problem_of(image: Image.Image | bytes | Path, max_pixels: float = MAX_PIXELS) -> UnusableSample:
    with pytest.raises(UnusableSample) as caught:
        decode_picture(image, max_pixels)
    return caught.value


def corners() -> Image.Image:
    """Return 40 x 20 pixels whose quarters are red, green, blue and black."""
    picture = Image.new("RGB", (40, 20))
    for colour, box in (("red", (0, 0, 20, 10)), ("lime", (20, 0, 40, 10)), ("blue", (0, 10, 20, 20))):
        picture.paste(colour, box)
    return picture


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "I;16", "I", "F"])
def test_every_mode_becomes_rgb_of_the_same_size(mode):
    source = Image.new("L", (5, 3), 0).convert("I").convert("I;16") if mode == "I;16" else Image.new(mode, (5, 3))
    decoded = decode_picture(source, MAX_PIXELS)
    assert (decoded.mode, decoded.size) == ("RGB", (5, 3))


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "BMP"])
def test_lossless_files_keep_their_pixels(kind):
    data = encoded(corners(), kind, **({"lossless": True} if kind == "WEBP" else {}))
    assert numpy.array_equal(decode_picture(data, MAX_PIXELS), corners())


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_white_and_never_the_colour_hidden_below(mode):
    hidden = Image.new(mode, (4, 4), (0,) * len(mode))
    assert decode_picture(encoded(hidden), MAX_PIXELS).getpixel((0, 0)) == (255, 255, 255)


def test_half_transparency_is_mixed_with_white():
    half = Image.new("RGBA", (4, 4), (200, 0, 100, 128))
    expected = [round(128 / 255 * value + 127 / 255 * 255) for value in (200, 0, 100)]
    assert numpy.allclose(decode_picture(half, MAX_PIXELS).getpixel((1, 1)), expected, atol=1)


@pytest.mark.parametrize("mode, transparent", [("P", 0), ("L", 0), ("RGB", (0, 0, 0)), ("1", 0), ("I;16", 0)])
def test_one_transparent_colour_is_white(mode, transparent):
    image = Image.new(mode, (4, 4), 0)
    data = encoded(image, transparency=transparent)
    assert decode_picture(data, MAX_PIXELS).getpixel((0, 0)) == (255, 255, 255)


def test_transparent_palette_of_a_gif_is_white():
    image = Image.new("P", (4, 4), 0)
    image.putpalette([255, 0, 0, 0, 255, 0])
    assert decode_picture(encoded(image, "GIF", transparency=0), MAX_PIXELS).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_not_clipped(kind):
    values = numpy.array([[0, 30000, 65535]], dtype=numpy.uint16)
    decoded = decode_picture(encoded(Image.fromarray(values), kind), MAX_PIXELS)
    assert [decoded.getpixel((x, 0)) for x in range(3)] == [(0, 0, 0), (117, 117, 117), (255, 255, 255)]


@pytest.mark.parametrize(
    "values, expected",
    [
        (numpy.array([[0.0, 0.5, 1.0]], dtype=numpy.float32), [0, 128, 255]),
        (numpy.array([[0.0, 100.0, 200.0]], dtype=numpy.float32), [0, 100, 200]),
        (numpy.array([[-1.0, 0.0, 1.0]], dtype=numpy.float32), [0, 128, 255]),
        (numpy.array([[0, 100, 255]], dtype=numpy.int32), [0, 100, 255]),
        (numpy.array([[0, 30000, 65535]], dtype=numpy.int32), [0, 117, 255]),
        (numpy.array([[-5, 500_000, 1_000_005]], dtype=numpy.int32), [0, 127, 255]),
        (numpy.array([[numpy.nan, 1.0, 0.0]], dtype=numpy.float32), [0, 255, 0]),
        (numpy.array([[-7, -7, -7]], dtype=numpy.int32), [0, 0, 0]),
    ],
)
def test_values_without_a_known_span_use_the_smallest_that_holds_them(values, expected):
    decoded = numpy.asarray(decode_picture(encoded(Image.fromarray(values), "TIFF"), MAX_PIXELS))
    assert numpy.allclose(decoded[0, :, 0], expected, atol=1)


def test_cmyk_jpeg_keeps_its_colours():
    red = encoded(Image.new("RGB", (16, 16), "red").convert("CMYK"), "JPEG")
    assert numpy.allclose(decode_picture(red, MAX_PIXELS).getpixel((8, 8)), (255, 0, 0), atol=4)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_first_frame_of_animations(kind):
    first, second = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    data = encoded(first, kind, save_all=True, append_images=[second])
    assert numpy.allclose(decode_picture(data, MAX_PIXELS).getpixel((4, 4)), (255, 0, 0), atol=4)


@pytest.mark.parametrize("size", [(1, 1), (1, 10_000), (10_000, 1)])
def test_extreme_shapes(size):
    assert decode_picture(encoded(Image.new("L", size)), MAX_PIXELS).size == size


def turned(orientation: int, kind: str) -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return encoded(corners(), kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))


# What a viewer shows: the tag says which stored row and column are the top and the left (EXIF 2.32, section 4.6.4)
UPRIGHT = {
    1: lambda pixels: pixels,
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.transpose(1, 0, 2),
    6: lambda pixels: pixels[::-1].transpose(1, 0, 2),
    7: lambda pixels: pixels[::-1, ::-1].transpose(1, 0, 2),
    8: lambda pixels: pixels[:, ::-1].transpose(1, 0, 2),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_every_orientation_is_applied_to_bytes_files_and_pictures_alike(kind, orientation, tmp_path):
    data = turned(orientation, kind)
    file = tmp_path / "turned"
    file.write_bytes(data)
    expected = UPRIGHT[orientation](numpy.asarray(corners())).astype(int)
    for stored in (data, file, Image.open(file)):
        decoded = decode_picture(stored, MAX_PIXELS)
        assert decoded.size == expected.shape[1::-1]
        # JPEG blurs where colours meet, so quarters are compared in their middles
        assert numpy.allclose(numpy.asarray(decoded)[5::10, 5::10], expected[5::10, 5::10], atol=12)


def test_orientation_is_applied_once():
    once = decode_picture(turned(6, "JPEG"), MAX_PIXELS)
    twice = decode_picture(once, MAX_PIXELS)
    assert once.size == twice.size == (20, 40)
    assert once.info == {} and not once.getexif()
    assert numpy.array_equal(once, twice)


def test_a_picture_that_is_handed_over_is_left_as_it_is():
    picture = Image.open(io.BytesIO(turned(6, "JPEG")))
    decode_picture(picture, MAX_PIXELS)
    assert picture.size == (40, 20)


@pytest.mark.parametrize("exif", [b"Exif\0\0no tags at all", b"Exif\0\0II*\0", b"Exif\0\0MM\0*\xff\xff\xff\xff"])
def test_broken_exif_does_not_cost_the_picture(exif):
    assert decode_picture(encoded(corners(), "PNG", exif=exif), MAX_PIXELS).size == (40, 20)


def test_size_is_read_in_the_header_before_any_pixel(tmp_path):
    file = tmp_path / "bomb.png"
    file.write_bytes(encoded(Image.new("1", (10_000, 10_000)))[:200])  # no pixels follow, and none are asked for
    problem = problem_of(file, 50e6)
    assert problem.reason == "too_large"
    assert "100000000" in problem.detail and "50,000,000" in problem.detail and "data.max_pixels" in problem.detail
    assert problem.path == str(file)


@pytest.mark.parametrize("width", [1001, 2001, 10_000])  # over the limit, over twice of it, far over it
def test_too_large_bytes_files_and_pictures_without_a_warning(width, tmp_path):
    image = Image.new("1", (width, 1000))
    file = tmp_path / "large.png"
    file.write_bytes(encoded(image))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert {problem_of(stored).reason for stored in (encoded(image), file, image)} == {"too_large"}


def test_a_limit_above_pillows_own_is_kept(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert decode_picture(encoded(Image.new("L", (100, 100))), 10_000).size == (100, 100)
    assert problem_of(encoded(Image.new("L", (101, 100))), 10_000).reason == "too_large"
    assert Image.MAX_IMAGE_PIXELS == 100


@pytest.mark.parametrize(
    "data, words",
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"hf_secret that must not be copied into a log", "not a picture"),
    ],
)
def test_files_that_are_no_pictures_say_what_they_are(data, words, tmp_path):
    file = tmp_path / "photo.jpg"
    file.write_bytes(data)
    for stored in (data, file):
        problem = problem_of(stored)
        assert problem.reason == "unreadable" and words in problem.detail and "secret" not in problem.detail
    assert problem.path == str(file)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF"])
@pytest.mark.parametrize("share", [0.3, 0.8])
def test_truncated_files_are_unreadable(kind, share):
    noise = numpy.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=numpy.uint8)
    data = encoded(Image.fromarray(noise), kind)
    assert problem_of(data[: int(len(data) * share)]).reason == "unreadable"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF"])
def test_damaged_files_are_decoded_or_unusable_but_nothing_else(kind):
    data = encoded(corners(), kind)
    generator = numpy.random.default_rng(1)
    for _ in range(150):
        damaged = bytearray(data)
        for place in generator.integers(0, len(data), 3):
            damaged[place] = generator.integers(0, 256)
        try:
            assert decode_picture(bytes(damaged), MAX_PIXELS).mode == "RGB"
        except UnusableSample as problem:
            assert problem.reason in ("unreadable", "too_large")


def test_missing_files_and_folders(tmp_path):
    assert problem_of(tmp_path / "none.jpg").reason == "missing_file"
    assert problem_of(tmp_path).reason == "missing_file"
    (tmp_path / "file").write_bytes(b"")
    assert problem_of(tmp_path / "file" / "below.jpg").reason == "missing_file"


def test_postscript_is_never_run(monkeypatch):
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *program, **options: Image.new("RGB", (10, 10)).im)
    program = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n(x) print\n%%EOF\n"
    assert problem_of(program).reason == "unreadable"


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_files_are_closed(tmp_path):
    file = tmp_path / "a.png"
    for content in (encoded(corners()), encoded(corners())[:60], b"no picture"):
        file.write_bytes(content)
        with contextlib.suppress(UnusableSample):
            decode_picture(file, MAX_PIXELS)
    assert str(file) not in [os.readlink(entry) for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink()]
