"""Folders and tar shards of odd files of every kind, generated at random and read beside other readers.

Those are `os.walk` or `tarfile`, Pillow, and the rules as the guide has them. Always: every picture is a pair that is
used or one that is counted with a reason, texts and members of shards that make none are said, and what is used has the
pixels and the captions that stand under its name.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from hypothesis import strategies as st
from PIL import Image

from accel_clip.config import DataConfig
from accel_clip.data.bad_samples import REASONS, UnusableSample
from accel_clip.data.overlap import num_shown_in_training
from accel_clip.data.pictures.decode import decode_picture
from accel_clip.data.sources.base import Pair, Source
from accel_clip.data.sources.folders.caption_files import CaptionFiles
from accel_clip.data.sources.resolve import open_item, open_source
from accel_clip.data.sources.shards.local import TarShards
from accel_clip.data.sources.shards.remote import RemoteShards
from helpers.generated import check, quick_and_slow
from helpers.pictures import numbered_picture
from helpers.web import served

Outcome = tuple[bytes, tuple[str, ...]] | None
"""pixels and captions; None for what is counted"""

PICTURES = ("jpeg", "jpg", "png", "webp")  # of two with one name in a shard, the first by the alphabet counts
TEXTS = ("txt", "caption")
NUM_PICTURES = 5
WHOLE = tuple(numbered_picture(number) for number in range(NUM_PICTURES))
BROKEN = (b"", WHOLE[0][:-40], WHOLE[1][:20], b"<html>not found</html>", b"version https://git-lfs\n", bytes(600))
GOOD = "anchor"  # a pair that is always there, without which a folder may be one of classes


@dataclass(frozen=True)
class File:
    """A file of a folder, or a member of a shard."""

    folder: str
    stem: str
    ending: str
    content: bytes

    @property
    def path(self) -> str:
        return f"{self.folder}{self.stem}{self.ending}"


# --- what is generated

stems = st.one_of(
    st.text(st.sampled_from("ab1_ .\u00e9\u732b"), min_size=1, max_size=4),
    st.sampled_from(["St. Peter", "v1", "v1.2_front", "v1.back", "v2", "v2.back", "2020.01.05", "a.jpg", "b.txt"]),
    st.sampled_from(
        ["data:a", "a\\b", "100%", "%41", "#1", "[1] a", "{a}", "b'a'", "<a>", "e\u0301", "a\nb", "-", "~"]
    ),
)
hidden_stems = st.sampled_from([".DS", "._a", ".a.b"])
folders = st.sampled_from(["", "", "", "deep/er/", "x.y/", "Caf\u00e9 d'\u00e9t\u00e9/", "a.png/", "10_toy/"])
hidden_folders = st.sampled_from([".hidden/", "deep/.er/"])

lines = st.text(st.sampled_from("abc ,.'\"\u00e9\u732b\t"), max_size=8)
breaks = st.sampled_from(["\n", "\n", "\r\n", "\n\n", "\n \n"])
paragraphs = st.lists(st.tuples(lines, breaks), max_size=4).map(lambda parts: "".join(map("".join, parts)))
texts = st.one_of(lines, paragraphs)
encoded_texts = st.builds(str.encode, texts, st.sampled_from(["utf-8", "utf-8", "utf-8", "utf-8-sig", "utf-16"]))
undecodable = st.just(b"caf\xff\x81")
records = st.one_of(
    texts.map(lambda text: {"caption": text}),
    st.lists(lines, max_size=3).map(lambda found: {"other": 1, "Caption": found}),
    st.sampled_from([{"caption": None}, {"other": "a"}, [], 7]),
).map(lambda value: json.dumps(value).encode())
broken_records = st.sampled_from([b"", b'{"caption": "a', b'{"caption": "\xff"}'])


def cased(*endings: str) -> st.SearchStrategy[str]:
    return st.sampled_from([f".{case(ending)}" for ending in endings for case in (str, str, str.upper, str.title)])


pictures = st.one_of(st.sampled_from(WHOLE), st.sampled_from(WHOLE), st.sampled_from(BROKEN))
caption_files = st.one_of(encoded_texts, encoded_texts, encoded_texts, undecodable)
strays = st.sampled_from(["", ".", ".svg", ".csv", ".npz", ".cls", ".md", ".png~", ".tar.gz"])
kinds = st.one_of(
    st.tuples(cased(*PICTURES), pictures),
    st.tuples(cased(*PICTURES), pictures),
    st.tuples(cased(*TEXTS), caption_files),
    st.tuples(cased(*TEXTS), caption_files),
    st.tuples(st.tuples(cased(*PICTURES), cased(*TEXTS)).map("".join), caption_files),
    st.tuples(cased("json"), st.one_of(records, records, broken_records)),
    st.tuples(strays, st.sampled_from([b"", b"stray"])),
)
anchors = st.sampled_from(
    [(".txt", b"a good one"), (".caption", b"a good one"), (".json", b'{"caption": "a good one"}')]
)


@st.composite
def sets(draw: st.DrawFn) -> list[File]:
    """Return files of few names, so that many of them share one."""
    names = draw(st.lists(st.tuples(folders, stems), min_size=1, max_size=5))
    names += draw(st.lists(st.one_of(st.tuples(hidden_folders, stems), st.tuples(folders, hidden_stems)), max_size=1))
    found = draw(st.lists(st.builds(lambda name, kind: File(*name, *kind), st.sampled_from(names), kinds), max_size=16))
    anchor = [File("", GOOD, ".png", WHOLE[0]), File("", GOOD, *draw(anchors))]
    return draw(st.permutations([*found, *anchor]))


# --- what stands there, by other readers


def pixels_of(content: bytes) -> bytes | None:
    """Return what Pillow decodes, None where it does not."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            return image.convert("RGB").tobytes()
    except (OSError, SyntaxError):
        return None


