"""Files of pairs in the formats that data sets come in: recognised by their content, read whole, or refused by name."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
import unicodedata
from pathlib import Path

import numpy
import pyarrow
import pyarrow.parquet
import pytest

from accel_clip.config import DataConfig, SourceConfig
from accel_clip.data.bad_samples import UnusableSample
from accel_clip.data.pictures.decode import decode_picture
from accel_clip.data.sources.base import Source
from accel_clip.data.sources.combine import Subset
from accel_clip.data.sources.resolve import locate
from accel_clip.faults import ConfigError, DataError
from helpers.pictures import numbered_picture
from helpers.sources import opened

NAMES = [f"{1000 + n}.jpg" for n in range(6)]
SENTENCES = {name: [f"a frog , number {n} .", f'"frog" {n}; it\'s green'] for n, name in enumerate(NAMES)}


def with_pictures(folder: Path, names: list[str] = NAMES) -> Path:
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(numbered_picture(number))
    return folder


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())
    return path


def pairs(source: Source) -> list[tuple[int, tuple[str, ...]]]:
    """Return the red of every picture, which tells them apart, and its captions."""
    found = [source[index] for index in range(len(source))]
    return [(decode_picture(pair.image, 1e6).getpixel((0, 0))[0], pair.captions) for pair in found]


def one_by_one() -> list[tuple[int, tuple[str, ...]]]:
    """Return the pairs of a list with a caption a row."""
    return [(number, (text,)) for number, name in enumerate(NAMES) for text in SENTENCES[name]]


def all_together() -> list[tuple[int, tuple[str, ...]]]:
    """Return the pairs of a list with all captions of a picture together."""
    return [(number, tuple(SENTENCES[name])) for number, name in enumerate(NAMES)]


# --- Flickr's lists, and others without a header


def rows_of(separator: str, number: str = "") -> str:
    rows = ((f"{name}{number.format(place)}", text) for name in NAMES for place, text in enumerate(SENTENCES[name]))
    return "".join(f"{name}{separator}{text}\n" for name, text in rows)


@pytest.mark.parametrize("name", ["results_20130124.token", "Flickr8k.lemma.token", "renamed.tsv", "captions.txt"])
def test_flickr_lists_with_numbers_behind_the_names(name: str, tmp_path: Path, capsys) -> None:
    source = opened(write(with_pictures(tmp_path) / name, rows_of("\t", "#{}")), quoting="none")
    assert pairs(source) == one_by_one()
    assert source.key(0) == source.key(1) != source.key(2)
    assert capsys.readouterr().err.count("no header, read as the columns image, caption") == 1


def test_flickr_list_with_bars_and_a_broken_row(tmp_path: Path) -> None:
    rows = [f"{name}| {n}| {text}\n" for name in NAMES * 20 for n, text in enumerate(SENTENCES[name])]
    rows[7] = rows[7].replace("| a", "   a")[:-1] + "\n"
    rows[10] = "1005.jpg| 0   a frog , number 5 .\n"
    path = write(with_pictures(tmp_path) / "results.csv", "image_name| comment_number| comment\n" + "".join(rows))
    source = opened(path)
    assert len(source) == 240
    with pytest.raises(UnusableSample, match=r"unreadable.*line 12 has 2 cells and the header 3"):
        source[10]
    assert (source[0].captions, source[1].captions) == (("a frog , number 0 .",), ('"frog" 0; it\'s green',))
    assert source[239].captions == ('"frog" 5; it\'s green',)
    assert source.key(10) == ""


def test_captions_txt_with_a_header(tmp_path: Path) -> None:
    buffer = io.StringIO()
    table = csv.writer(buffer)
    table.writerow(["image", "caption"])
    table.writerows((name, text) for name in NAMES for text in SENTENCES[name])
    assert pairs(opened(write(with_pictures(tmp_path) / "captions.txt", buffer.getvalue()))) == one_by_one()


@pytest.mark.parametrize("separator, suffix", [("\t", ".tsv"), (",", ".csv"), ("|", ".csv"), (";", ".txt")])
@pytest.mark.parametrize("is_first", [True, False])
def test_two_columns_without_a_header(separator: str, suffix: str, is_first: bool, tmp_path: Path) -> None:
    rows = [(name, f"frog {number}")[:: 1 if is_first else -1] for number, name in enumerate(NAMES)]
    path = write(with_pictures(tmp_path) / f"pairs{suffix}", "".join(separator.join(row) + "\n" for row in rows))
    assert pairs(opened(path)) == [(number, (f"frog {number}",)) for number in range(6)]


def test_more_columns_without_a_header_have_numbers_and_addresses_are_refused(tmp_path: Path) -> None:
    rows = "".join(f"{n}\t{name}\tfrog {n}\n" for n, name in enumerate(NAMES))
    path = write(with_pictures(tmp_path) / "pairs.tsv", rows)
    with pytest.raises(ConfigError, match=r"data\.caption_key: .*column 1, image, column 3"):
        opened(path)
    assert pairs(opened(path, caption_key=["column 3"])) == [(n, (f"frog {n}",)) for n in range(6)]
    with pytest.raises(DataError, match=r"addresses: download"):
        opened(write(tmp_path / "cc3m.tsv", "".join(f"a frog {n}\thttp://x.invalid/{n}.jpg\n" for n in range(6))))
    labels = write(tmp_path / "labels.csv", "".join(f"{name},{n}\n" for n, name in enumerate(NAMES)))
    with pytest.raises(ConfigError, match=r"data\.caption_key: .*image, label"):
        opened(labels)


def test_one_address_among_paths_costs_its_row_alone(tmp_path: Path) -> None:
    rows = "image,caption\nhttp://x.invalid/0.jpg,x\n" + "".join(f"{name},frog\n" for name in NAMES)
    source = opened(write(with_pictures(tmp_path) / "pairs.csv", rows))
    assert [captions for _, captions in pairs(Subset(source, numpy.arange(1, 7)))] == [("frog",)] * 6


def test_spaces_behind_separators_are_no_part_of_the_cells(tmp_path: Path) -> None:
    rows = "".join(f'"frog, {n}", {name}\n' for n, name in enumerate(NAMES))
    source = opened(write(with_pictures(tmp_path) / "pairs.csv", "caption, image\n" + rows))
    assert pairs(source) == [(n, (f"frog, {n}",)) for n in range(6)] and source.key(0) == NAMES[0]
    quoted = "".join(f'{name}, "frog, {n}"\n' for n, name in enumerate(NAMES))
    source = opened(write(tmp_path / "quoted.csv", "image, caption\n" + quoted))
    assert pairs(source) == [(n, (f"frog, {n}",)) for n in range(6)]
    mixed = write(
        tmp_path / "mixed.csv",
        "image,caption, note\n" + "".join(f"{name}, frog {n},x\n" for n, name in enumerate(NAMES)),
    )
    assert pairs(opened(mixed)) == [(n, (f"frog {n}",)) for n in range(6)]


# --- quotes


def inches(is_image_first: bool, num_columns: int = 2, separator: str = ",") -> str:
    """Return rows of which the third opens a quote that an inch mark of the seventh closes."""
    captions = [f"frog number {n}" for n in range(24)]
    captions[2], captions[6] = '"giant frog', 'frog of 5"'
    rows = []
    for number, text in enumerate(captions):
        cells = [f"{number}.png", *["7"] * (num_columns - 2), text]
        rows.append(separator.join(cells if is_image_first else cells[::-1]) + "\n")
    names = ["image", *"xyz"[: num_columns - 2], "caption"]
    return separator.join(names if is_image_first else names[::-1]) + "\n" + "".join(rows)


@pytest.mark.parametrize("is_image_first", [True, False])
@pytest.mark.parametrize("num_columns", [2, 3])
@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_a_quote_that_swallows_rows_is_noticed(
    is_image_first: bool, num_columns: int, suffix: str, tmp_path: Path
) -> None:
    separator = "," if suffix == ".csv" else "\t"
    path = write(tmp_path / f"pairs{suffix}", inches(is_image_first, num_columns, separator))
    assert (
        len(list(csv.reader(path.read_text().splitlines(), delimiter=separator))) == 25 - 4
    )  # what Python's reader does
    with pytest.raises(DataError, match=r"pairs\.\wsv: .*line 4 .*swallowed.*line 8.*data\.quoting: none"):
        opened(path)
    source = opened(path, quoting="none")
    assert len(source) == 24
    assert (source[2].captions, source[6].captions) == (('"giant frog',), ('frog of 5"',))
    assert len(opened(path, quoting="standard")) == 20


def test_two_rows_that_one_quote_joins_are_noticed(tmp_path: Path) -> None:
    path = write(tmp_path / "pairs.csv", 'image,caption\na.png,x\nb.png,"wide frog\nc.png,5"\nd.png,y\n')
    with pytest.raises(DataError, match=r"line 3 .*swallowed.*line 4"):
        opened(path)


@pytest.mark.parametrize(
    "caption",
    ["one, two,\nthree, four", "in front, a frog\nbehind it, a pond, and reeds\nabove, the sky", "a\n\nb", "1,\n2"],
)
def test_captions_of_several_lines_are_not_taken_for_rows(caption: str, tmp_path: Path) -> None:
    with (tmp_path / "pairs.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["image", "caption", "number"], *([f"{n}.png", caption, n] for n in range(5))])
    source = opened(tmp_path / "pairs.csv")
    assert [source[index].captions for index in range(5)] == [(caption,)] * 5


def test_a_quote_that_is_never_closed_names_the_setting(tmp_path: Path) -> None:
    path = write(tmp_path / "pairs.csv", 'image,caption\na.png,"never closed\nb.png,x\n')
    with pytest.raises(DataError, match=r"line 2 .*data\.quoting: none"):
        opened(path)
    assert [pair.captions for pair in map(opened(path, quoting="none").__getitem__, range(2))] == [
        ('"never closed',),
        ("x",),
    ]
    with pytest.raises(ConfigError, match=r"data\.quoting: 'some'.*auto, standard or none"):
        DataConfig(quoting="some")


# --- JSON


def coco() -> dict[str, object]:
    images = [{"id": number, "file_name": name} for number, name in enumerate(NAMES)]
    texts = [
        {"image_id": number, "id": 10, "caption": text} for number, name in enumerate(NAMES) for text in SENTENCES[name]
    ]
    return {"info": {}, "images": images, "annotations": texts[::-1]}


@pytest.mark.parametrize("place", ["train2017", "images/train2017", "."])
def test_coco_captions(place: str, tmp_path: Path, capsys) -> None:
    root = tmp_path / "coco"
    with_pictures(root / place)
    with_pictures(root / "val2017", ["other.jpg"])
    path = write(root / "annotations" / "captions_train2017.json", json.dumps(coco()))
    assert pairs(opened(path)) == [(number, captions[::-1]) for number, captions in all_together()]
    assert f"read from {(root / place).resolve()}" in capsys.readouterr().err
    with_pictures(tmp_path / "elsewhere")
    assert pairs(opened(path, image_root=str(tmp_path / "elsewhere")))[3][0] == 3
    assert capsys.readouterr().err == ""


def test_coco_captions_without_a_picture_and_pictures_without_a_caption_are_counted(tmp_path: Path) -> None:
    content = coco()
    content["images"] = [*content["images"], {"id": 99, "file_name": "1005.jpg"}, {"id": 100}]
    content["annotations"] = [
        *content["annotations"],
        {"image_id": 77, "caption": "x"},
        {"image_id": 99, "caption": None},
    ]
    source = opened(write(with_pictures(tmp_path) / "captions_val2014.json", json.dumps(content)))
    assert len(source) == 6 + 2 + 1
    assert source[6].captions == ()
    for index in (7, 8):
        with pytest.raises(UnusableSample, match="missing_file"):
            source[index]


def test_coco_boxes_are_no_captions(tmp_path: Path) -> None:
    content = {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"image_id": 1, "bbox": [0, 0, 1, 1]}]}
    with pytest.raises(DataError, match=r"no captions \(an object with the keys image_id, bbox\)"):
        opened(write(tmp_path / "instances_train2017.json", json.dumps(content)))


def karpathy(folder: str | None) -> str:
    splits = ["train", "restval", "train", "val", "test", "train"]
    images = [
        {
            "filename": name,
            "split": split,
            "sentences": [{"raw": text, "tokens": text.split()} for text in SENTENCES[name]],
            **({"filepath": folder} if folder else {}),
        }
        for name, split in zip(NAMES, splits, strict=True)
    ]
    return json.dumps({"dataset": "coco", "images": images})


@pytest.mark.parametrize("folder", [None, "val2014"])
def test_karpathys_splits(folder: str | None, tmp_path: Path, capsys) -> None:
    with_pictures(tmp_path / (folder or "images"))
    path = write(tmp_path / "dataset_coco.json", karpathy(folder))
    assert pairs(opened(path)) == [all_together()[n] for n in (0, 1, 2, 5)]
    said = capsys.readouterr().err
    assert "train 3, restval 1 are read" in said and f"karpathy:{path}:test" in said
    assert pairs(opened(f"karpathy:{path}:val")) == [all_together()[3]]
    assert pairs(opened(f"karpathy:{path}")) == pairs(opened(path))
    with pytest.raises(DataError, match=r"'tst', did you mean 'test'"):
        opened(f"karpathy:{path}:tst")
    with pytest.raises(DataError, match="names no file"):
        opened(f"karpathy:{tmp_path / 'none.json'}")


@pytest.mark.parametrize(
    "shape", ["rows", "one", "several", "by_number", "names", "objects", "lists", "columns", "numbers", "lines"]
)
def test_other_shapes_of_json(shape: str, tmp_path: Path) -> None:
    rows = [{"image": name, "caption": SENTENCES[name], "id": n} for n, name in enumerate(NAMES)]
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    contents: dict[str, object] = {
        "rows": rows,
        "one": {"annotations": rows},
        "several": {"version": 1, "data": rows, "tags": []},
        "by_number": {str(9 - n): row for n, row in enumerate(rows)},
        "objects": {name: {"caption": texts, "tags": "x"} for name, texts in SENTENCES.items()},
        "names": SENTENCES,
        "lists": columns,
        "columns": {key: dict(enumerate(column)) for key, column in columns.items()},
        "numbers": {key: {str(9 - n): cell for n, cell in enumerate(column)} for key, column in columns.items()},
    }
    text = "\n".join(map(json.dumps, rows)) if shape == "lines" else json.dumps(contents[shape], indent=1)
    assert pairs(opened(write(with_pictures(tmp_path) / "pairs.json", text))) == all_together()


@pytest.mark.parametrize(
    "text, said", [('{"a": 1, "b": [2]}', "keys a, b"), ("3", "int"), ("[1, 2]", "list"), ("{", "not JSON")]
)
def test_json_that_holds_no_pairs_says_what_it_holds(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=said):
        opened(write(tmp_path / "other.json", text))


# --- Chinese-CLIP


def chinese_clip(folder: Path, part: str = "train") -> tuple[Path, Path]:
    codes = [base64.urlsafe_b64encode(numbered_picture(n)).decode() for n in range(6)]
    images = write(folder / f"{part}_imgs.tsv", "".join(f"{100 + n}\t{code}\n" for n, code in enumerate(codes)))
    rows = [
        {"text_id": n, "text": text, "image_ids": [100 + n]} for n, name in enumerate(NAMES) for text in SENTENCES[name]
    ]
    rows.append({"text_id": 99, "text": "of two", "image_ids": [100, 101]})
    return images, write(folder / f"{part}_texts.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def test_chinese_clip_by_either_of_its_files(tmp_path: Path) -> None:
    expected = [(n, (*captions, "of two") if n < 2 else captions) for n, captions in all_together()]
    for path in chinese_clip(tmp_path, "valid"):
        assert pairs(opened(path)) == expected


def test_chinese_clip_lacks_a_file_a_text_or_a_picture(tmp_path: Path) -> None:
    images, texts = chinese_clip(tmp_path)
    lines = texts.read_text().splitlines(keepends=True)
    write(texts, "".join(lines[2:]) + json.dumps({"text_id": 1, "text": "x", "image_ids": [777]}) + "\n")
    source = opened(images)
    assert len(source) == 7 and source[0].captions == ("of two",)
    with pytest.raises(UnusableSample, match="missing_file"):
        source[6]
    texts.unlink()
    with pytest.raises(DataError, match=r"Chinese-CLIP.*captions are looked for in train_texts\.jsonl"):
        opened(images)


# --- parquet


def parquet(path: Path, numbers: range, **columns: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = {"image": [numbered_picture(n) for n in numbers], "caption": [f"frog {n}" for n in numbers]}
    pyarrow.parquet.write_table(pyarrow.table({**cells, **columns}), path)
    return path


def frogs(numbers: range) -> list[tuple[int, tuple[str, ...]]]:
    return [(n, (f"frog {n}",)) for n in numbers]


@pytest.mark.parametrize(
    "kind",
    [
        pyarrow.map_(pyarrow.string(), pyarrow.string()),
        pyarrow.list_view(pyarrow.float32()),
        pyarrow.month_day_nano_interval(),
        pyarrow.struct([("a", pyarrow.map_(pyarrow.string(), pyarrow.int8()))]),
    ],
    ids=str,
)
def test_columns_that_nothing_asks_for_do_not_matter(kind: pyarrow.DataType, tmp_path: Path) -> None:
    path = tmp_path / "pairs.parquet"
    try:
        parquet(path, range(3), other=pyarrow.nulls(3, kind))
    except pyarrow.ArrowNotImplementedError:
        pytest.skip("parquet does not hold it")
    assert pairs(opened(path)) == frogs(range(3))
    with pytest.raises((ConfigError, DataError), match=r"other|not a parquet"):
        opened(path, caption_key=["other"])


def test_a_folder_of_parts_is_one_table(tmp_path: Path) -> None:
    spark = tmp_path / "spark.parquet"
    parquet(spark / "part-00001-c000.snappy.parquet", range(3, 5))
    parquet(spark / "part-00000-c000.snappy.parquet", range(3))
    write(spark / "_SUCCESS", "")
    write(spark / ".part-00000.crc", "")
    assert pairs(opened(spark)) == frogs(range(5))
    parquet(tmp_path / "by" / "year=2020" / "a.parquet", range(2))
    parquet(tmp_path / "by" / "year=2021" / "a.parquet", range(2, 4))
    assert pairs(opened(tmp_path / "by")) == frogs(range(4))
    with pytest.raises(DataError, match="in 2 folders: name one"):
        opened(tmp_path)


def test_paths_in_a_folder_of_parts_start_beside_it_where_it_is_called_as_a_file(tmp_path: Path) -> None:
    with_pictures(tmp_path / "images")
    for n in range(2):
        cells = {"image": [f"images/{NAMES[n]}"], "caption": [f"frog {n}"]}
        path = tmp_path / "spark.parquet" / f"part-{n}.parquet"
        path.parent.mkdir(exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.table(cells), path)
    assert pairs(opened(tmp_path / "spark.parquet")) == frogs(range(2))


def test_of_splits_the_one_for_training_is_read_whole(tmp_path: Path, capsys) -> None:
    for split, numbers in {
        "train-00000-of-00002": range(3),
        "train-00001-of-00002": range(3, 5),
        "test-00000-of-00001": range(9, 10),
    }.items():
        parquet(tmp_path / "data" / f"{split}.parquet", numbers)
    assert pairs(opened(tmp_path)) == pairs(opened(tmp_path / "data")) == frogs(range(5))
    assert "train is read, and test not" in capsys.readouterr().err
    (tmp_path / "data" / "train-00001-of-00002.parquet").unlink()
    with pytest.raises(DataError, match="of 2 parts 1 are missing, the first is number 00001"):
        opened(tmp_path)


def test_parts_whose_columns_differ_a_little_are_read(tmp_path: Path) -> None:
    parquet(tmp_path / "0.parquet", range(2), extra=pyarrow.array([1, 2]))
    cells = {"image": [numbered_picture(n) for n in range(2, 4)], "caption": pyarrow.nulls(2)}
    pyarrow.parquet.write_table(pyarrow.table(cells), tmp_path / "1.parquet")
    found = pairs(opened(tmp_path))
    assert found == [*frogs(range(2)), (2, ()), (3, ())]


# --- paths that are meant otherwise


@pytest.mark.parametrize(
    "on_disk, written, how",
    [
        ("Café 1.png", unicodedata.normalize("NFD", "Café 1.png"), "NFD|NFC"),
        (unicodedata.normalize("NFD", "Été/é.png"), unicodedata.normalize("NFC", "Été/é.png"), "NFD|NFC"),
        ("a b/c+d.png", "a%20b/c%2Bd.png", "%xx decoded"),
        ("a.png", "a.PNG", r"with the ending \.png"),
        ("a.JPG", "a.jpg", r"with the ending \.JPG"),
        ("a.png", " a.png ", "without the spaces"),
        (unicodedata.normalize("NFD", "é 1.JPG"), "%C3%A9%201.jpg", "decoded.*NFD.*JPG"),
    ],
)
def test_paths_are_tried_in_other_spellings_and_it_is_said(
    on_disk: str, written: str, how: str, tmp_path: Path, capsys
) -> None:
    with_pictures(tmp_path, [on_disk, "plain.png"])
    rows = [
        {"image": written, "caption": "x"},
        {"image": "plain.png", "caption": "y"},
        {"image": "gone.png", "caption": "z"},
    ]
    path = write(tmp_path / "pairs.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    source = opened(path)
    assert Path(source[0].image) == (tmp_path / on_disk).resolve()
    with pytest.raises(UnusableSample, match="missing_file"):
        decode_picture(source[2].image, 1e6)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and re.search(rf"of 3 picture paths looked at 1 lead.*{how}", said[0])


def test_other_spellings_do_not_lead_out_of_the_root(tmp_path: Path) -> None:
    with_pictures(tmp_path, ["secret.png", "in/a.png"])
    source = opened(write(tmp_path / "in" / "pairs.csv", "image,caption\n%2e%2e/secret.png,x\na%2Epng,y\n"))
    assert Path(source[0].image).name == "secret.png" and not Path(source[0].image).exists()
    assert Path(source[1].image) == (tmp_path / "in" / "a.png").resolve()


def test_a_file_that_is_there_as_written_wins(tmp_path: Path, capsys) -> None:
    with_pictures(tmp_path, ["a%20b.png", "a b.png"])
    source = opened(write(tmp_path / "pairs.csv", "image,caption\na%20b.png,x\n"))
    assert Path(source[0].image).name == "a%20b.png" and capsys.readouterr().err == ""


def test_tables_are_found_by_their_endings() -> None:
    with pytest.raises(DataError, match="nothing is found"):
        locate(SourceConfig("nowhere/captions_train2017.json"))
