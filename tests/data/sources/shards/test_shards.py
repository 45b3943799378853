"""Tar shards: the samples that `tarfile` finds, whatever the archive, and what is lost where one is cut."""

from __future__ import annotations

import gc
import gzip
import io
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from torch.utils.data import DataLoader

from accel_clip.config import DataConfig, SourceConfig
from accel_clip.data.bad_samples import UnusableSample
from accel_clip.data.sources.base import SourceOptions
from accel_clip.data.sources.combine import Concatenated
from accel_clip.data.sources.resolve import locate, open_labelled, open_source, open_sources
from accel_clip.data.sources.shards import reader as shard_reader
from accel_clip.data.sources.shards import tar_index
from accel_clip.data.sources.shards.local import open_shards
from accel_clip.data.sources.shards.names import expand_braces, find_addresses, find_shards
from accel_clip.faults import ConfigError, DataError
from helpers.shards import FORMATS, numbered, one_sample, write_random, write_tar
from helpers.sources import captions_of, opened, problem_of

TWO_ZERO_BLOCKS = 1024


@pytest.fixture(autouse=True)
def no_waits(monkeypatch):
    monkeypatch.setattr(shard_reader, "WAITS_SECONDS", (0.0, 0.0, 0.0))


def write_set(folder: Path, num_shards: int, num_samples: int = 3) -> Path:
    for shard in range(num_shards):
        write_tar(folder / f"{shard:04d}.tar", numbered(shard, num_samples))
    return folder


def outcome(source, index: int) -> tuple[bytes, tuple[str, ...]] | str:
    try:
        return source[index].image, source[index].captions
    except UnusableSample as problem:
        return problem.reason


# --- against tarfile


def by_tarfile(path: Path) -> dict[str, dict[str, bytes]]:
    """Return the samples of a shard, by key and extension, as Python's own reader of archives finds them."""
    found: dict[str, dict[str, bytes]] = {}
    with tarfile.open(path) as archive:
        for member in archive:
            folder, _, file = member.name.rpartition("/")
            base, dot, extension = file.partition(".")
            if member.isreg() and base and dot and not folder.startswith("__"):
                key = f"{folder}/{base}" if folder else base
                found.setdefault(key, {})[extension.lower()] = archive.extractfile(member).read()
    usable = {"jpg", "png", "txt", "json"}
    return {key: members for key, members in found.items() if usable & set(members)}


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("seed", range(4))
def test_random_sets_are_what_tarfile_finds_in_their_order(seed, kind, tmp_path, capsys):
    draw = random.Random(f"{seed} {kind}")
    paths = [tmp_path / "set" / f"{number}.tar" for number in range(3)]
    paths[0].parent.mkdir()
    expected = []
    for path in paths:
        write_random(path, draw, kind)
        expected += [(path.name, key, members) for key, members in by_tarfile(path).items()]
    source = opened(tmp_path / "set" / "{0..2}.tar")
    assert [source.key(index) for index in range(len(source))] == [f"{name}/{key}" for name, key, _ in expected]
    for index, (_, _, members) in enumerate(expected):
        if not {"jpg", "png"} & set(members):
            assert problem_of(source, index).reason == "missing_file"
            continue
        assert source[index].image == members.get("jpg", members.get("png"))
        assert source[index].captions == ((members["txt"].decode().strip(),) if "txt" in members else ())
    assert "cut" not in capsys.readouterr().err and "without" not in capsys.readouterr().err


@pytest.mark.skipif(shutil.which("tar") is None, reason="needs GNU tar")
@pytest.mark.parametrize("kind", ["v7", "oldgnu", "gnu", "ustar", "posix"])
def test_archives_of_gnu_tar_with_sparse_files_folders_and_links(kind, tmp_path):
    folder = tmp_path / "files"
    folder.mkdir()
    for name, content in numbered(0).items():
        (folder / name).write_bytes(content)
    with (folder / "001.png").open("wb") as sparse:  # preferred to nothing, and never read: it is sparse
        for place in range(0, 40 << 20, 1 << 20):
            sparse.seek(place)
            sparse.write(b"x" * 4096)
    (folder / "002.webp").symlink_to("002.jpg")
    os.link(folder / "000.jpg", folder / "003.jpg")
    (folder / "folder.jpg").mkdir()
    options = [] if kind in ("v7", "ustar") else ["--sparse"]
    subprocess.run(
        ["tar", "-cf", tmp_path / "x.tar", f"--format={kind}", *options, "--sort=name", "."], cwd=folder, check=True
    )
    source = opened(tmp_path / "x.tar")
    expected = [(numbered(0)[f"{n:03d}.jpg"], (f"caption {n} of shard 0",)) for n in range(3)]
    assert [outcome(source, index) for index in range(len(source))] == expected