def captions_of(content: bytes) -> tuple[str, ...]:
    """Return the lines of a text, or all of one with a blank line in it; none where it does not decode."""
    is_wide = content.startswith((b"\xff\xfe", b"\xfe\xff"))
    try:
        text = content.decode("utf-16" if is_wide else "utf-8-sig").strip()
    except UnicodeDecodeError:
        return ()
    has_blank_line = re.search(r"\n\s*\n", text) is not None
    return tuple(each.strip() for each in ([text] if has_blank_line else re.split(r"\r?\n", text)) if each.strip())


def captions_of_record(content: bytes) -> tuple[str, ...]:
    """Return what stands in a JSON object as its caption."""
    try:
        record = json.loads(content.decode())
    except ValueError:
        return ()
    found = (
        next((record[key] for key in record if key.lower() == "caption"), None) if isinstance(record, dict) else None
    )
    given = found if isinstance(found, list) else [found] if found else []
    return tuple(each.strip() for each in given if each.strip())


def pair_of(content: bytes | None, beside: Mapping[str, bytes]) -> Outcome:
    """Return the pair that a picture and the texts beside it, by their endings, make."""
    pixels = None if content is None else pixels_of(content)
    text = next((beside[ending] for ending in TEXTS if ending in beside), None)
    captions = captions_of_record(beside.get("json", b"")) if text is None else captions_of(text)
    return (pixels, captions) if pixels is not None and captions else None


def outcome(fetch: Callable[[], Pair]) -> Outcome:
    """Return what training gets of a pair, None for what it counts."""
    try:
        pair = fetch()
        pixels = decode_picture(pair.image, 1e6).tobytes()
    except UnusableSample as problem:
        assert problem.reason in REASONS and problem.detail
        return None
    return (pixels, pair.captions) if pair.captions else None  # counted as no_caption when one is chosen


def outcomes(source: Source) -> list[Outcome]:
    return [outcome(lambda index=index: source[index]) for index in range(len(source))]  # type: ignore[misc]


# --- folders


def write_folder(folder: Path, files: Iterable[File]) -> None:
    """Write files; of what has the name of another, or of a folder (. and .. too), the first stays."""
    for file in files:
        path = folder / file.path
        if (
            file.path.rpartition("/")[2] not in ("", ".", "..")
            and not any(each.is_file() for each in path.parents)
            and not path.exists()
        ):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(file.content)


