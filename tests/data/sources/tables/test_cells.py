"""Cells: lists written out in a text, pictures written into one, and what is neither."""

from __future__ import annotations

import base64
import csv
import json
from pathlib import Path

import numpy
import pyarrow
import pyarrow.parquet
import pytest

from accel_clip.data.bad_samples import LONGEST_DETAIL, BadSample, UnusableSample
from accel_clip.data.sources.class_names import class_name, is_word
from accel_clip.data.sources.tables.cells import captions_in
from accel_clip.data.sources.tables.picture_cells import picture_in_value
from accel_clip.faults import LONGEST_MESSAGE, ConfigError, DataError
from helpers.pictures import plain
from helpers.sources import opened, problem_of

TEXTS = ["a frog", 'it\'s "one"', "two\nlines", "青蛙", "a, b", "back\\slash"]


def written(path: Path, rows: list[dict[str, object]]) -> Path:
    """Write rows as a .csv or .jsonl."""
    with path.open("w", encoding="utf-8", newline="") as file:
        if path.suffix == ".jsonl":
            file.writelines(json.dumps(row) + "\n" for row in rows)
        else:
            table = csv.DictWriter(file, list(rows[0]))
            table.writeheader()
            table.writerows(rows)
    return path


# --- captions


@pytest.mark.parametrize(
    "write",
    [
        json.dumps,
        lambda texts: json.dumps(texts, ensure_ascii=False, indent=1),
        repr,
        lambda texts: repr(tuple(texts)),
        lambda texts: str(numpy.array(texts)),
        lambda texts: str(numpy.array(texts, dtype=object)),
        lambda texts: repr(numpy.array(texts, dtype=object)),
        lambda texts: f"  {texts!r}\n",
        lambda texts: repr([texts[:2], texts[2:]]),
    ],
    ids=["json", "indented", "list", "tuple", "numpy", "objects", "numpy_repr", "spaces", "nested"],
)
def test_a_list_that_is_written_out_is_its_captions(write) -> None:
    assert captions_in(write(TEXTS)) == TEXTS


def test_a_list_of_one_and_missing_items() -> None:
    assert captions_in("['a frog']") == captions_in('["a frog", null]') == captions_in("['a frog', None]") == ["a frog"]
    assert captions_in("[]") == captions_in([]) == captions_in(None) == captions_in(float("nan")) == []


@pytest.mark.parametrize(
    "text",
    [
        "[untitled]",
        "a frog [detail]",
        "(1967)",
        "('quoted')",
        "{a}",
        "[a, b]",
        "[nan]",
        "[unclosed",
        "]",
        "'a' 'b'",
        '"a frog"',
        "array of stars (a)",
        "['a' + 'b']",
        "[__import__('os').getcwd()]",
        "[" * 5000 + "]" * 4999,
        "",
    ],
)
def test_prose_that_looks_like_a_list_is_prose(text: str) -> None:
    assert captions_in(text) == [text]


@pytest.mark.parametrize("value", [{"en": "a frog", "zh": "x"}, '{"en": "a frog", "zh": "x"}', "{'en': 'a', 'zh': 1}"])
def test_an_object_is_refused_by_its_keys(value: object) -> None:
    with pytest.raises(UnusableSample, match=r"no_caption.*an object with the keys en, zh"):
        captions_in(value)
    assert captions_in(["a frog", value]) == ["a frog"]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_one_odd_cell_costs_its_row_alone(suffix: str, tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"image": f"{n}.png", "caption": f"frog {n}"} for n in range(30)]
    rows[3]["caption"], rows[7]["image"] = {"en": "x"}, {"height": 3}
    rows[9]["caption"], rows[11]["image"] = ["one", "two"], ["a.png", "b.png"]
    source = opened(written(tmp_path / f"pairs{suffix}", rows))
    assert "'caption'" in problem_of(source, 3).detail and "object" in problem_of(source, 7).detail
    assert "2 pictures" in problem_of(source, 11).detail
    assert source[9].captions == ("one", "two")
    assert all(source[n].captions == (f"frog {n}",) for n in range(30) if n not in (3, 7, 9, 11))
    assert len(set(source.keys())) == 30 - 2 + 1  # the two without a picture share a key


