"""A bag of samples as they come from the wild: pictures and captions that are odd, broken or hostile, in three forms.

Each says what must become of it, in each form that can hold it: one of the reasons for which a sample is unusable, or
`FINE`.
"""

from __future__ import annotations

import csv
import io
import pickle
import struct
import tarfile
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy
from PIL import Image

from helpers.pictures import encoded, noise

FINE = "fine"
FORMS = ("table", "folder", "shard")
ORIENTATION = 0x0112


@dataclass(frozen=True)
class Sample:
    """A picture's bytes (or None: the file is missing) and a caption (or None: there is none).

    outcome: what becomes of it; forms: where it can be written; link: a path that the table names, or the folder links
    to, in place of the picture.
    """

    name: str
    picture: bytes | None
    caption: str | bytes | None
    outcome: str = FINE
    forms: tuple[str, ...] = FORMS
    link: str | None = None


def bag() -> list[Sample]:
    """Return all of them."""
    return [*odd_pictures(), *broken_pictures(), *captions(), *paths()]


def odd_pictures() -> list[Sample]:
    """Return pictures that must be read, and those that are too large."""
    palette = Image.new("P", (30, 30), 1)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    turned = Image.Exif()
    turned[ORIENTATION] = 6
    deep = Image.fromarray(numpy.full((30, 30), 30000, numpy.uint16))
    second = [Image.new("RGB", (30, 30), "blue")]
    pictures = {
        "cmyk": encoded(noise().convert("CMYK"), "JPEG"),
        "grey": encoded(noise().convert("L"), "JPEG"),
        "palette": encoded(palette, "PNG", transparency=1),
        "transparent": encoded(Image.new("RGBA", (30, 30)), "PNG"),
        "deep": encoded(deep, "PNG"),
        "animated": encoded(noise(30, 30), "GIF", save_all=True, append_images=second),
        "dot": encoded(Image.new("RGB", (1, 1)), "PNG"),
        "thread": encoded(Image.new("RGB", (1, 5000)), "PNG"),
        "turned": encoded(noise(400, 300), "JPEG", exif=turned),
        "progressive": encoded(noise(400, 300), "JPEG", progressive=True),
        "broken_exif": encoded(noise(), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff"),
    }
    # Pillow itself decodes the first, warns of the second, and refuses the third
    bombs = {f"bomb_{side}": bomb(side) for side in (8_000, 12_000, 14_000)}
    return [
        *(Sample(name, picture, f"odd, and a picture: {name}") for name, picture in pictures.items()),
        *(Sample(name, picture, "large", "too_large") for name, picture in bombs.items()),
    ]


def bomb(side: int) -> bytes:
    """Return a small file that says it has side x side pixels."""
    small = encoded(Image.new("1", (8, 8)))
    header = b"IHDR" + struct.pack(">II", side, side) + small[24:29]
    return small[:12] + header + struct.pack(">I", zlib.crc32(header)) + small[33:]


def broken_pictures() -> list[Sample]:
    """Return files that are no pictures, or not whole ones."""
    png = encoded(noise())
    flipped = bytearray(png)
    flipped[len(png) // 2] ^= 255
    contents = {
        "cut_jpeg": encoded(noise(400, 300), "JPEG")[:20_000],
        "cut_png": png[:300],
        "cut_webp": encoded(noise(), "WEBP")[:200],
        "flipped_bit": bytes(flipped),
        "empty": b"",
        "web_page": b"<!DOCTYPE html><html><body>404</body></html>",
        "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        "random": numpy.random.default_rng(3).bytes(500),
        "program": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(x) print\n%%EOF\n",
        "drawing": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
        "pickled": pickle.dumps(["no picture"]),
        "headless": b"\xff\xd8\xff\xe0",
    }
    return [Sample(name, content, f"broken: {name}", "unreadable") for name, content in contents.items()]


def captions() -> list[Sample]:
    """Return good pictures with captions that are missing, odd, or no text."""
    texts: dict[str, tuple[str | bytes | None, str, tuple[str, ...]]] = {
        "without": (None, "no_caption", FORMS),
        "blank": (" \t ", "no_caption", FORMS),
        "not_available": ("NA", FINE, FORMS),
        "null": ("null", FINE, FORMS),
        "nan": ("nan", FINE, FORMS),
        "quotes": ('a "quoted", comma; and\ttab', FINE, FORMS),
        "long": ("word " * 500, FINE, FORMS),
        "huge": ("word " * 40_000, "caption_too_large", FORMS),
        "huge_in_chinese": ("青蛙" * 12_000, "caption_too_large", FORMS),
        "scripts": ("青蛙 الضفدع лягушка 🐸\u200d\u0301", FINE, FORMS),
        "no_encoding": (b"\x80\x81\x8d\x90\xff caption", "caption_encoding", ("folder", "shard")),
    }
    return [
        Sample(name, encoded(noise(seed=number)), text, outcome, forms)
        for number, (name, (text, outcome, forms)) in enumerate(texts.items())
    ]


def paths() -> list[Sample]:
    """Return pictures that are not there, or not where they may be."""
    table, linked = ("table",), ("table", "folder")
    return [
        Sample("gone", None, "a caption alone", "missing_file", ("table", "shard")),
        Sample("dangling", None, "a link to nothing", "missing_file", linked, "nothing.png"),
        Sample("here", None, "a folder", "missing_file", table, "."),
        Sample("nowhere", None, "no path", "missing_file", table, ""),
        Sample("above", None, "above the root", "outside_root", linked, "../secret.png"),
        Sample("absolute", None, "far from the root", "outside_root", linked, "/etc/passwd"),
    ]


def held_by(form: str, num_samples: int) -> list[Sample]:
    """Return the bag as a form holds it, filled up to `num_samples` with good ones."""
    held = [sample for sample in bag() if form in sample.forms]
    more = range(num_samples - len(held))
    return held + [Sample(f"good_{n}", encoded(noise(seed=n)), f"good picture number {n}") for n in more]


def expected_counts(samples: list[Sample]) -> dict[str, int]:
    """Return how many there are of each reason."""
    return dict(Counter(sample.outcome for sample in samples if sample.outcome != FINE))


def write(form: str, samples: list[Sample], folder: Path) -> str:
    """Write samples into a new folder `bag`, with a secret beside it, and return the source to open."""
    root = folder / "bag"
    root.mkdir()
    (folder / "secret.png").write_bytes(encoded(noise()))
    writers = {"table": write_table, "folder": write_folder, "shard": write_shard}
    return writers[form](samples, root)


def write_table(samples: list[Sample], root: Path) -> str:
    """Write pictures and a table of their paths."""
    with (root / "pairs.csv").open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["image", "caption"])
        for sample in samples:
            if sample.picture is not None:
                (root / f"{sample.name}.jpg").write_bytes(sample.picture)
            rows.writerow([f"{sample.name}.jpg" if sample.link is None else sample.link, sample.caption or ""])
    return str(root / "pairs.csv")


def write_folder(samples: list[Sample], root: Path) -> str:
    """Write pictures, or links, with .txt files beside them."""
    for sample in samples:
        file = root / f"{sample.name}.jpg"
        if sample.link is not None:
            file.symlink_to(sample.link)
        else:
            file.write_bytes(sample.picture or b"")
        if sample.caption is not None:
            file.with_suffix(".txt").write_bytes(as_bytes(sample.caption))
    return str(root)


def write_shard(samples: list[Sample], root: Path) -> str:
    """Write a tar shard, and one more sample at its end which is cut off."""
    with tarfile.open(root / "0000.tar", "w") as archive:
        for sample in [*samples, Sample("last", encoded(noise(200, 200)), "cut off")]:
            for extension, content in (("txt", sample.caption), ("jpg", sample.picture)):
                if content is not None:
                    member = tarfile.TarInfo(f"{sample.name}.{extension}")
                    member.size = len(as_bytes(content))
                    archive.addfile(member, io.BytesIO(as_bytes(content)))
    whole = (root / "0000.tar").read_bytes()
    (root / "0000.tar").write_bytes(whole[: whole.index(b"cut off") + 5_000])
    return str(root / "0000.tar")


def as_bytes(text: str | bytes) -> bytes:
    """Return a text in UTF-8."""
    return text.encode() if isinstance(text, str) else text


def good(name: str, seed: int) -> Sample:
    """Return a sample that can be used."""
    return Sample(name, encoded(noise(seed=seed)), f"picture {name} of noise")


def write_cut_shards(folder: Path, num_shards: int, samples_a_shard: int) -> Path:
    """Write shards of good samples; each is cut off inside of its last picture, which can therefore not be used."""
    folder.mkdir()
    for shard in range(num_shards):
        names = [f"{shard}_{number}" for number in range(samples_a_shard - 1)]
        written = write_shard([good(name, seed) for seed, name in enumerate(names, 100 * shard)], folder)
        Path(written).rename(folder / f"shard-{shard}.tar")
    return folder


def write_wild_shards(folder: Path) -> Path:
    """Write shards that are cut off, one of which holds everything that is found in the wild."""
    write_cut_shards(folder, 3, 20)
    Path(write_shard(held_by("shard", 60), folder)).rename(folder / "shard-wild.tar")
    return folder
