"""Hostile data: no path leaves its folder, and no header, cell or caption takes more than it may."""

from __future__ import annotations

import io
import json
import os
import struct
import sys
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image

from accel_clip.data.bad_samples import UnusableSample
from accel_clip.data.captions import choose_caption
from accel_clip.data.pictures.decode import decode_picture
from accel_clip.data.sources.base import Source
from accel_clip.data.sources.shards.tar_index import build_index, load_index, pack
from accel_clip.data.sources.tables import delimited
from accel_clip.faults import DataError
from helpers.patience import within
from helpers.pictures import write_plain
from helpers.sources import opened


def reasons(source: Source) -> list[str]:
    """Return what fetching and decoding every sample comes to, as the loader does it."""
    return [reason_of(lambda index=index: fetch(source, index)) for index in range(len(source))]


def fetch(source: Source, index: int) -> None:
    pair = source[index]
    choose_caption(pair.captions, 0, 0, index)
    decode_picture(pair.image, 50e6)


def reason_of(action: Callable[[], object]) -> str:
    try:
        action()
    except UnusableSample as problem:
        return problem.reason
    return "fine"


# --- paths that leave their folder


OPENED: list[str] = []
RECORDING: list[bool] = []


def record(event: str, arguments: tuple) -> None:
    if RECORDING and event in ("open", "os.listdir", "os.scandir") and isinstance(arguments[0], (str, os.PathLike)):
        OPENED.append(os.path.realpath(arguments[0]))


sys.addaudithook(record)


@contextmanager
def nothing_opened_in(folder: Path) -> Iterator[None]:
    """Fail when any file below a folder is opened, whichever library does it."""
    OPENED.clear()
    RECORDING.append(True)
    try:
        yield
    finally:
        RECORDING.clear()
    assert OPENED, "nothing was recorded"
    assert not [path for path in OPENED if Path(path).is_relative_to(folder.resolve())]


@pytest.mark.parametrize("form", ["pairs.csv", "pairs.tsv", "pairs.jsonl", "pairs.parquet", "metadata.csv"])
def test_pictures_outside_of_the_folder_are_counted_and_never_opened(form: str, tmp_path: Path) -> None:
    inside, secret = tmp_path / "data", tmp_path / "secret"
    write_plain(inside / "fine.png"), write_plain(secret / "a.png")
    (inside / "link.png").symlink_to(secret / "a.png")
    (inside / "folder").symlink_to(secret)
    (inside / "twice.png").symlink_to(inside / "link.png")
    (inside / "passwd.png").symlink_to("/etc/passwd")
    cells = [
        *("../secret/a.png", "../../../../../../../../etc/passwd", "/etc/passwd", str(secret / "a.png")),
        *("link.png", "folder/a.png", "twice.png", "passwd.png", "./x/../../secret/a.png", "..\\secret\\a.png"),
        *("fine.png", "nowhere.png", "folder/../fine.png"),
    ]
    write_table(inside / form, cells)
    source = opened(inside if form == "metadata.csv" else inside / form)
    with nothing_opened_in(secret):
        found = reasons(source)
    # the last leads through a link: up from where the link points to, where no fine.png lies
    assert found == ["outside_root"] * 10 + ["fine", "missing_file", "outside_root"]
    source = opened(inside if form == "metadata.csv" else inside / form, image_root="/")
    assert reasons(source)[3] == "fine" and reasons(source)[2] == "unreadable"


def write_table(file: Path, cells: list[str]) -> None:
    if file.suffix == ".jsonl":
        file.write_text("".join(json.dumps({"image": cell, "caption": "x"}) + "\n" for cell in cells))
    elif file.suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({"image": cells, "caption": ["x"] * len(cells)}), file)
    else:
        separator = "\t" if file.suffix == ".tsv" else ","
        name = "file_name" if file.stem == "metadata" else "image"
        file.write_text(f"{name}{separator}caption\n" + "".join(f"{cell}{separator}x\n" for cell in cells))


def test_captions_and_pictures_of_folders_outside_are_counted_and_never_opened(tmp_path: Path) -> None:
    inside, secret = tmp_path / "data", tmp_path / "secret"
    write_plain(secret / "a.png")
    (secret / "words.txt").write_bytes("ein schönes Geheimnis".encode("cp1252"))
    for name in ("1", "2", "3"):
        write_plain(inside / f"{name}.png")
        (inside / f"{name}.txt").write_text(name)
    (inside / "2.txt").unlink()
    (inside / "2.txt").symlink_to(secret / "words.txt")
    (inside / "3.png").unlink()
    (inside / "3.png").symlink_to(secret / "a.png")
    with nothing_opened_in(secret):
        found = reasons(opened(inside))
    assert found == ["fine", "outside_root", "outside_root"]
    assert reasons(opened(inside, image_root=str(tmp_path))) == ["fine", "fine", "fine"]