def test_an_odd_cell_leaves_the_captions_of_other_columns(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"image": "a.png", "title": f"frog {n}", "alt": f"toad {n}"} for n in range(4)]
    rows[1]["alt"], rows[2]["alt"], rows[2]["title"] = {"en": "x"}, {"en": "x"}, " "
    source = opened(written(tmp_path / "pairs.jsonl", rows), caption_key={"title": 1.0, "alt": 3.0})
    assert (source[0].captions, source[0].weights) == (("frog 0", "toad 0"), (1.0, 3.0))
    assert (source[1].captions, source[1].weights) == (("frog 1",), (1.0,))
    assert problem_of(source, 2).reason == "no_caption" and "'alt'" in problem_of(source, 2).detail


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_a_column_of_objects_is_refused_at_the_start(suffix: str, tmp_path: Path) -> None:
    rows = [{"image": f"{n}.png", "caption": {"raw": "x", "tokens": []}} for n in range(5)]
    with pytest.raises(ConfigError, match=r"data\.caption_key.*'caption'.*keys raw, tokens"):
        opened(written(tmp_path / f"pairs{suffix}", rows))


def test_lists_of_class_numbers_become_their_names(tmp_path: Path) -> None:
    import datasets

    names = datasets.ClassLabel(names=["sea_lion", "owl"])
    features = datasets.Features({"image": datasets.Value("string"), "label": datasets.List(names), "one": names})
    rows = {"image": ["a.png", "b.png"], "label": [[1, 0], []], "one": [1, -1]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "pairs.parquet")
    source = opened(tmp_path / "pairs.parquet", caption_key=["label"])
    assert [source[index].captions for index in range(2)] == [("owl", "sea lion"), ()]
    assert opened(tmp_path / "pairs.parquet", caption_key=["one"])[0].captions == ("owl",)


# --- pictures


def encodings(content: bytes) -> dict[str, str]:
    plain, safe = base64.b64encode(content).decode(), base64.urlsafe_b64encode(content).decode()
    return {
        "plain": plain,
        "safe": safe,
        "unpadded": safe.rstrip("="),
        "lines": "\n".join(plain[start : start + 76] for start in range(0, len(plain), 76)),
        "address": f"data:image/png;base64,{plain}",
        "printed": repr(content),
        "struct": repr({"bytes": content, "path": "a.png"}),
        "json": json.dumps({"bytes": plain, "path": None}),
        "list": json.dumps([plain]),
    }


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "AVIF", "ICO"])
@pytest.mark.parametrize("form", list(encodings(b"")))
def test_a_picture_that_is_written_into_a_text_is_read(form: str, kind: str) -> None:
    content = plain(size=(32, 32), kind=kind)
    assert picture_in_value(encodings(content)[form]) == (content, "")


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
def test_pictures_in_the_cells_of_a_table(suffix: str, tmp_path: Path) -> None:
    contents = [plain(colour) for colour in ("red", "blue", "red")]
    rows = [{"image": base64.b64encode(content).decode(), "caption": f"frog {n}"} for n, content in enumerate(contents)]
    path = tmp_path / f"pairs{suffix}"
    if suffix == ".tsv":
        path.write_text("image\tcaption\n" + "".join("\t".join(row.values()) + "\n" for row in rows))
    else:
        written(path, rows)
    source = opened(path)
    assert [source[index].image for index in range(3)] == contents
    assert source.key(0) == source.key(2) != source.key(1) and list(source.keys()) == [source.key(n) for n in range(3)]


@pytest.mark.parametrize(
    "path",
    [
        "a.png",
        "9j/4AAQ.jpg",
        "/9j/" + "deep/" * 30 + "a.jpg",
        "iVBORw0KGgo.png",
        "[abc] 001.jpg",
        "b'a.png",
        "data/a.png",
        "{x}.png",
        "A" * 60,
        "images/" + "0123456789abcdef" * 4,
    ],
)
def test_paths_are_not_taken_for_content(path: str) -> None:
    assert picture_in_value(path) == (None, path)


@pytest.mark.parametrize(
    "cell, said",
    [
        ("<PIL.PngImagePlugin.PngImageFile image mode=RGB size=64x64 at 0x7F>", "printed object"),
        ("['a.png', 'b.png']", "2 pictures"),
        ("[[255, 0, 0], [0, 0, 0]]", "numbers"),
        (str(numpy.zeros((2, 2, 3), int)), "printed array of numbers"),
        (str(numpy.full((1, 3), 0.5)), "printed array of numbers"),
        ("data:image/svg+xml,%3Csvg/%3E", "without base64"),
        (base64.b64encode(plain()).decode()[:60] + "*" * 10, "base64 of the picture is broken"),
        (repr(b"\xff" * 5000)[:-1], "cut off"),
        ('{"height": 3}', "an object with the keys height"),
        ("x" * 5000, "neither a path nor a picture"),
    ],
)
def test_what_is_neither_a_path_nor_a_picture_is_called_what_it_is(cell: str, said: str) -> None:
    with pytest.raises(UnusableSample, match=said) as caught:
        picture_in_value(cell)
    assert caught.value.reason == "unreadable" and len(caught.value.detail) < 200


