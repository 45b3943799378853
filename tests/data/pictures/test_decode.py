"""Decoding: the same upright RGB pixels from every kind of file, and a named reason for each that cannot be used."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import itertools
import os
import struct
import warnings
import zlib
from functools import partial
from pathlib import Path
from random import Random

import numpy
import pytest
import torch
from PIL import EpsImagePlugin, Image, PngImagePlugin
from torchvision.transforms import RandomResizedCrop

from accel_clip.data.bad_samples import UnusableSample
from accel_clip.data.pictures.augmentation import cropped, pixels_of, random_box, resized, smallest_box, training_scale
from accel_clip.data.pictures.decode import ScaleFor, decode_picture, decode_small
from helpers.pictures import encoded

MAX_PIXELS = 1e6
ORIENTATION = 0x0112


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
        (numpy.array([[0, 1000, 4095]], dtype=numpy.int32), [0, 62, 255]),
        (numpy.array([[0.0, 1000.5, 4000.0]], dtype=numpy.float32), [0, 62, 249]),
        (numpy.array([[0.0, numpy.inf, 0.5]], dtype=numpy.float32), [0, 255, 128]),
    ],
)
def test_values_without_a_known_span_use_the_smallest_that_holds_them(values, expected):
    decoded = numpy.asarray(decode_picture(encoded(Image.fromarray(values), "TIFF"), MAX_PIXELS))
    assert numpy.allclose(decoded[0, :, 0], expected, atol=1)


def deep_png(values: numpy.ndarray, *chunks: tuple[bytes, bytes]) -> bytes:
    """Return a PNG with 16 bits a value, uint16 [H, W, channels], and further chunks; Pillow writes only grey ones."""
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[values.shape[2]]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    head = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, kind, 0, 0, 0)
    parts = [(b"IHDR", head), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        for name, content in parts
    )


def deep_tiff(values: numpy.ndarray, order: str) -> bytes:
    """Return a TIFF with 16 bits a value, uint16 [H, W, channels], in one strip; order: of bytes, < or >."""
    height, width, channels = values.shape
    content = values.astype(f"{order}u2").tobytes()
    entries = [
        *((256, 4, 1, width), (257, 4, 1, height), (258, 3, channels, 8), (259, 3, 1, 1)),
        *((262, 3, 1, 1 if channels == 1 else 2), (273, 4, 1, 16), (277, 3, 1, channels), (278, 4, 1, height)),
        (279, 4, 1, len(content)),
    ]
    table = struct.pack(f"{order}H", len(entries))
    for tag, kind, count, value in entries:
        if kind == 3 and count == 1:
            table += struct.pack(f"{order}HHIHH", tag, kind, count, 16 if tag == 258 else value, 0)
        else:
            table += struct.pack(f"{order}HHII", tag, kind, count, value)
    depths = struct.pack(f"{order}4H", 16, 16, 16, 16)
    start = 16 + len(content)
    return {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}I", start) + depths + content + table + bytes(4)


def random_values(bits: int, channels: int) -> numpy.ndarray:
    values = numpy.random.default_rng(bits).integers(0, 2**bits, (13, 17, channels)).astype(numpy.uint16)
    values[0, 0] = 2**bits - 1
    return values


def composed(values: numpy.ndarray, white: int) -> numpy.ndarray:
    """Return what values [H, W, channels] look like on white, [H, W, 3] from 0 to 255."""
    scaled = values.astype(numpy.float64) / white
    colours, alpha = (scaled[..., :1], scaled[..., 1:]) if values.shape[2] < 3 else (scaled[..., :3], scaled[..., 3:])
    shown = colours * alpha + (1 - alpha) if alpha.size else colours
    return 255 * numpy.broadcast_to(shown, (*shown.shape[:2], 3))


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
@pytest.mark.parametrize(
    "channels, form",
    [
        *((channels, "png") for channels in (1, 2, 3, 4)),
        *((channels, f"tiff {order}") for channels in (1, 3) for order in "<>"),
    ],
)
def test_values_of_fewer_bits_than_they_are_stored_in_keep_their_steps(channels, form, bits):
    values = random_values(bits, channels)
    content = deep_png(values) if form == "png" else deep_tiff(values, form[-1])
    expected = composed(values, 2**bits - 1)
    decoded = numpy.asarray(decode_picture(content, MAX_PIXELS)).astype(float)
    assert numpy.abs(decoded - expected).max() <= (2 if channels in (2, 4) else 1)
    assert (numpy.asarray(decode_small(content, MAX_PIXELS, lambda *_: 1)) == decoded).all()


@pytest.mark.parametrize(
    "significant, values, white",
    [
        (12, [0, 100, 901], 4095),  # dark, and not 10 bits
        (16, [0, 100, 901], 65535),  # dark indeed
        (12, [0, 160, 3200], 65535),  # spread over 16 bits, as the format asks for: their last four are empty
        (12, [0, 0x0AA0, 0xFFFF], 65535),
        (14, [0, 5, 60_000], 65535),  # more than it says
        (8, [0, 5, 201], 255),
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_a_png_that_says_how_many_bits_are_significant_is_believed(significant, values, white, channels):
    deep = numpy.repeat(numpy.array([values], numpy.uint16)[..., None], channels, axis=2)
    content = deep_png(deep, (b"sBIT", bytes([significant] * channels)))
    decoded = numpy.asarray(decode_picture(content, MAX_PIXELS)).astype(float)
    assert numpy.abs(decoded - composed(deep, white)).max() <= 1


@pytest.mark.parametrize("channels", [1, 3])
def test_a_transparent_value_is_white_and_decides_nothing(channels):
    values = random_values(12, channels)
    values[3, 4] = 65535
    decoded = numpy.asarray(decode_picture(deep_png(values, (b"tRNS", b"\xff\xff" * channels)), MAX_PIXELS)).astype(
        float
    )
    values[3, 4] = 4095
    assert numpy.abs(decoded - composed(values, 4095)).max() <= 1


@pytest.mark.parametrize("name", [b"tEXt", b"zTXt", b"iTXt", b"iCCP"])
@pytest.mark.parametrize("place", ["before", "behind"])
def test_texts_and_profiles_do_not_cost_the_picture_its_pixels(name, place, tmp_path):
    long_text = zlib.compress(bytes(3 << 20))
    content = {
        b"tEXt": b"parameters\0" + b"x" * (70 << 20),
        b"zTXt": b"parameters\0\0" + long_text,
        b"iTXt": b"workflow\0\1\0\0\0" + long_text,
        b"iCCP": b"profile\0\0" + long_text,
    }[name]
    image = Image.effect_noise((20, 10), 60)
    plain = encoded(image)
    chunk = struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
    pixels = plain.index(b"IDAT") - 4 if place == "before" else plain.index(b"IEND") - 4
    file = tmp_path / "x.png"
    file.write_bytes(plain[:pixels] + chunk + plain[pixels:])
    for form in (file, file.read_bytes()):
        assert (numpy.asarray(decode_picture(form, MAX_PIXELS)) == numpy.asarray(image.convert("RGB"))).all()
        assert decode_small(form, MAX_PIXELS, lambda *_: 1).size == (20, 10)


def test_orientation_and_colours_outlast_texts_that_are_dropped():
    image = Image.new("P", (20, 10), 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    plain = encoded(image, exif=exif)
    broken = b"\0\0\0\3tEXta\0b" + bytes(4)  # its checksum is wrong
    place = plain.index(b"IDAT") - 4
    decoded = decode_picture(plain[:place] + broken + plain[place:], MAX_PIXELS)
    assert decoded.size == (10, 20) and decoded.getpixel((0, 0)) == (200, 100, 50)


def test_a_broken_png_stays_one_without_its_texts():
    text = PngImagePlugin.PngInfo()
    text.add_text("a", "b")
    whole = encoded(Image.effect_noise((60, 60), 60), pnginfo=text)
    assert problem_of(whole[: len(whole) // 2]).reason == "unreadable"
    damaged = bytearray(whole)
    damaged[whole.index(b"IDAT") + 40] ^= 0xFF
    assert problem_of(bytes(damaged)).reason == "unreadable"


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_what_follows_the_end_of_a_picture_is_left_alone(kind):
    content = encoded(Image.effect_noise((20, 10), 60), kind)
    assert (
        decode_picture(content + b"garbage" * 1000, MAX_PIXELS).tobytes()
        == decode_picture(content, MAX_PIXELS).tobytes()
    )


@pytest.mark.parametrize("brand", [b"heic", b"mif1", b"hevc"])
def test_pictures_of_phones_name_what_reads_them(brand):
    content = b"\0\0\0\x18ftyp" + brand + bytes(8) + b"mif1heic" + bytes(100)
    if importlib.util.find_spec("pillow_heif") is None:
        assert "pip install pillow-heif" in problem_of(content).detail
    else:
        assert problem_of(content).reason == "unreadable"


def test_pictures_of_phones_are_read_where_their_decoder_is_installed(tmp_path):
    pytest.importorskip("pillow_heif")
    image = Image.linear_gradient("L").convert("RGB")
    image.save(tmp_path / "x.heic", quality=95)
    for form in (tmp_path / "x.heic", (tmp_path / "x.heic").read_bytes()):
        decoded = decode_small(form, MAX_PIXELS, lambda *_: 1)
        assert numpy.abs(numpy.asarray(decoded).astype(int) - numpy.asarray(image)).max() < 12
    assert problem_of(tmp_path / "x.heic", max_pixels=100).reason == "too_large"


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


# --- a picture no larger than needed


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Return noise with the spectrum of a photograph: its amplitude falls with the frequency to the power of 1.25."""
    generator = numpy.random.default_rng(seed)
    frequency = numpy.hypot(numpy.fft.fftfreq(height)[:, None], numpy.fft.rfftfreq(width)[None])
    frequency[0, 0] = numpy.inf
    noise = generator.normal(size=(3, *frequency.shape)) + 1j * generator.normal(size=(3, *frequency.shape))
    channels = numpy.fft.irfft2(noise / frequency**1.25, (height, width)).transpose(1, 2, 0)
    grey = channels.mean(2, keepdims=True)
    values = grey + 0.35 * (channels - grey)  # photographs are greyer than three channels on their own
    return Image.fromarray(numpy.clip(128 + 50 * values / values.std(), 0, 255).astype(numpy.uint8))