def test_links_to_the_whole_disk_are_not_followed(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "data"
    write_plain(folder / "1.png")
    (folder / "1.txt").write_text("one")
    (folder / "root").symlink_to("/")
    (folder / "up").symlink_to(tmp_path)
    write_plain(tmp_path / "other.png")
    with within(10):
        assert len(opened(folder)) == 1


def test_pipes_in_place_of_files_are_not_waited_for(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    write_plain(folder / "fine.png")
    for name in ("fine.txt", "pipe.txt", "pipe2.txt"):
        (folder / name).write_text("x")
    os.mkfifo(folder / "pipe.png")
    write_plain(folder / "pipe2.png")
    (folder / "pipe2.txt").unlink()
    os.mkfifo(folder / "pipe2.txt")
    with within(10):
        assert reasons(opened(folder)) == ["fine", "missing_file", "no_caption"]
        write_table(folder / "pairs.csv", ["pipe.png", "fine.png"])
        assert reasons(opened(folder / "pairs.csv")) == ["missing_file", "fine"]


def test_members_of_shards_are_no_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Looked at within the test's own folder: what a name with two folders up would make there is none of others'."""
    here = tmp_path / "one" / "two"
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    names = ["../../escape", "/tmp/escape", "a/../../../escape"]
    with tarfile.open(here / "x.tar", "w") as archive:
        for name in names:
            add(archive, f"{name}.png", png(4, 4))
            add(archive, f"{name}.txt", b"x")
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
        add(archive, "link.txt", b"x")
    assert reasons(opened(here / "x.tar")) == ["fine", "fine", "fine", "missing_file"]
    assert {path.name for path in tmp_path.rglob("*")} <= {"one", "two", "x.tar", "x.tar.accel-clip-index"}


# --- headers and cells that claim too much


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def png(width: int, height: int) -> bytes:
    """Return a PNG that claims a size; without pixels when it is not small."""
    if width * height < 1000:
        buffer = io.BytesIO()
        Image.new("RGB", (width, height), "red").save(buffer, "PNG")
        return buffer.getvalue()
    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes((width + 7) // 8 + 1) * height, 9)
    parts = [(b"IHDR", head), (b"IDAT", rows), (b"IEND", b"")]
    chunks = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def test_a_small_file_of_a_hundred_million_pixels_is_skipped_at_once(tmp_path: Path) -> None:
    bomb = png(10_000, 10_000)
    assert len(bomb) < 20_000
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        add(archive, "a.png", bomb)
        add(archive, "a.txt", b"x")
    (tmp_path / "a.png").write_bytes(bomb)
    write_table(tmp_path / "pairs.csv", ["a.png"])
    with within(1):
        assert reasons(opened(tmp_path / "x.tar")) + reasons(opened(tmp_path / "pairs.csv")) == ["too_large"] * 2


@pytest.mark.parametrize("size", [2**63 - 1, 2**62, 2**61, 2**40])
@pytest.mark.parametrize("form", ["base-256", "pax"])
@pytest.mark.parametrize("extension", ["png", "txt", "json"])
def test_members_that_claim_exabytes_cost_nothing(form: str, size: int, extension: str, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        add(archive, "a.png", png(4, 4))
        add(archive, "a.txt", b"x")
        if extension != "png":
            add(archive, "b.png", png(4, 4))
    written = (tmp_path / "x.tar").read_bytes().rstrip(b"\0")
    written += bytes(-len(written) % 512)
    member = tarfile.TarInfo(f"b.{extension}")
    member.size = size
    if form == "base-256":
        header = member.tobuf(tarfile.GNU_FORMAT)
    else:
        header = member.tobuf(tarfile.PAX_FORMAT)
        assert b"size=" in header
    (tmp_path / "x.tar").write_bytes(written + header)
    with within(10):
        assert reasons(opened(tmp_path / "x.tar"))[0] == "fine"
        assert "fine" not in reasons(opened(tmp_path / "x.tar"))[1:] or extension == "json"


@pytest.mark.parametrize("digits", ["9" * 30, "9" * 5000, "-1", "1e9", ""])
def test_sizes_in_extended_headers_that_are_no_sizes_end_a_shard(digits: str, tmp_path: Path) -> None:
    record = f" size={digits}\n".encode()
    length = len(record) + 1
    while len(str(length)) + len(record) != length:
        length += 1
    content = str(length).encode() + record
    extended = tarfile.TarInfo("x")
    extended.type, extended.size = tarfile.XHDTYPE, len(content)
    member = tarfile.TarInfo("b.png")
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        add(archive, "a.png", png(4, 4))
        add(archive, "a.txt", b"x")
        archive.addfile(extended, io.BytesIO(content))
        archive.addfile(member)
    index = build_index(tmp_path / "x.tar")
    assert index.num_samples == 1 and "extended header" in (index.problem or "")
    assert reasons(opened(tmp_path / "x.tar")) == ["fine"]


def test_an_index_that_points_past_its_samples_is_made_anew(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        add(archive, "a.png", png(4, 4))
        add(archive, "a.txt", b"x")
    index = build_index(tmp_path / "x.tar")
    index.members["sample"][0] = 7
    (tmp_path / "x.tar.accel-clip-index").write_bytes(pack(index))
    assert load_index(tmp_path / "x.tar") is None
    assert reasons(opened(tmp_path / "x.tar")) == ["fine"]


@pytest.mark.parametrize("depth", [300, 600, 950, 30_000])
def test_records_and_rows_that_nest_deeply_cost_themselves_alone(depth: int, tmp_path: Path) -> None:
    deep = "[" * depth + '"x"' + "]" * depth
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name, record in (("a", '{"caption": "x"}'), ("b", f'{{"caption": {deep}}}'), ("c", "[" * depth)):
            add(archive, f"{name}.png", png(4, 4))
            add(archive, f"{name}.json", record.encode())
    found = reasons(opened(tmp_path / "x.tar"))
    assert found[0] == "fine" and found[1] in ("fine", "caption_encoding") and found[2] == "caption_encoding"
    write_plain(tmp_path / "a.png")
    (tmp_path / "pairs.jsonl").write_text(f'{{"image": "a.png", "caption": {deep}}}\n')
    try:
        assert reasons(opened(tmp_path / "pairs.jsonl")) == ["fine"]
    except DataError as error:
        assert "line 1" in str(error)


def test_a_caption_of_ten_megabytes_is_skipped_fast_from_every_source(tmp_path: Path) -> None:
    long, folder = "x " * 5_000_000, tmp_path / "folder"
    for name in ("a", "b"):
        write_plain(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(long if name == "a" else "fine")
    rows = [("folder/a.png", long), ("folder/b.png", "fine")]
    (tmp_path / "pairs.csv").write_text("image,caption\n" + "".join(f"{image},{text}\n" for image, text in rows))
    (tmp_path / "pairs.jsonl").write_text(
        "".join(json.dumps({"image": image, "caption": text}) + "\n" for image, text in rows)
    )
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name, text in (("a", long), ("b", "fine")):
            add(archive, f"{name}.png", png(4, 4))
            add(archive, f"{name}.txt", text.encode())
    for path in (folder, tmp_path / "pairs.csv", tmp_path / "pairs.jsonl", tmp_path / "x.tar"):
        source = opened(path)
        with within(1):
            assert reasons(source) == ["caption_too_large", "fine"], path


def test_cells_and_lines_without_end_are_told_with_their_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_plain(tmp_path / "a.png")
    too_long = "x" * ((1 << 24) + 1)
    (tmp_path / "cell.csv").write_text(f"image,caption\na.png,fine\na.png,{too_long}\n")
    with within(20), pytest.raises(DataError, match=r"cell\.csv: the row that begins in line 3 cannot be read"):
        opened(tmp_path / "cell.csv")
    (tmp_path / "quote.csv").write_text('image,caption\na.png,"' + ("a.png,fine\n" * (1 << 21)))
    with within(20), pytest.raises(DataError, match=r"quote\.csv: the row that begins in line 2 cannot be read"):
        opened(tmp_path / "quote.csv")
    monkeypatch.setattr(delimited, "LONGEST_LINE", 1000)
    for name, content in (
        ("line.csv", "image,caption\n" + "a.png,x\n" * 3 + "y" * 1001),
        ("line.jsonl", '{"image": "a.png", "caption": "x"}\n' * 4 + "y" * 1001),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(DataError, match=rf"{name}: line 5 has more than"):
            opened(tmp_path / name)