def walked(folder: Path) -> dict[str, bytes]:
    """Return the files that are not hidden, nor in hidden folders, by their paths from the folder."""
    found = {}
    for current, _, names in os.walk(folder):
        for name in names:
            path = Path(current, name)
            parts = path.relative_to(folder).parts
            if not any(part.startswith(".") for part in parts):
                found["/".join(parts)] = path.read_bytes()
    return found


def texts_beside(name: str, files: Iterable[str]) -> dict[str, str]:
    """Return the texts that are called as a picture is, its ending kept or not, by their endings in lower case."""
    found = {}
    for called in (name.rpartition(".")[0], name):  # the later, with the whole name, wins
        for other in sorted(files):
            stem, _, ending = other.rpartition(".")
            if stem == called and ending.lower() in (*TEXTS, "json"):
                found[ending.lower()] = other
    return found


def num_texts_said(said: str) -> int:
    """Return how many texts are said to be those of no picture."""
    found = re.search(r": (\d+) texts are not read, since ", said)
    return int(found[1]) if found else 0


@quick_and_slow(25, 800)
def test_folders(num_examples: int, tmp_path: Path, capsys) -> None:
    numbered = itertools.count()
    write_folder(tmp_path / "all", [File("", f"{number}.", "png", each) for number, each in enumerate(WHOLE)])
    write_folder(tmp_path / "all", [File("", f"{number}.", "txt", b"a") for number in range(NUM_PICTURES)])
    held_out = open_source(str(tmp_path / "all"), DataConfig())

    def try_one(files: list[File]) -> bool:
        folder = tmp_path / str(next(numbered))
        write_folder(folder, files)
        found = walked(folder)
        names = sorted(name for name in found if PurePosixPath(name).suffix.lower().removeprefix(".") in PICTURES)
        beside = [texts_beside(name, found) for name in names]
        capsys.readouterr()
        source = open_source(str(folder), DataConfig())
        said = capsys.readouterr().err
        assert isinstance(source, CaptionFiles)
        keys = [source.key(index) for index in range(len(source))]
        assert keys == names == list(source.keys())
        texts = [{ending: found[each] for ending, each in names_of.items()} for names_of in beside]
        assert outcomes(source) == [pair_of(found[name], each) for name, each in zip(names, texts, strict=True)]
        all_texts = {name for name in found if name.rpartition(".")[2].lower() in TEXTS}
        assert num_texts_said(said) == len(all_texts.difference(*(each.values() for each in beside)))
        assert [source.identity(index) for index in range(len(source))] == [f"{folder}/{name}" for name in names]
        assert num_shown_in_training(source, held_out) == len({found[name] for name in names} & set(WHOLE))
        return True

    check(sets(), num_examples, try_one)


# --- shards

FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
STRANGERS = (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE)
strangers = st.builds(
    lambda kind, name: (kind, File("", name, ".png", b"")),
    st.sampled_from([*STRANGERS, tarfile.REGTYPE]),
    st.sampled_from([GOOD, "v1", "a.b", "__meta__/a", "__meta__"]),
)
nameless = st.just((tarfile.REGTYPE, File("", "", "", b"nameless")))
dots = st.sampled_from(["", "", "", "./", "/", "../"])


def write_shard(path: Path, members: Iterable[tuple[bytes, File]], kind: int, before: str) -> None:
    with tarfile.open(path, "w", format=kind) as archive:
        for type_, file in members:
            info = tarfile.TarInfo(before + file.path if file.path else "")
            info.type, info.size = type_, len(file.content)
            if type_ in (tarfile.SYMTYPE, tarfile.LNKTYPE):
                info.linkname = "../etc/passwd"
            archive.addfile(info, io.BytesIO(file.content))


def by_tarfile(path: Path) -> list[tuple[str, str, bytes]]:
    """Return the key, the ending and the bytes of each regular member with a name, by the rule of last dots."""
    found = []
    with tarfile.open(path) as archive:
        for member in archive:
            if not member.isreg() or not member.name or re.match(r"__[^/]*__(/|$)", member.name):
                continue
            folder, slash, name = member.name.rpartition("/")
            stem, dot, ending = name.rpartition(".")
            has_ending = bool(dot) and not name.startswith(".")
            content = archive.extractfile(member).read()  # type: ignore[union-attr]
            found.append(
                (folder + slash + (stem if has_ending else name), ending.lower() if has_ending else "", content)
            )
    return found