def test_a_flickr_number_behind_a_name_is_none_of_it() -> None:
    assert picture_in_value("1000.jpg#3") == (None, "1000.jpg")
    assert picture_in_value("a#1/b#2.jpeg#10") == (None, "a#1/b#2.jpeg")
    assert picture_in_value("c#3") == (None, "c#3")


def test_a_column_of_printed_pixels_is_refused_at_the_start(tmp_path: Path) -> None:
    pixels = [numpy.zeros((2, 2, 3), int).tolist()] * 4
    pyarrow.parquet.write_table(pyarrow.table({"image": pixels, "text": ["x"] * 4}), tmp_path / "pixels.parquet")
    with pytest.raises(ConfigError, match=r"data\.image_key.*'image'.*list<.*no pictures"):
        opened(tmp_path / "pixels.parquet")
    rows = [{"image": repr(pixels[0]), "caption": "x"}] * 4
    with pytest.raises(ConfigError, match=r"data\.image_key.*'image'.*numbers"):
        opened(written(tmp_path / "pixels.csv", rows))


def test_lists_of_pictures_in_parquet(tmp_path: Path) -> None:
    one = [{"bytes": plain(), "path": None}]
    cells = {"images": [one, one, one, one * 2, [], None], "text": ["x"] * 6}
    pyarrow.parquet.write_table(pyarrow.table(cells), tmp_path / "lists.parquet")
    source = opened(tmp_path / "lists.parquet")
    assert [source[index].image for index in range(3)] == [plain()] * 3
    assert "2 pictures: write a row for each" in problem_of(source, 3).detail
    assert problem_of(source, 4).reason == problem_of(source, 5).reason == "missing_file"
    cells["images"] = [one * 2] * 6
    pyarrow.parquet.write_table(pyarrow.table(cells), tmp_path / "lists.parquet")
    with pytest.raises(ConfigError, match=r"data\.image_key.*2 pictures"):
        opened(tmp_path / "lists.parquet")


def test_content_stays_out_of_messages_and_of_the_list_of_bad_samples(tmp_path: Path) -> None:
    secret = base64.b64encode(numpy.random.default_rng(0).bytes(100_000)).decode()
    problem = UnusableSample("unreadable", f"no picture: {secret}", secret)
    assert len(problem.detail) <= LONGEST_DETAIL and len(problem.path or "") <= LONGEST_DETAIL
    assert len(BadSample("x", 0, problem.reason, problem.path, problem.detail, 0).line()) < 3 * LONGEST_DETAIL
    assert len(str(DataError(f"{secret}: the way out"))) <= LONGEST_MESSAGE
    assert str(DataError(f"{secret}: the way out")).endswith("the way out")
    rows = [{"image": secret, "caption": "x"}, {"image": "a.png", "caption": "y"}, {"image": "b.png", "caption": "z"}]
    for path in (written(tmp_path / "pairs.csv", rows), written(tmp_path / "pairs.jsonl", rows)):
        problem = problem_of(opened(path), 0)
        assert secret[:50] not in f"{problem.detail}{problem.path}" and path.name in str(problem.path)
    bare = tmp_path / "bare.csv"
    bare.write_text(f"{secret},{secret[1:]}\n" * 3)
    with pytest.raises(ConfigError, match=r"data\.image_key") as caught:
        opened(bare)
    assert len(str(caught.value)) < 700


# --- class names


@pytest.mark.parametrize(
    "written, name",
    [
        ("sea_lion", "sea lion"),
        ("polar-bear", "polar bear"),
        ("black-and-tan coonhound", "black-and-tan coonhound"),
        ("great_white shark", "great white shark"),
        (" owl ", "owl"),
        ("_", "_"),
    ],
)
def test_class_names_are_words_by_one_rule(written: str, name: str) -> None:
    assert class_name(written) == name


def test_numbers_and_codes_are_no_words() -> None:
    assert all(map(is_word, ["owl", "Boeing 737-200", "猫", "ox", "T-shirt", "ねこ", "été"]))
    assert not any(map(is_word, ["0", "10", "n01440764", "00f3a9", "class_7", "a", "c12", "1.5", "", "id-0003"]))