def test_extended_headers_for_big_and_odd_members(tmp_path):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for name in ("1.jpg", "1.txt"):
            info = tarfile.TarInfo("wrong.bin")
            info.size = 3
            info.pax_headers = {"path": name, "size": "3"}
            archive.addfile(info, io.BytesIO(b"abc"))
    block = bytearray(path.read_bytes())
    place = block.index(b"wrong.bin") + 124  # in base 256, as sizes of 8 GiB and more are written
    block[place : place + 12] = bytes([128]) + (3).to_bytes(11, "big")
    header = block[place - 124 : place + 388]
    header[148:156] = b" " * 8
    block[place + 24 : place + 32] = b"%06o\0 " % sum(header)
    path.write_bytes(block)
    assert outcome(opened(path), 0) == (b"abc", ("abc",))


# --- archives that are cut


def test_every_cut_is_noticed_and_never_gives_wrong_bytes(tmp_path, capsys):
    whole = write_tar(tmp_path / "whole.tar", numbered(0, 4))
    content, right = whole.read_bytes(), [outcome(opened(whole), index) for index in range(4)]
    assert capsys.readouterr().err.count("\n") == 1  # the first pass is said, and nothing is wrong
    with tarfile.open(whole) as archive:
        ends = [member.offset_data + member.size for member in archive if member.name.endswith(".txt")]
        starts = [member.offset_data for member in archive if member.name.endswith(".jpg")]
        picture_ends = [member.offset_data + member.size for member in archive if member.name.endswith(".jpg")]
        captions_start = [member.offset_data for member in archive if member.name.endswith(".txt")]
    data_starts, data_ends = starts + captions_start, picture_ends + ends
    last = -(-ends[-1] // 512) * 512
    path, cuts = tmp_path / "cut.tar", range(captions_start[0], last + TWO_ZERO_BLOCKS + 1)
    for size in {*cuts[::100], *cuts[::512], *cuts[-3:]}:
        path.write_bytes(content[:size])
        source = opened(path)
        said = capsys.readouterr().err
        assert ("cut.tar: it ends" in said) == (size < last + TWO_ZERO_BLOCKS), size
        inside = any(start <= size < end for start, end in zip(data_starts, data_ends, strict=True))
        assert ("inside of a member" in said) == inside, size
        assert len(source) == sum(start <= size for start in starts), size
        for index in range(len(source)):
            if size < picture_ends[index] or captions_start[index] <= size < ends[index]:
                expected = "truncated_shard"
            elif size < captions_start[index]:
                expected = (right[index][0], ())
            else:
                expected = right[index]
            assert outcome(source, index) == expected, (size, index)


@pytest.mark.parametrize("claimed, reason", [(2**29, "truncated_shard"), (2**40, "too_large")])
def test_what_a_cut_shard_claims_to_hold_is_not_looked_for(claimed, reason, tmp_path, monkeypatch):
    info = tarfile.TarInfo("1.jpg")
    info.size = claimed
    path = write_tar(tmp_path / "x.tar", {"1.txt": b"x"})
    path.write_bytes(path.read_bytes()[:1024] + info.tobuf(tarfile.GNU_FORMAT) + b"y")
    source = opened(path)
    sizes = []
    read = os.pread
    monkeypatch.setattr(os, "pread", lambda file, size, place: (sizes.append(size), read(file, size, place))[1])
    assert problem_of(source).reason == reason
    assert sizes == [1]  # the caption


def test_what_is_lost_is_said_with_the_shard_and_the_counts(tmp_path, capsys):
    write_set(tmp_path / "set", 3, 5)
    (tmp_path / "set" / "sizes.json").write_text(json.dumps({f"000{n}.tar": 5 for n in range(3)}))
    cut = tmp_path / "set" / "0001.tar"
    with tarfile.open(cut) as archive:
        boundary = archive.getmember("003.jpg").offset
    cut.write_bytes(cut.read_bytes()[:boundary])
    for _ in range(2):  # also when the index was kept
        assert len(opened(tmp_path / "set")) == 13
        (said,) = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
        assert "0001.tar" in said and "3 samples found" in said and "counts 5" in said and "2 are lost" in said
    cut.write_bytes(cut.read_bytes() + bytes(512))
    (tmp_path / "set" / "sizes.json").write_text("[" * 100_000)
    assert len(opened(tmp_path / "set")) == 13
    said = capsys.readouterr().err
    assert "one block of zeros" in said and "are lost" not in said and "sizes.json cannot be read" in said


def test_an_empty_shard_among_others_and_what_is_no_archive(tmp_path, capsys):
    write_set(tmp_path / "set", 2)
    (tmp_path / "set" / "0002.tar").write_bytes(b"")
    assert len(opened(tmp_path / "set" / "*.tar")) == 6
    assert "0002.tar: it ends without" in capsys.readouterr().err
    (tmp_path / "set" / "0003.tar").write_bytes(b"<!doctype html>" * 100)
    with pytest.raises(DataError, match=r"0003\.tar: not a tar archive"):
        opened(tmp_path / "set" / "*.tar")
    (tmp_path / "set" / "0003.tar").write_bytes(gzip.compress(random.Random(0).randbytes(5000)))
    with pytest.raises(ConfigError, match=r"0003\.tar: the shard is compressed"):
        opened(tmp_path / "set" / "*.tar")
    with pytest.raises(DataError, match="hold no samples"):
        opened(tmp_path / "set" / "0002.tar")


def test_garbage_in_headers_ends_a_shard_and_never_the_program(tmp_path, capsys):
    content = write_tar(tmp_path / "whole.tar", numbered(0, 4), "pax").read_bytes()
    draw = random.Random(0)
    for _ in range(150):
        damaged = bytearray(content)
        for _ in range(draw.randint(1, 20)):
            damaged[draw.randrange(512, len(content))] = draw.randrange(256)
        (tmp_path / "x.tar").write_bytes(damaged)
        try:
            source = opened(tmp_path / "x.tar")
        except ConfigError as error:
            assert "has none of the usual .txt, .caption members" in str(error)  # the first caption was already hit
            continue
        assert 1 <= len(source) <= 8
        for index in range(len(source)):
            outcome(source, index)


# --- the index


@pytest.fixture
def passes(monkeypatch) -> list[Path]:
    """Return the shards whose headers were gone through."""
    gone_through = []
    build = tar_index.build_index
    monkeypatch.setattr(tar_index, "build_index", lambda path: (gone_through.append(path), build(path))[1])
    return gone_through


def test_a_shard_is_gone_through_once_and_again_when_it_has_changed(tmp_path, passes):
    folder = write_set(tmp_path / "set", 3)
    first = captions_of(opened(folder))
    assert captions_of(opened(folder)) == first and len(passes) == 3
    os.utime(folder / "0001.tar", ns=(1, 1))
    assert captions_of(opened(folder)) == first and passes[3:] == [folder / "0001.tar"]
    replaced = write_tar(tmp_path / "new.tar", dict(reversed(numbered(7).items())))
    assert replaced.stat().st_size == (folder / "0002.tar").stat().st_size
    replaced.replace(folder / "0002.tar")
    assert captions_of(opened(folder))[6:] == [(f"caption {n} of shard 7",) for n in (2, 1, 0)]
    assert passes[4:] == [folder / "0002.tar"]
    names = sorted(entry.name for entry in folder.iterdir())
    assert names == sorted(f"000{n}.tar{end}" for n in range(3) for end in ("", tar_index.SIDE_FILE_SUFFIX))


def test_damaged_and_older_side_files_are_replaced(tmp_path, passes):
    path = write_tar(tmp_path / "x.tar", numbered(0))
    right = captions_of(opened(path))
    side_file = tar_index.side_files(path)[0]
    good = side_file.read_bytes()
    older = good.replace(b'"version": %d' % tar_index.VERSION, b'"version": 0')
    damaged = [good[:-1], good[:20], b"", older, good[:-9] + b"x" * 9, good[:60] + b"[" * 100_000]
    for number, content in enumerate(damaged, start=2):
        side_file.write_bytes(content)
        assert captions_of(opened(path)) == right and len(passes) == number
        assert side_file.read_bytes() == good


def test_indexes_that_are_for_one_command_alone_leave_no_trace(tmp_path, passes):
    folder = write_set(tmp_path / "set", 2)
    options = SourceOptions(str(folder), captions={"txt": 1.0}, index_folder=tmp_path / "own")
    before = sorted((path.name, path.stat().st_mtime_ns) for path in (folder, *folder.iterdir()))
    for _ in range(2):
        assert len(open_shards(str(folder), find_shards(str(folder)), options)) == 6
    assert len(passes) == 2 and len(list((tmp_path / "own").iterdir())) == 2
    assert sorted((path.name, path.stat().st_mtime_ns) for path in (folder, *folder.iterdir())) == before
    assert not (tmp_path / "cache").exists()
    opened(folder)  # a training keeps them, and then they are used
    assert len(passes) == 4
    assert (
        len(open_shards(str(folder), find_shards(str(folder)), replace(options, index_folder=tmp_path / "other"))) == 6
    )
    assert len(passes) == 4 and not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    "content", [b"\n", b"[]\n", b"[" * 100_000, b"my thesis", b'{"format": "mine"}', "pickle", "pipe"]
)
def test_files_in_the_place_of_an_index_that_are_none_stay_as_they_are(content, tmp_path, passes, capsys):
    path = write_tar(tmp_path / "x.tar", numbered(0))
    side_file, cached = tar_index.side_files(path)
    if content == "pipe":
        os.mkfifo(side_file)
    else:
        content = pickle.dumps(Canary(tmp_path / "canary")) if content == "pickle" else content
        side_file.write_bytes(content)
    assert len(captions_of(opened(path))) == len(captions_of(opened(path))) == 3
    assert len(passes) == 1 and cached.is_file()
    assert side_file.is_fifo() if content == "pipe" else side_file.read_bytes() == content
    assert not (tmp_path / "canary").exists()
    said = capsys.readouterr().err
    assert said.count(f"{side_file} is no index and is left as it is") == 1


