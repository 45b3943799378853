"""Folders: captions in files beside pictures, names of folders only where they are classes, else a question."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from accel_clip.config import DataConfig
from accel_clip.data.bad_samples import UnusableSample
from accel_clip.data.sources.base import Source
from accel_clip.data.sources.folders.folder import is_of_format
from accel_clip.data.sources.resolve import open_labelled
from accel_clip.faults import ConfigError, DataError
from helpers.sources import opened

CLASSES = ("cat", "sea_lion")


def pictures(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"a picture is not looked at here")
    return folder


def captions(source: Source) -> dict[str, tuple[str, ...]]:
    return {source.key(index): source[index].captions for index in range(len(source))}


# --- captions beside pictures


ODD_NAMES = ("a\\b.png", "data:a.png", "data:a,b.png", "{'a'}.png", " a.png", "100%.png", "%41.png", "a#1.png")


@pytest.mark.parametrize("is_of_classes", [False, True])
def test_names_of_files_are_no_cells_of_tables(is_of_classes: bool, tmp_path: Path) -> None:
    names = [f"{folder}/{name}" for folder in CLASSES for name in ODD_NAMES]
    pictures(tmp_path, *names)
    for name in [] if is_of_classes else names:
        (tmp_path / name).with_suffix(".txt").write_text(f"text of {name}")
    source = opened(tmp_path)
    assert [source.key(index) for index in range(len(source))] == list(source.keys()) == sorted(names)
    assert [source[index].image for index in range(len(source))] == [tmp_path / name for name in sorted(names)]
    if not is_of_classes:
        assert captions(source) == {name: (f"text of {name}",) for name in names}


@pytest.mark.parametrize("ending", ["txt", "caption"])
@pytest.mark.parametrize("name", ["a.{}", "a.png.{}"])
def test_a_file_beside_a_picture_holds_its_captions(name: str, ending: str, tmp_path: Path) -> None:
    pictures(tmp_path, "10_toy/a.png", "5_thing/a.png")
    for folder, text in (("10_toy", "a toy"), ("5_thing", "a thing")):
        (tmp_path / folder / name.format(ending)).write_text(text)
    assert captions(opened(tmp_path)) == {"10_toy/a.png": ("a toy",), "5_thing/a.png": ("a thing",)}


def test_the_whole_name_wins_over_the_stem(tmp_path: Path) -> None:
    pictures(tmp_path, "a.png", "a.jpg")
    (tmp_path / "a.txt").write_text("of both")
    (tmp_path / "a.png.txt").write_text("of the png")
    assert captions(opened(tmp_path)) == {"a.jpg": ("of both",), "a.png": ("of the png",)}


def test_of_two_endings_the_usual_one_is_read_and_the_other_said(tmp_path: Path, capsys) -> None:
    pictures(tmp_path, "a.png")
    (tmp_path / "a.txt").write_text("tag, tag")
    (tmp_path / "a.caption").write_text("a frog on a leaf")
    assert captions(opened(tmp_path)) == {"a.png": ("tag, tag",)}
    assert "read from .txt files; data.caption_key caption reads the others" in capsys.readouterr().err
    assert captions(opened(tmp_path, caption_key=["caption"])) == {"a.png": ("a frog on a leaf",)}
    assert capsys.readouterr().err == ""
    assert captions(opened(tmp_path, caption_key=["txt", "caption"])) == {"a.png": ("tag, tag", "a frog on a leaf")}


def test_texts_of_no_picture_are_said(tmp_path: Path, capsys) -> None:
    pictures(tmp_path, "a.png", "b.svg", "c.png", "deep/d.png")
    for name in ("a.txt", "b.txt", "c.caption", "d.TXT", "deep/d.txt", "deep/d.png.txt", ".hidden.txt", "e.json"):
        (tmp_path / name).write_text("a text")
    assert len(opened(tmp_path)) == 3
    why = "since no picture is called so, or it has another"
    assert f"{tmp_path}: 3 texts are not read, {why}: b.txt, d.TXT, deep/d.txt\n" in capsys.readouterr().err
    for name in ("b.txt", "d.TXT", "deep/d.txt"):
        (tmp_path / name).unlink()
    opened(tmp_path)
    assert "not read" not in capsys.readouterr().err


def img2dataset(folder: Path, has_txt: bool) -> Path:
    for shard in range(2):
        for number in range(2):
            stem = f"{shard:05d}/{shard:05d}{number:04d}"
            pictures(folder, f"{stem}.jpg")
            record = {"caption": f"frog {shard}{number}", "url": "http://x.invalid", "exif": "{}", "status": "success"}
            (folder / f"{stem}.json").write_text(json.dumps(record))
            if has_txt:
                (folder / f"{stem}.txt").write_text(f"text {shard}{number}")
        (folder / f"{shard:05d}_stats.json").write_text('{"count": 2}')
        (folder / f"{shard:05d}.parquet").write_bytes(b"PAR1")
    return folder


@pytest.mark.parametrize("has_txt", [True, False])
def test_what_img2dataset_writes_as_files(has_txt: bool, tmp_path: Path) -> None:
    found = captions(opened(img2dataset(tmp_path, has_txt)))
    word = "text" if has_txt else "frog"
    assert found == {f"0000{s}/0000{s}000{n}.jpg": (f"{word} {s}{n}",) for s in range(2) for n in range(2)}
    named = captions(opened(tmp_path, caption_key=["caption"]))
    assert set(named.values()) == {(f"frog {s}{n}",) for s in range(2) for n in range(2)}


def test_records_without_captions_are_none(tmp_path: Path) -> None:
    pictures(tmp_path, "cat/a.png", "sea_lion/b.png")
    for name in ("cat/a.json", "sea_lion/b.json"):
        (tmp_path / name).write_text('{"shapes": [], "imagePath": "a.png"}')
    assert captions(opened(tmp_path)) == {"cat/a.png": ("cat",), "sea_lion/b.png": ("sea lion",)}


LINES, PARAGRAPHS = "a frog\na green frog\n", "a frog\n\nThe mood is calm.\n"


@pytest.mark.parametrize(
    "text, each_line, expected",
    [
        (LINES, None, ("a frog", "a green frog")),
        (LINES, True, ("a frog", "a green frog")),
        (LINES, False, ("a frog\na green frog",)),
        (PARAGRAPHS, None, ("a frog\n\nThe mood is calm.",)),
        (PARAGRAPHS, True, ("a frog", "The mood is calm.")),
        (PARAGRAPHS, False, ("a frog\n\nThe mood is calm.",)),
        ('["a frog", "a green frog"]', None, ("a frog", "a green frog")),
        ("['a frog', 'a green frog']", False, ("a frog", "a green frog")),
    ],
)
def test_folders_and_tars_have_one_rule_for_lines(
    text: str, each_line: bool | None, expected: tuple[str, ...], tmp_path: Path
) -> None:
    import tarfile

    pictures(tmp_path / "set", "a.png")
    (tmp_path / "set" / "a.txt").write_text(text)
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        archive.add(tmp_path / "set" / "a.png", "a.png")
        archive.add(tmp_path / "set" / "a.txt", "a.txt")
    for source in (tmp_path / "set", tmp_path / "0.tar"):
        assert opened(source, caption_lines=each_line)[0].captions == expected


def test_an_object_beside_a_picture_is_refused_for_what_it_is(tmp_path: Path) -> None:
    pictures(tmp_path, "a.png", "b.png")
    (tmp_path / "a.txt").write_text('{"tags": ["x"], "score": 1}')
    (tmp_path / "b.txt").write_text("a frog")
    with pytest.raises(UnusableSample, match=r"no_caption.*keys tags, score"):
        opened(tmp_path)[0]
    assert opened(tmp_path)[1].captions == ("a frog",)


# --- folders that are classes, or not


def test_names_that_are_words_are_classes(tmp_path: Path) -> None:
    names = ["cat", "sea_lion", "Boeing 737-200", "747", "猫", "T-shirt", "zebra crossing"]
    source = opened(pictures(tmp_path, *(f"{name}/a.png" for name in names)))
    assert {source[index].label for index in range(7)} == {
        "cat",
        "sea lion",
        "Boeing 737-200",
        "747",
        "猫",
        "T shirt",
        "zebra crossing",
    }


@pytest.mark.parametrize(
    "folders",
    [
        ("images", "padded_images"),
        ("train2017", "val2017"),
        ("00000", "00001"),
        ("10_toy", "5_thing"),
        ("JPEGImages", "SegmentationClass"),
        ("part-00000", "part-00001"),
        ("001.Black_footed_Albatross", "002.Laysan_Albatross"),
        ("cat", "images"),
        ("0", "1", "10"),
        ("n01440764", "n01443537"),
        ("a", "b"),
        ("batch1", "batch2"),
        ("3f2a9c", "99e0b1"),
    ],
)
def test_names_of_formats_numbers_and_codes_ask(folders: tuple[str, ...], tmp_path: Path) -> None:
    pictures(tmp_path, *(f"{name}/a.png" for name in folders))
    with pytest.raises(ConfigError, match=r"data\.caption_key: .*do not look like names of classes.* to folder"):
        opened(tmp_path)
    with pytest.raises(ConfigError, match=r"eval\.label_key: .*do not look like names of classes.* to folder"):
        open_labelled(str(tmp_path), DataConfig())
    assert len(opened(tmp_path, caption_key=["folder"])) == len(folders)
    assert len(open_labelled(str(tmp_path), DataConfig(), "folder")) == len(folders)


def test_classes_are_not_called_as_formats_have_it() -> None:
    for name in ("cat", "sea lion", "photographer", "imagery", "Trainer", "747", "testing tubes", "database"):
        assert not is_of_format(name), name


@pytest.mark.parametrize(
    "table",
    [
        "metadata1000.jsonl",
        "captions.csv",
        "pairs.parquet",
        "annotations/captions_train2017.json",
        "dataset_flickr8k.json",
        "captions.txt",
        "results_20130124.token",
        "cat/pairs.tsv",
    ],
)
def test_a_list_beside_folders_of_pictures_asks(table: str, tmp_path: Path) -> None:
    pictures(tmp_path, "cat/a.png", "sea_lion/b.png", table)
    with pytest.raises(ConfigError, match=rf"data\.caption_key: .*beside them {table}: .*to folder"):
        opened(tmp_path)
    assert set(captions(opened(tmp_path, caption_key=["folder"])).values()) == {("cat",), ("sea lion",)}
    assert len(open_labelled(str(tmp_path), DataConfig())) == 2


def test_notes_beside_folders_of_classes_do_not_ask(tmp_path: Path) -> None:
    pictures(tmp_path, "cat/a.png", "sea_lion/b.png", "README.txt", "license.txt", "config.json", "cat/notes.txt")
    assert set(captions(opened(tmp_path)).values()) == {("cat",), ("sea lion",)}


def test_captions_beside_pictures_win_over_names_of_folders(tmp_path: Path) -> None:
    pictures(tmp_path, "cat/a.png", "sea_lion/b.png")
    for name in ("cat/a", "sea_lion/b"):
        (tmp_path / f"{name}.txt").write_text(f"a picture of {name}")
    assert captions(opened(tmp_path))["cat/a.png"] == ("a picture of cat/a",)
    assert captions(opened(tmp_path, caption_key=["folder"]))["cat/a.png"] == ("cat",)
    assert {open_labelled(str(tmp_path), DataConfig())[n].label for n in range(2)} == {"cat", "sea lion"}


def test_a_folder_of_several_tables_names_them(tmp_path: Path) -> None:
    pictures(tmp_path, "a.png", "captions.csv", "other.tsv")
    with pytest.raises(DataError, match=r"it holds the tables captions\.csv, other\.tsv: name .*captions\.csv"):
        opened(tmp_path)


# --- labels


def test_labels_of_tables_and_folders_are_words_by_one_rule(tmp_path: Path) -> None:
    (tmp_path / "pairs.csv").write_text("image,label\na.png,sea_lion\nb.png,polar-bear\n")
    labelled = open_labelled(str(tmp_path / "pairs.csv"), DataConfig())
    assert [labelled[n].label for n in range(2)] == ["sea lion", "polar bear"]
    assert opened(tmp_path / "pairs.csv", caption_key=["label"])[0].captions == ("sea lion",)


def test_labels_that_are_numbers_or_codes_ask_unless_a_setting_names_them(tmp_path: Path) -> None:
    from accel_clip.evaluation.zero_shot import read_labelled

    for labels in (("0", "1", "10"), ("n01440764", "n01443537")):
        rows = "".join(f"{n}.png,{label},x\n" for n, label in enumerate(labels))
        (tmp_path / "pairs.csv").write_text("image,label,caption\n" + rows)
        source = open_labelled(str(tmp_path / "pairs.csv"), DataConfig())
        with pytest.raises(ConfigError, match=rf"eval\.label_key: .*{labels[0]}.* no words"):
            read_labelled(source)
        assert read_labelled(source, "label").classes == sorted(labels)