def small(image: Image.Image | bytes, size: tuple[int, int]) -> Image.Image:
    """Return a picture decoded for training at a size."""
    return decode_small(image, MAX_PIXELS, partial(training_scale, size))


def at(scale: int) -> ScaleFor:
    return lambda width, height, spare: scale


def seen_in_training(data: bytes, seed: int, size: tuple[int, int]) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Return what training sees of a picture, and the same part of the whole one resized by Pillow, int [H, W, 3]."""
    whole, decoded = decode_picture(data, MAX_PIXELS), small(data, size)
    scale = round(whole.width / decoded.width)
    box = random_box(Random(seed), *decoded.size)
    left, upper, right, lower = (edge * scale for edge in box)
    expected = whole.crop((left, upper, min(right, whole.width), min(lower, whole.height)))
    found = resized(cropped(pixels_of(decoded), box), size).permute(1, 2, 0)
    return found.numpy().astype(int), numpy.asarray(expected.resize(size, Image.Resampling.BICUBIC)).astype(int)


@pytest.mark.parametrize(("width", "height"), [(640, 480), (1104, 904), (333, 501), (225, 230)])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}])
def test_a_jpeg_decoded_small_looks_as_if_it_had_been_decoded_whole(width, height, options):
    data = encoded(photo(width, height), "JPEG", quality=90, **options)
    found, expected = seen_in_training(data, 1, (224, 224))
    assert abs(found - expected).mean() < 2


def test_real_pictures_decoded_small_look_as_if_they_had_been_decoded_whole(stamps):
    differences = []
    for file in sorted(stamps.rglob("*.png"))[::16]:
        picture = decode_picture(file, MAX_PIXELS)
        picture = picture.crop((0, 0, picture.width // 8 * 8, picture.height // 8 * 8))  # else the last pixel is a part
        if min(picture.size) >= 100:
            data = encoded(picture, "JPEG", quality=90)
            found, expected = seen_in_training(data, 1, (48, 48))
            differences.append(abs(found - expected).mean())
    assert len(differences) > 5 and numpy.mean(differences) < 2


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_a_turned_picture_decoded_small_is_the_upright_one(kind, orientation):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    data = encoded(photo(402, 301), kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    whole, sizes = decode_picture(data, MAX_PIXELS), []

    def scale_for(width: int, height: int, spare: float) -> int:
        sizes.append((width, height))
        return 2

    found = decode_small(data, MAX_PIXELS, scale_for)
    assert sizes == [whole.size]
    assert found.size == ((201, 151) if whole.width > whole.height else (151, 201))
    difference = numpy.asarray(found.resize((40, 40))).astype(int) - numpy.asarray(whole.resize((40, 40)))
    assert abs(difference).mean() < 2.5


@pytest.mark.parametrize("kind", ["JPEG", "MPO", "PNG", "WEBP"])
@pytest.mark.parametrize("scale", [1, 2, 4, 8])
@pytest.mark.parametrize("size", [(401, 300), (7, 5)])
def test_every_scale_divides_the_sides(kind, scale, size):
    found = decode_small(encoded(photo(*size), kind), MAX_PIXELS, at(scale))
    assert found.mode == "RGB"
    if size[1] >= scale:
        assert found.size == (-(-size[0] // scale), -(-size[1] // scale))


def test_averaged_pictures_keep_twice_the_pixels_and_look_as_if_resized_alone():
    picture = photo(900, 900)
    asked = []

    def scale_for(width: int, height: int, spare: float) -> int:
        asked.append(spare)
        return training_scale((224, 224), width, height, spare)

    for kind, decoded in (("JPEG", 450), ("PNG", 900)):
        assert decode_small(encoded(picture, kind), MAX_PIXELS, scale_for).width == decoded
    assert asked == [1, 2]
    found, expected = seen_in_training(encoded(picture, "PNG"), 1, (100, 100))
    assert small(encoded(picture, "PNG"), (100, 100)).size == (225, 225)
    assert abs(found - expected).mean() < 1


SHAPES = (0.05, 0.3, 0.6, 0.675, 0.7, 0.75, 0.8, 0.9, 1, 1.1, 1.25, 4 / 3, 1.4, 1.48, 1.5, 1.7, 3, 20)
"""Width to height, on both sides of where another rule decides about the smallest box."""


class Drawn:
    """Draws the same area and shape in every attempt, as shares of their ranges."""

    def __init__(self, area: float, shape: float) -> None:
        self.drawn = itertools.cycle((area, shape))

    def random(self) -> float:
        return next(self.drawn)


@pytest.mark.parametrize("height", [1, 2, 3, 16, 97, 225, 480])
def test_the_smallest_box_is_the_smallest_that_can_be_drawn(height):
    areas, shares = (0, 0.001, 0.5), numpy.linspace(0, 1, 41)
    for size in ((max(1, round(height * shape)), height) for shape in SHAPES):
        boxes = [random_box(Drawn(area, shape), *size) for area in areas for shape in shares]
        boxes += [random_box(Random(seed), *size) for seed in range(100)]
        smallest = min(box[2] - box[0] for box in boxes), min(box[3] - box[1] for box in boxes)
        for found, drawn in zip(smallest_box(*size), smallest, strict=True):
            assert 0.97 * drawn - 1 <= found <= drawn, size


@pytest.mark.parametrize("size", [(32, 32), (224, 224), (64, 48)])
@pytest.mark.parametrize("spare", [1, 2])
def test_no_box_is_left_with_fewer_pixels_than_needed_unless_the_picture_has_them_not(size, spare):
    scales = set()
    for width, height in ((w, h) for w in range(60, 2000, 61) for h in range(55, 2000, 67)):
        scale = training_scale(size, width, height, spare)
        scales.add(scale)
        if scale > 1:
            decoded = -(-width // scale), -(-height // scale)
            left, upper, right, lower = random_box(Random(width * height), *decoded)
            assert right - left >= spare * size[0] and lower - upper >= spare * size[1]
        if scale < 8:  # one step further there are boxes with too few
            box = smallest_box(-(-width // (2 * scale)), -(-height // (2 * scale)))
            assert box[0] < spare * size[0] or box[1] < spare * size[1]
    assert scales == ({1, 2, 4, 8} if size[0] < 100 else {1, 2, 4, 8} - {8 // spare, 8})


@pytest.mark.parametrize(
    "width, height, side, decoded",
    [
        *((640, 480, 224, 320), (640, 427, 224, 640), (1000, 1000, 224, 250), (500, 375, 224, 500)),
        *((400, 200, 100, 200), (400, 200, 101, 400), (400, 200, 50, 100), (400, 200, 25, 50)),
    ],
)
def test_the_least_that_has_the_pixels_wanted_is_decoded(width, height, side, decoded):
    assert small(encoded(photo(width, height), "JPEG"), (side, side)).width == decoded


def test_pictures_decoded_small_keep_white_below_transparency_and_sixteen_bits():
    hidden = encoded(Image.new("RGBA", (40, 40), (0, 0, 0, 0)))
    deep = encoded(Image.fromarray(numpy.full((40, 40), 30000, numpy.uint16)))
    for data, value in ((hidden, 255), (deep, 117)):
        found = decode_small(data, MAX_PIXELS, at(2))
        assert found.size == (20, 20) and (numpy.asarray(found) == value).all()
        assert (resized(pixels_of(found), (8, 8)) == value).all()


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_grey_and_cmyk_jpegs_are_decoded_small_too(mode):
    data = encoded(photo(400, 400).convert(mode), "JPEG")
    found, expected = seen_in_training(data, 0, (100, 100))
    assert abs(found - expected).mean() < 2


def test_a_picture_that_is_handed_over_is_not_shrunk():
    picture = Image.open(io.BytesIO(encoded(photo(400, 400), "JPEG")))
    assert small(picture, (50, 50)).size == (200, 200)
    assert picture.size == (400, 400)
    assert numpy.array_equal(decode_picture(picture, MAX_PIXELS), picture)


@pytest.mark.parametrize("share", [0.01, 0.3, 0.9])
def test_a_cut_jpeg_is_unreadable_at_every_scale(share):
    data = encoded(photo(400, 400), "JPEG")
    for scale in (8, 4, 2, 1):
        with pytest.raises(UnusableSample) as caught:
            decode_small(data[: int(len(data) * share)], MAX_PIXELS, at(scale))
        assert caught.value.reason == "unreadable"


@pytest.mark.parametrize("size", [(1, 1), (1, 10_000), (10_000, 1), (3, 2)])
def test_extreme_shapes_are_cut_and_resized(size):
    for kind in ("PNG", "JPEG"):
        data = encoded(Image.new("RGB", size, "red"), kind)
        pixels = pixels_of(small(data, (32, 24)))
        box = random_box(Random(0), pixels.shape[1], pixels.shape[0])
        assert resized(cropped(pixels, box), (32, 24)).shape == (3, 24, 32)


@pytest.mark.parametrize("size", [(640, 480), (97, 100), (300, 1000), (1000, 300)])
def test_random_parts_are_distributed_as_torchvisions(size):
    width, height = size
    generator = Random(0)
    ours = numpy.array([random_box(generator, width, height) for _ in range(4000)])
    torch.manual_seed(0)
    shape = torch.empty(1, height, width, device="meta")
    drawn = (RandomResizedCrop.get_params(shape, [0.9, 1.0], [3 / 4, 4 / 3]) for _ in range(1500))
    theirs = numpy.array([(left, top, left + w, top + h) for top, left, h, w in drawn])
    assert (ours[:, :2] >= 0).all() and (ours[:, 2:] <= size).all()
    noise = theirs.std(0) * (1 / 4000 + 1 / 1500) ** 0.5
    assert (abs(ours.mean(0) - theirs.mean(0)) <= 4 * noise + 1e-9).all()
    assert numpy.allclose(ours.std(0), theirs.std(0), rtol=0.1)


@pytest.mark.parametrize("size", [(64, 48), (301, 207), (500, 100)])
def test_resizing_is_pillows_but_for_rounding(size):
    picture = photo(301, 207)
    difference = resized(pixels_of(picture), size).permute(1, 2, 0).numpy() - numpy.asarray(
        picture.resize(size, Image.Resampling.BICUBIC)
    ).astype(int)
    assert abs(difference).max() <= 3 and abs(difference).mean() < 0.5