def block_side_files(folder: Path) -> None:
    """Make it impossible to keep indexes beside the shards, also for root, who may write into any folder."""
    for path in sorted(folder.glob("*.tar")):
        tar_index.side_files(path)[0].mkdir()


def test_indexes_of_folders_that_take_no_files_are_kept_in_the_cache(tmp_path, passes):
    folder = write_set(tmp_path / "set", 2)
    block_side_files(folder)
    first = captions_of(opened(folder / "*.tar"))
    assert captions_of(opened(folder / "*.tar")) == first and len(passes) == 2
    assert len(list((tmp_path / "cache" / "accel_clip" / "shards").iterdir())) == 2
    assert sorted(entry.name for entry in folder.iterdir() if entry.is_file()) == ["0000.tar", "0001.tar"]


def test_without_any_place_for_indexes_every_start_says_so(tmp_path, passes, monkeypatch, capsys):
    folder = write_set(tmp_path / "set", 2)
    block_side_files(folder)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert len(opened(folder / "*.tar")) == len(opened(folder / "*.tar")) == 6
    assert len(passes) == 4
    assert capsys.readouterr().err.count("the indexes of 2 shards could not be kept") == 2


def test_processes_share_the_first_pass_and_see_one_order(tmp_path, passes, monkeypatch):
    folder = write_set(tmp_path / "set", 4)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert captions_of(opened(folder)) == [(f"caption {n} of shard {shard}",) for shard in range(4) for n in range(3)]
    assert [path.name for path in passes] == ["0002.tar", "0003.tar", "0000.tar", "0001.tar"]