def samples_of(members: Iterable[tuple[str, str, bytes]]) -> dict[str, dict[str, bytes]]:
    """Return what can be read of each key, by the endings; of two with one name the later."""
    found: dict[str, dict[str, bytes]] = {}
    for key, ending, content in members:
        found.setdefault(key, {})[ending] = content
    known = {
        key: {end: beside[end] for end in (*PICTURES, *TEXTS, "json") if end in beside} for key, beside in found.items()
    }
    return {key: beside for key, beside in known.items() if beside}


def are_apart(keys: Iterable[str]) -> bool:
    """Return whether no two names differ by words behind a dot alone, which may then be parts of endings."""
    firsts = []
    for key in set(keys):
        folder, slash, name = key.rpartition("/")
        firsts.append(folder + slash + name[:1] + name[1:].partition(".")[0])
    return len(firsts) == len(set(firsts))


def num_said(said: str, num_members: int) -> int:
    """Return how many members are said not to be read."""
    line = next((line for line in said.splitlines() if "these are not read" in line), None)
    if line is None:
        return 0
    found = re.search(r"of ([\d,]+) members these are not read: (.*)", line)
    assert found is not None and found[1] == f"{num_members:,}", line
    return sum(int(number) for number in re.findall(r"(?:^|, )(\d+) (?=\.|hidden|whose)", found[2]))


@quick_and_slow(25, 800)
def test_shards(num_examples: int, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    numbered = itertools.count()
    members = st.builds(
        lambda files, others: [*others[:1], *((tarfile.REGTYPE, file) for file in files), *others[1:]],
        sets(),
        st.lists(st.one_of(strangers, strangers, nameless), max_size=3),
    )

    def try_one(value: Any) -> bool:
        members, kind, before, in_order = value
        path = tmp_path / f"{next(numbered)}.tar"
        if in_order:
            members = sorted(members, key=lambda member: (member[1].folder, member[1].stem))
        write_shard(path, members, kind, before)
        listed = by_tarfile(path)
        samples = samples_of(listed)
        capsys.readouterr()
        source = open_source(str(path), DataConfig())
        said = capsys.readouterr().err
        assert isinstance(source, TarShards)
        keys = [source.key(index).removeprefix(f"{path.name}/") for index in range(len(source))]
        if are_apart(key for key, _, _ in listed):
            assert keys == list(samples)
        assert len(set(keys)) == len(keys) and set(keys) <= set(samples)
        assert [source.identity(index) for index in range(len(source))] == [f"{path}/{key}" for key in keys]
        found = outcomes(source)
        assert found == [pair_of(first_picture(samples[key]), samples[key]) for key in keys]
        num_read = sum(
            min(1, len(set(PICTURES) & set(samples[key]))) + len(set(samples[key]) - set(PICTURES)) for key in keys
        )
        assert num_read + num_said(said, len(listed)) == len(listed)
        if in_order and are_apart(key for key, _, _ in listed):
            assert usable(found) == usable(streamed(f"{address}/{path.name}"))
        return True

    shapes = st.tuples(members, st.sampled_from(FORMATS), dots, st.booleans())
    with served(tmp_path) as address:
        check(shapes, num_examples, try_one)


def first_picture(beside: Mapping[str, bytes]) -> bytes | None:
    return next((beside[ending] for ending in PICTURES if ending in beside), None)


def streamed(address: str) -> list[Outcome]:
    """Return what training gets of a shard that is read from front to back."""
    found: list[Outcome] = []
    stream = open_item(address, DataConfig())
    assert isinstance(stream, RemoteShards)
    for item in stream.read(0, 0):
        if isinstance(item.pair, UnusableSample):
            assert item.pair.reason in REASONS
            found.append(None)
        else:
            found.append(outcome(lambda pair=item.pair: pair))  # type: ignore[misc]
    return found


def usable(found: Iterable[Outcome]) -> Counter[Outcome]:
    return Counter(each for each in found if each is not None)
