"""Names of members in shards: every picture with a text of its name is a pair, and what is left over is counted."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accel_clip.config import DataConfig
from accel_clip.data.bad_samples import UnusableSample
from accel_clip.data.sources.base import Source
from accel_clip.data.sources.endings import PICTURE_SUFFIXES
from accel_clip.data.sources.resolve import open_item
from accel_clip.data.sources.shards.member_names import stem_and_ending, words_of_endings
from accel_clip.faults import ConfigError, DataError
from helpers.shards import write_tar
from helpers.sources import opened
from helpers.web import served

Members = dict[str, bytes]
DOTTED = (
    *("St. Peter 1", "v1.2_front", "site.com_0003", "2020.01.05", "u.s.a", "img.0001", "img.0002", "3.5 inch"),
    *("a.b/c.d", "./x", "./x.y", "front.final", "end.", "end..", "猫.1", "v1", "v1.2", "A.B", "a.jpg", "b.txt"),
)


def pairs_named(stems: Sequence[str]) -> Members:
    """Return a picture and a text for each name."""
    members = {}
    for stem in stems:
        members[f"{stem}.jpg"], members[f"{stem}.txt"] = f"picture of {stem}".encode(), f"text of {stem}".encode()
    return members


def outcome(fetch) -> tuple[bytes, tuple[str, ...]] | str:
    try:
        pair = fetch()
    except UnusableSample as problem:
        return problem.reason
    return problem_or_pair(pair)


def problem_or_pair(pair) -> tuple[bytes, tuple[str, ...]] | str:
    if isinstance(pair, UnusableSample):
        return pair.reason
    return (pair.image, pair.captions) if pair.captions else "no_caption"


def of_disk(source: Source) -> list[object]:
    return [outcome(lambda index=index: source[index]) for index in range(len(source))]


def of_both(path: Path, **chosen) -> list[object]:
    """Return what training gets of a shard, which is the same from the disk and from a server."""
    from_disk = of_disk(opened(path, **chosen))
    with served(path.parent) as address:
        stream = open_item(f"{address}/{path.name}", DataConfig(**chosen))
        streamed = [problem_or_pair(item.pair) for item in stream.read(0, 0)]
    assert sorted(map(str, from_disk)) == sorted(map(str, streamed))
    return from_disk


@pytest.mark.parametrize("stems", [DOTTED, *([stem] for stem in DOTTED)], ids=lambda stems: f"{len(stems)} {stems[0]}")
def test_names_with_dots_are_pairs(stems, tmp_path, capsys):
    found = of_both(write_tar(tmp_path / "x.tar", pairs_named(stems)))
    assert found == [(f"picture of {stem}".encode(), (f"text of {stem}",)) for stem in stems]
    assert "not read" not in capsys.readouterr().err


def test_what_programs_write_beside_a_picture_is_part_of_its_sample(tmp_path, capsys):
    members = {}
    for stem in ("000", "001", "St. Peter 1", "v1.2_front"):
        members |= pairs_named([stem])
        members |= {
            f"{stem}.{end}": b"7" for end in ("cls.txt", "seg.png", "Syn.json", "2.jpg", "npz", "depth.map.png")
        }
    path = write_tar(tmp_path / "x.tar", members)
    assert of_both(path) == [(f"picture of {stem}".encode(), (f"text of {stem}",)) for stem in list_of_stems(members)]
    said = capsys.readouterr().err
    unread = "4 .2.jpg, 4 .cls.txt, 4 .depth.map.png, 4 .npz, 4 .seg.png, 4 .syn.json\n"
    assert f"of 32 members these are not read: {unread}" in said
    assert "among the first 27 members these are not read: 4 .cls.txt, 3 .2.jpg" in said
    assert of_disk(opened(path, image_key="seg.png", caption_key=["cls.txt"])) == [(b"7", ("7",))] * 4


def list_of_stems(members: Members) -> list[str]:
    """Return the names of the pictures that end with .jpg alone."""
    return [name[:-4] for name in members if name.endswith(".jpg") and not name.endswith(".2.jpg")]


def test_pictures_and_texts_that_differ_by_a_word_are_asked_about_and_read_when_named(tmp_path):
    members = {}
    for number in range(3):
        members |= {f"s{number}.input.jpg": b"%d" % number, f"s{number}.outputs.txt": b"text %d" % number}
    path = write_tar(tmp_path / "x.tar", members)
    with pytest.raises(ConfigError, match=r"data\.image_key: .*input\.jpg, outputs\.txt"):
        opened(path)
    expected = [(b"%d" % number, (f"text {number}",)) for number in range(3)]
    assert of_both(path, image_key="input.jpg", caption_key=["outputs.txt"]) == expected
    first = write_tar(tmp_path / "y.tar", dict(list(members.items())[:2]))
    assert of_both(first, image_key=".Input.jpg", caption_key=["outputs.txt"]) == expected[:1]


def test_a_pair_of_its_own_is_no_part_of_another(tmp_path):
    stems = ["v1", "v1.2_front", "v2", "v2.2_front", "v3.2_front", "site.com", "site.com_1"]
    found = of_both(write_tar(tmp_path / "x.tar", pairs_named(stems)))
    assert found == [(f"picture of {stem}".encode(), (f"text of {stem}",)) for stem in stems]


def test_a_few_that_lack_their_text_do_not_make_others_parts(tmp_path):
    stems = [f"v{number}{end}" for number in range(4) for end in ("", ".back")]
    members = pairs_named(stems)
    del members["v2.back.txt"]
    found = of_both(write_tar(tmp_path / "x.tar", members))
    assert len(found) == 8 and found.count("no_caption") == 1


def test_what_lacks_its_other_half_is_counted_and_never_given_that_of_another(tmp_path):
    members = pairs_named(DOTTED)
    del members["site.com_0003.txt"], members["2020.01.05.jpg"], members["img.0001.txt"], members["img.0002.jpg"]
    found = of_both(write_tar(tmp_path / "x.tar", members))
    lost = ["no_caption", "missing_file"] * 2
    assert [each for each in found if isinstance(each, str)] == lost and len(found) == len(DOTTED)
    for image, texts in (each for each in found if not isinstance(each, str)):
        assert texts == (image.decode().replace("picture", "text", 1),)


def test_pictures_that_a_json_member_describes(tmp_path):
    stems = ["v1.2_front", "v1.3_back", "v2.2_front", "a.b.c"]
    members = {}
    for stem in stems:
        members |= {f"{stem}.jpg": stem.encode(), f"{stem}.json": b'{"caption": "text of %s"}' % stem.encode()}
    members["v1.readme.txt"] = members["v2.readme.txt"] = b"about"
    found = of_both(write_tar(tmp_path / "x.tar", members))
    assert [each for each in found if not isinstance(each, str)] == [
        (stem.encode(), (f"text of {stem}",)) for stem in stems
    ]
    assert found.count("missing_file") == 2


def test_every_ending_of_a_picture_in_a_folder_is_one_in_a_shard(tmp_path):
    for number, suffix in enumerate(sorted(PICTURE_SUFFIXES)):
        for written in (suffix, suffix.upper()):
            stem = f"{number}.{written.isupper()}"
            folder = tmp_path / stem
            folder.mkdir()
            (folder / f"a{written}").write_bytes(b"picture")
            (folder / "a.txt").write_text("text")
            assert opened(folder)[0].captions == ("text",)
            path = write_tar(tmp_path / f"{stem}.tar", {f"a{written}": b"picture", "a.txt": b"text"})
            assert of_disk(opened(path)) == [(b"picture", ("text",))]


def test_members_of_no_sample_are_counted(tmp_path, capsys):
    members = {**pairs_named(["0", "1"]), "README": b"", "._0.jpg": b"", "2.svg": b"", "3.SVG": b"", "__meta__/x": b""}
    members |= {"0.png": b"", "a/.hidden/4.npz": b""}
    assert len(opened(write_tar(tmp_path / "x.tar", members))) == 2
    said = "1 whose sample has another picture, or another of that name, 2 hidden or without an ending, 2 .svg, 1 .npz"
    assert f"of 10 members these are not read: {said}\n" in capsys.readouterr().err


def test_pictures_and_texts_in_folders_of_their_own_are_refused_with_their_names(tmp_path):
    members = {f"images/{n}.jpg": b"" for n in range(3)} | {f"texts/{n}.txt": b"" for n in range(3)}
    with pytest.raises(DataError, match=r"a picture is called images/0, a text texts/0\)"):
        opened(write_tar(tmp_path / "x.tar", members))


PARTS_OF_NAMES = st.text(st.sampled_from("ab1_ .é"), min_size=1, max_size=6)
STEMS = st.lists(PARTS_OF_NAMES.filter(lambda stem: not stem.startswith(".")), min_size=1, max_size=12, unique=True)


@given(stems=STEMS, folder=st.sampled_from(["", "./", "x.y/", "a/b/"]))
@settings(max_examples=300, deadline=None)
def test_pairs_are_those_of_equal_names_whatever_dots_are_in_them(stems, folder):
    names = [f"{folder}{stem}.{end}" for stem in stems for end in ("jpg", "txt")]
    split = [stem_and_ending(os.fsencode(name)) for name in names]
    assert [(stem.decode(), f".{end}") for stem, end in split] == [os.path.splitext(name) for name in names]
    endings = {stem: {"jpg", "txt"} for stem, _ in split}
    assert not words_of_endings(endings, ("jpg", "png"), ("txt",))