def test_many_that_index_at_once_leave_whole_indexes(tmp_path, passes):
    folder = write_set(tmp_path / "set", 6, 20)
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda _: captions_of(opened(folder)), range(6)))
    assert all(texts == found[0] for texts in found) and len(found[0]) == 120
    done = len(passes)
    assert captions_of(opened(folder)) == found[0] and len(passes) == done
    assert len(list(folder.iterdir())) == 12


# --- reading


class Canary:
    """An object whose pickle leaves a file behind when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_members_of_other_kinds_are_never_read(tmp_path, monkeypatch):
    canary = tmp_path / "canary"
    extensions = ("pyd", "pickle", "pkl", "pth", "pt", "npy", "../../x.py")
    path = write_tar(
        tmp_path / "x.tar", numbered(0) | {f"000.{end}": pickle.dumps(Canary(canary)) for end in extensions}
    )
    read, places = shard_reader.read_fully, []
    monkeypatch.setattr(
        shard_reader, "read_fully", lambda file, offset, size: (places.append(offset), read(file, offset, size))[1]
    )
    source = opened(path)
    assert captions_of(source) == [(f"caption {n} of shard 0",) for n in range(3)]
    with tarfile.open(path) as archive:
        allowed = {member.offset_data for member in archive if member.name.endswith((".jpg", ".txt"))}
    assert set(places) == allowed
    assert not canary.exists() and {entry.name for entry in tmp_path.iterdir()} == {"x.tar", "x.tar.accel-clip-index"}


def test_threads_and_workers_read_the_right_bytes_of_more_shards_than_are_kept_open(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_reader, "MOST_OPEN_FILES", 4)
    source = opened(write_set(tmp_path / "set", 20, 10))
    assert len(source) == 200
    right = {index: f"picture {index % 10} of shard {index // 10}".encode() * 40 for index in range(200)}
    order = [random.Random(0).randrange(200) for _ in range(3000)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda index: source[index].image, order)) == [right[index] for index in order]
    loader = DataLoader(source, sampler=order[:400], num_workers=2, batch_size=40, collate_fn=list)
    assert [pair.image for batch in loader for pair in batch] == [right[index] for index in order[:400]]
    again = pickle.loads(pickle.dumps(source))
    assert [again[index].image for index in order[:50]] == [right[index] for index in order[:50]]


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc")
def test_few_files_are_kept_open(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_reader, "MOST_OPEN_FILES", 4)
    source = opened(write_set(tmp_path / "set", 20, 1))
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    assert captions_of(source) == [(f"caption 0 of shard {shard}",) for shard in range(20)]
    assert len(os.listdir("/proc/self/fd")) == before + 4
    del source
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_sample_costs_few_bytes_and_no_object(tmp_path):
    small = pickle.dumps(opened(write_tar(tmp_path / "a.tar", numbered(0, 10))))
    large = pickle.dumps(opened(write_tar(tmp_path / "b.tar", numbered(0, 1010))))
    assert (len(large) - len(small)) / 1000 < 80


def test_a_shard_that_vanishes_or_shrinks_costs_its_samples_alone(tmp_path):
    folder = write_set(tmp_path / "set", 3)
    source = opened(folder)
    right = [outcome(source, index) for index in range(3)]
    (folder / "0000.tar").unlink()
    assert [outcome(source, index) for index in range(3)] == right  # still open
    (folder / "0001.tar").rename(tmp_path / "0001.tar")
    assert [problem_of(source, index).reason for index in (3, 4, 5)] == ["missing_file"] * 3
    (tmp_path / "0001.tar").rename(folder / "0001.tar")
    assert source[3].captions == ("caption 0 of shard 1",)  # and is back
    assert source[6].captions == ("caption 0 of shard 2",)
    with (folder / "0002.tar").open("r+b") as file:
        file.truncate(2100)
    assert [outcome(source, index) for index in (7, 8)] == ["truncated_shard"] * 2
    assert problem_of(source, 7).path == str(folder / "0002.tar")
    fresh = pickle.loads(pickle.dumps(source))
    write_tar(folder / "0001.tar", dict(reversed(numbered(1).items())))
    assert "changed" in problem_of(fresh, 3).detail  # same size, other places


def test_reads_that_fail_for_a_moment_are_tried_again(tmp_path, monkeypatch):
    source = opened(write_tar(tmp_path / "x.tar", numbered(0)))
    read, failures = os.pread, [OSError(5, "Input/output error"), OSError(116, "Stale file handle"), b""]

    def failing(*place):
        if not failures:
            return read(*place)
        failure = failures.pop(0)
        if isinstance(failure, OSError):
            raise failure
        return failure

    monkeypatch.setattr(os, "pread", failing)
    open_file, num_opened = os.open, []
    monkeypatch.setattr(os, "open", lambda *arguments: (num_opened.append(1), open_file(*arguments))[1])
    assert source[0].captions == ("caption 0 of shard 0",) and not failures
    assert len(num_opened) == 4  # once, and anew after each failure
    failures[:] = [OSError(5, "Input/output error")] * 4
    problem = problem_of(source)
    assert problem.reason == "missing_file" and "Input/output error" in problem.detail and not failures
    failures[:] = [OSError(5, "Input/output error")]
    assert problem_of(source).reason == "missing_file"  # a shard that has failed gets one attempt
    assert source[0].captions and not failures
    failures[:] = [OSError(5, "Input/output error")]
    assert source[0].captions and not failures  # and several again once it has been read


# --- what makes a sample


@pytest.mark.parametrize(
    "members, settings, expected",
    [
        ({"jpg": b"", "txt": b" one\r\n two "}, {}, ("one", "two")),
        ({"jpg": b"", "txt": b" one\r\n two "}, {"caption_lines": False}, ("one\r\n two",)),
        ({"jpg": b"", "txt": b"one\n\ntwo"}, {}, ("one\n\ntwo",)),
        ({"jpg": b"", "txt": b"one\n\ntwo"}, {"caption_lines": True}, ("one", "two")),
        ({"jpg": b"", "caption": b"one"}, {}, ("one",)),
        ({"jpg": b"", "txt": b'["one", "two"]'}, {}, ("one", "two")),
        ({"jpg": b"", "txt": b'{"a": 1}'}, {}, "no_caption"),
        (
            {"jpg": b"", "txt": b"x", "syn.json": b'{"syn_text": ["one", "two"]}'},
            {"caption_key": ["syn.json"]},
            ("one", "two"),
        ),
        ({"jpg": b"", "txt": b"x", "syn.json": b'{"a": 1, "b": 2}'}, {"caption_key": ["syn.json"]}, "no_caption"),
        ({"jpg": b"", "json": b'{"caption": {"en": "x"}}'}, {}, "no_caption"),
        ({"jpg": b"", "txt": "\ufeff青蛙".encode()}, {}, ("青蛙",)),
        ({"jpg": b"", "txt": "青蛙".encode("gb18030")}, {"encoding": "gb18030"}, ("青蛙",)),
        ({"jpg": b"", "txt": "青蛙".encode()}, {"encoding": "gb18030"}, ("青蛙",)),
        ({"jpg": b"", "txt": "青蛙".encode("gb18030")}, {}, "caption_encoding"),
        ({"jpg": b"", "txt": b" \n"}, {}, ()),
        ({"jpg": b"", "txt": b"x" * 65536}, {}, ("x" * 65536,)),
        ({"jpg": b"", "txt": b"x" * 65537}, {}, "caption_too_large"),
        ({"jpg": b"", "txt": b"text", "json": b'{"caption": "json"}'}, {}, ("text",)),
        ({"jpg": b"", "json": b'{"Caption": "json", "title": "t"}'}, {}, ("json",)),
        ({"jpg": b"", "json": b'{"captions": ["a", " ", "b", null, {"c": 1}]}'}, {}, ("a", "b")),
        ({"jpg": b"", "json": '{"text": "\\ud800青"}'.encode()}, {}, ("?青",)),
        ({"jpg": b"", "txt": b"t", "json": b'{"alt": "a", "zh": "z"}'}, {"caption_key": ["zh", "alt"]}, ("z", "a")),
        ({"jpg": b"", "txt": b"t", "json": b'{"alt": "a"}'}, {"caption_key": ["txt", "alt"]}, ("t", "a")),
        ({"jpg": b"", "txt": b"t", "en.txt": b"english"}, {"caption_key": ["en.txt"]}, ("english",)),
        ({"jpg": b"", "JSON": b"[" * 60000}, {}, "caption_encoding"),
        ({"jpg": b"", "json": b'{"caption": '}, {}, "caption_encoding"),
        ({"jpg": b"", "json": b'{"caption": "' + b"x" * 65536 + b'"}'}, {}, "caption_too_large"),
        ({"json": b"{}", "jpg": b"", "txt": b"1" * 5000}, {}, ("1" * 5000,)),
        ({"json": b'{"caption": ' + b"1" * 5000 + b"}", "jpg": b""}, {}, "caption_encoding"),
        ({"jpg": b"", "json": b'["caption"]', "txt": b""}, {}, ()),
    ],
)
def test_captions(members, settings, expected, tmp_path):
    found = outcome(opened(one_sample(tmp_path, members), **settings), 0)
    assert (found if isinstance(found, str) else found[1]) == expected


def test_of_several_pictures_the_named_one_or_the_first_by_ending(tmp_path):
    path = one_sample(tmp_path, {"WEBP": b"w", "seg.png": b"s", "png": b"p", "Jpg": b"j", "txt": b"x"})
    assert opened(path)[0].image == b"j"
    for key, content in (("png", b"p"), (".webp", b"w"), ("seg.png", b"s")):
        assert opened(path, image_key=key)[0].image == content
    item = SourceConfig(str(path), image_key="webp")
    assert open_source(item, DataConfig(image_key="png"))[0].image == b"w"


def test_names_that_no_member_has_are_config_errors_that_list_those_there_are(tmp_path):
    path = one_sample(tmp_path, {"jpg": b"", "json": b'{"alt_text": "x"}', "cap": b"x"})
    for settings, pattern in (
        ({"image_key": "jpgg"}, r"data\.image_key: .* '\.jpgg', did you mean 'jpg'\? It has: jpg, json, cap"),
        ({}, r"data\.caption_key: .* none of the usual \.txt, \.caption members .*keys in \.json: alt_text"),
        ({"caption_key": ["alt_txt"]}, r"data\.caption_key: .*'alt_txt', did you mean 'alt_text'\?"),
        ({"caption_key": ["json"]}, r"data\.caption_key: .*'json'"),
    ):
        with pytest.raises(ConfigError, match=pattern):
            opened(path, **settings)
    assert captions_of(opened(path, caption_key=["cap"])) == [("x",)]
    with pytest.raises(ConfigError, match=r"data\.caption_key: .*\.txt, \.caption members .*Its members: jpg$"):
        opened(one_sample(tmp_path, {"jpg": b""}))
    with pytest.raises(ConfigError, match=r"data\.image_key: .*bmp, .*gif.*mp3, txt"):
        opened(one_sample(tmp_path, {"mp3": b"", "txt": b"x"}))
    with pytest.raises(ConfigError, match=r"data\.encoding: 'klingon'"):
        opened(path, encoding="klingon")


@pytest.mark.parametrize(
    "members, key, expected",
    [
        ({"jpg": b"", "cls": b"frog\n", "txt": b"a frog"}, None, "frog"),
        ({"jpg": b"", "label": b"owl"}, None, "owl"),
        ({"jpg": b"", "json": b'{"label": 3}'}, None, "3"),
        ({"jpg": b"", "json": b'{"kind": "bird", "label": "x"}'}, "kind", "bird"),
        ({"jpg": b"", "kind": b"bird", "cls": b"x"}, "kind", "bird"),
        ({"jpg": b"", "cls": b""}, None, None),
    ],
)
def test_labels(members, key, expected, tmp_path):
    pair = open_labelled(str(one_sample(tmp_path, members)), DataConfig(), key)[0]
    assert (pair.label, pair.captions) == (expected, ())


def test_labels_that_are_not_there(tmp_path):
    with pytest.raises(ConfigError, match=r"eval\.label_key: .*\.cls, \.label members"):
        open_labelled(str(one_sample(tmp_path, {"jpg": b"", "txt": b"x"})), DataConfig())


def test_one_key_in_two_shards_is_two_samples(tmp_path):
    write_tar(tmp_path / "0.tar", {"1.jpg": b"a", "1.txt": b"a", "2.jpg": b"b"})
    write_tar(tmp_path / "1.tar", {"2.txt": b"b", "2.png": b"c"})
    source = opened(tmp_path / "{0,1}.tar")
    assert [outcome(source, index) for index in range(3)] == [(b"a", ("a",)), (b"b", ()), (b"c", ("b",))]
    assert len({source.key(index) for index in range(3)}) == 3


# --- which shards


def test_samples_follow_the_order_in_which_shards_are_written(tmp_path):
    folder = write_set(tmp_path / "set", 4)
    source = opened(f"{folder}/{{0002,0000}}.tar")
    assert captions_of(source) == [(f"caption {n} of shard {shard}",) for shard in (2, 0) for n in range(3)]
    assert [source.key(index) for index in (0, 5)] == ["0002.tar/000", "0000.tar/002"]
    assert source.identity(5) == f"{folder}/0000.tar/002"
    every = [captions_of(opened(folder / words)) for words in ("{0000..0003}.tar", "*.tar", "000[0-3].tar", ".")]
    assert every[0] == every[1] == every[2] == every[3] and len(every[0]) == 12
    several = open_sources([str(folder / "0003.tar"), f"{folder}/000{{0..1}}.tar"], DataConfig())
    assert isinstance(several, Concatenated) and captions_of(several) == every[0][9:] + every[0][:6]
    for index in (-1, 6):
        with pytest.raises(IndexError):
            source[index]


def test_keys_do_not_move_with_the_data_and_tell_shards_of_one_name_apart(tmp_path, monkeypatch):
    write_set(tmp_path / "here" / "a", 1)
    write_set(tmp_path / "here" / "b", 1)
    both = opened(f"{tmp_path}/here/{{a,b}}/0000.tar")
    keys = [both.key(index) for index in range(6)]
    assert keys[0] == "a/0000.tar/000" and len(set(keys)) == 6
    (tmp_path / "here").rename(tmp_path / "there")
    monkeypatch.chdir(tmp_path / "there")
    moved = opened("{a,b}/0000.tar")
    assert [moved.key(index) for index in range(6)] == keys
    assert moved.identity(0) == str(tmp_path / "there" / "a" / "0000.tar") + "/000"


@pytest.mark.parametrize(
    "pattern",
    [
        *(
            "x{0..3}.tar",
            "{0008..0011}.tar",
            "{8..11}",
            "{09..11}-{a..c}",
            "{3..1}",
            "{0..10..5}",
            "{c..a}",
            "a{b,c}d{e,f}",
        ),
        *(
            "{a,{1..3},c{x,y}}.tar",
            "{a}.tar",
            "{}.tar",
            "a{b",
            "a}b",
            "{a{b,c}}",
            "{,x}y",
            "{-1..1}",
            "{a..3}",
            "{1,2}{3",
        ),
    ],
)
@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_braces_mean_what_they_mean_to_bash(pattern):
    shell = subprocess.run(["bash", "-c", f"printf '%s\\n' {pattern}"], capture_output=True, text=True, check=True)
    assert list(expand_braces(pattern)) == shell.stdout.splitlines()


def test_all_missing_shards_are_named_at_once(tmp_path):
    folder = write_set(tmp_path / "set", 2)
    with pytest.raises(DataError, match=r"data\.val: 3 of the 5 shards .*0002\.tar.*0003\.tar.*0004\.tar"):
        locate(f"{folder}/{{0000..0004}}.tar", "data.val")
    with pytest.raises(DataError, match=r"data\.train: no file fits '.*x\*\.tar'"):
        locate(f"{folder}/x*.tar")
    with pytest.raises(ConfigError, match="more than 1,000,000"):
        locate("{0..999999999999}.tar")
    code = "import sys\nfrom accel_clip.data.sources.resolve import locate\nfrom accel_clip.faults import DataError\n"
    code += f"try: locate('{folder}/{{0..9}}.tar')\nexcept DataError: print({{'torch', 'numpy'}} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"


def test_which_words_and_folders_mean_shards(tmp_path):
    folder = write_set(tmp_path / "set", 2)
    for name in ("sizes.json", "0000_stats.json", "0000.parquet", ".hidden"):
        (folder / name).write_text("{}")
    assert locate(str(folder)).kind == "shards" and len(opened(folder)) == 6
    (folder / "metadata.parquet").write_text("")
    assert locate(str(folder)).kind == "folder"
    braces = write_set(tmp_path / "odd{a,b}[0]", 1)
    assert len(opened(braces / "0000.tar")) == 3
    assert locate(str(tmp_path)).kind == "folder"
    for name in ("x.tar.gz", "{0..1}.TAR.zst", "x.tgz"):
        with pytest.raises(ConfigError, match=r"compressed.*unpack"):
            locate(str(tmp_path / name))


@pytest.mark.parametrize(
    "words", ["pipe:touch canary", " PIPE: touch canary", "touch canary |", "|touch canary", "$(touch canary).tar"]
)
def test_commands_are_refused(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"data\.train: .* would start a command, and data never does"):
        locate(words)
    assert not Path("canary").exists()


@pytest.mark.parametrize(
    "words",
    ["s3://bucket/x.tar", "gs://bucket/*.tar", "https://example.org/x.csv", "ftp://example.org/x.tar", "http://["],
)
def test_addresses_of_anything_but_shards_by_http_are_refused(words):
    with pytest.raises(ConfigError, match=r"data\.val: .* is an address, and only tar shards are read from one"):
        locate(words, "data.val")


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ("https://example.org/*.tar", "no server says which files fit"),
        ("https://example.org/00?.tar", "no server says which files fit"),
        ("https://example.org/{0..3}.tar.gz", "is compressed"),
        ("https:///{0..3}.tar", "names no host"),
        ("https://example.org:port/{0..3}.tar", "is no address"),
    ],
)
def test_addresses_that_name_no_shards_say_why(words, problem):
    with pytest.raises(ConfigError, match=rf"data\.val: .*{problem}"):
        locate(words, "data.val")


def test_addresses_of_shards_are_located_without_asking_the_server():
    assert locate("https://example.invalid/{0000..0041}.tar").kind == "remote"
    assert locate("HTTP://example.invalid/get?file={0..3}.tar").kind == "remote"
    assert find_addresses("http://h/{a,b}/{8..9}.tar?x=1") == [
        f"http://h/{k}/{n}.tar?x=1" for k in "ab" for n in (8, 9)
    ]
