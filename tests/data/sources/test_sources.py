"""Sources: tables, folders and saved datasets in every form users have them, and an error that helps with mistakes."""

from __future__ import annotations

import csv
import io
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import datasets
import numpy
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from accel_clip.config import DataConfig, SourceConfig
from accel_clip.data.bad_samples import UnusableSample
from accel_clip.data.pictures.decode import decode_picture
from accel_clip.data.sources import resolve
from accel_clip.data.sources.base import SOURCES, Pair, Stream
from accel_clip.data.sources.combine import Concatenated, Subset, origin, split_held_out
from accel_clip.data.sources.resolve import locate, open_item, open_labelled, open_source, open_sources
from accel_clip.data.sources.tables import files as table_files
from accel_clip.data.sources.tables import table
from accel_clip.data.sources.text_files import read_text
from accel_clip.faults import ConfigError, DataError
from accel_clip.randomness import fraction_of
from helpers.pictures import plain, write_plain
from helpers.sources import captions_of, opened, problem_of

CHINESE = ["池塘边的青蛙", "一只白色的孔雀", "两个孩子在沙滩上玩耍", "红色的汽车停在房子前面", "企鹅站在冰上"]
TRADITIONAL = ["青蛙在池塘邊", "一隻白色的孔雀", "兩個孩子在海灘上玩耍", "紅色的汽車停在房子前面", "企鵝站在冰上"]
JAPANESE = [
    "池のほとりのカエル",
    "白い孔雀",
    "海辺で遊ぶ二人の子供",
    "家の前に赤い車が停まっている",
    "氷の上のペンギン",
]
KOREAN = ["연못가의 개구리", "흰 공작새", "해변에서 노는 두 아이", "집 앞에 빨간 차가 서 있다", "얼음 위의 펭귄"]
RUSSIAN = ["Лягушка у пруда", "Белый павлин", "Двое детей играют", "Красная машина", "Пингвин на льду"]
FRENCH = [
    "Une grenouille près de l'étang",
    "Un paon élevé",
    "Deux enfants à la plage",
    "Voiture garée",
    "L'été dernier",
]


def write(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode(encoding))
    return path


# --- real data


def test_stamps_table(stamps):
    path = stamps / "captions.csv"
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    source = opened(path)
    assert len(source) == len(rows) == 785
    assert captions_of(source) == [(row["caption"].strip(),) for row in rows]
    chinese = opened(path, caption_key=["caption_zh"])
    assert sum(texts == () for texts in captions_of(chinese)) == 72
    both = opened(path, caption_key=["caption", "caption_zh"])
    assert sum(len(texts) for texts in captions_of(both)) == 785 + 785 - 72
    assert [both[index].label for index in range(785)] == [row["category"] for row in rows]
    sizes = {decode_picture(source[index].image, 50e6).mode for index in range(0, 785, 20)}
    assert sizes == {"RGB"}


def test_stamps_folder_is_its_metadata_table(stamps):
    folder, file = opened(stamps), opened(stamps / "captions.csv")
    assert captions_of(folder) == captions_of(file)
    assert [folder.key(index) for index in range(785)] == [file.key(index) for index in range(785)]


def test_stamps_held_out(stamps):
    training, held_out = split_held_out(opened(stamps / "captions.csv"), 0.05)
    assert len(training) + len(held_out) == 785
    assert 20 <= len(held_out) <= 60  # 39 expected, standard deviation 6


# --- tables


ENCODED = [
    ("utf-8", CHINESE),
    ("utf-8-sig", CHINESE),
    ("utf-16", CHINESE),
    ("utf-32", CHINESE),
    ("gb18030", CHINESE),
    ("big5", TRADITIONAL),
    ("shift_jis", JAPANESE),
    ("euc_kr", KOREAN),
    ("cp1251", RUSSIAN),
    ("cp1252", FRENCH),
]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
@pytest.mark.parametrize("encoding, texts", ENCODED)
def test_encodings_are_found_and_guesses_are_said(encoding, texts, suffix, tmp_path, capsys):
    rows = [{"file_name": f"{number}.png", "caption": text} for number, text in enumerate(texts)]
    lines = [f"{row['file_name']},{row['caption']}" for row in rows]
    if suffix == ".jsonl":
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    else:
        lines = ["file_name,caption", *lines]
    path = write(tmp_path / f"pairs{suffix}", "\n".join(lines), encoding)
    assert captions_of(opened(path)) == [(text,) for text in texts]
    said = capsys.readouterr().err
    assert ("data.encoding" in said and str(path) in said) == (not encoding.startswith("utf"))


def test_guess_looks_beyond_a_plain_beginning(tmp_path):
    path = write(tmp_path / "pairs.csv", "image,caption\n" + "a.png,x\n" * 3000 + "b.png,池塘边的青蛙\n", "gb18030")
    assert captions_of(opened(path))[-1] == ("池塘边的青蛙",)


def test_encoding_that_is_given_wins_over_a_guess_and_nothing_is_said(tmp_path, capsys):
    path = write(tmp_path / "pairs.csv", "image,caption\na.png,été\n", "cp1252")
    assert captions_of(opened(path, encoding="cp437")) == [("ΘtΘ",)]
    assert capsys.readouterr().err == ""


def test_byte_order_mark_wins_over_the_encoding_that_is_given(tmp_path):
    path = write(tmp_path / "pairs.csv", "image,caption\na.png,青蛙\n", "utf-8-sig")
    assert captions_of(opened(path, encoding="gb18030")) == [("青蛙",)]


def test_text_that_does_not_decode_names_line_and_byte(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_bytes("image,caption\na.png,青蛙\n".encode() * 3 + b"b.png,\xff\xfe\n")
    with pytest.raises(DataError, match=r"pairs\.csv: line 7: byte 0xff is not utf-8.*data\.encoding"):
        opened(path, encoding="utf-8")


def test_line_of_a_broken_byte_is_counted_over_a_large_file(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_bytes(("一二三四,x\n" * 400_000).encode() + b"\x81\n")  # several reads, cut inside of characters
    with pytest.raises(DataError, match="line 400001: byte 0x81"):
        read_text(path, "utf-8")


def test_unknown_encoding(tmp_path):
    path = write(tmp_path / "pairs.csv", "image,caption\na.png,x\n")
    for name in ("utf-9", "hex"):
        with pytest.raises(ConfigError, match=r"data\.encoding"):
            opened(path, encoding=name)


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_separator_is_found_in_the_header(separator, tmp_path):
    quoted = f'"one{separator} two"'
    text = separator.join(["image", "caption", "note"]) + "\n" + separator.join(["a.png", quoted, "x,y;z"[:1]]) + "\n"
    assert captions_of(opened(write(tmp_path / "pairs.csv", text))) == [(f"one{separator} two",)]


def test_tsv_is_cut_at_tabs_alone(tmp_path):
    path = write(tmp_path / "pairs.tsv", "image\tcaption\na.png\tone, two; three\n")
    assert captions_of(opened(path)) == [("one, two; three",)]


def test_quotes_with_newlines_and_quotes_and_blank_lines(tmp_path):
    text = 'image,caption\r\na.png,"two\r\nlines"\r\n\r\nb.png,"a ""frog"""\r\nc.png,5" stamp\r\n'
    assert captions_of(opened(write(tmp_path / "pairs.csv", text))) == [("two\r\nlines",), ('a "frog"',), ('5" stamp',)]


@pytest.mark.parametrize(
    "rows, line",
    [
        ('a.png,x\nb.png,"never closed\nc.png,y\n', 3),
        ('a.png,x\nb.png,"never closed\nc.png,"a, b"\n', 3),
        ('a.png,"x" y\n', 2),
        ("a.png,x\nb.png,y\nc.png,one, two\n", 4),
        ('a.png,"x\ny\nz"\nb.png\n', 5),
    ],
)
def test_rows_that_cannot_be_cut_name_file_and_line(rows, line, tmp_path):
    path = write(tmp_path / "pairs.csv", "image,caption\n" + rows)
    with pytest.raises(DataError, match=rf"pairs\.csv: .*line {line}\b"):
        opened(path)


@pytest.mark.parametrize("word", ["NA", "null", "None", "nan", "N/A", "n/a", "NaN", "#N/A", "true", "1"])
def test_every_caption_is_a_word(word, tmp_path):
    path = write(tmp_path / "pairs.csv", f'image,caption\na.png,{word}\nb.png,"{word}"\n')
    assert captions_of(opened(path)) == [(word,), (word,)]


def test_empty_captions_are_none_and_white_space_is_stripped(tmp_path):
    path = write(tmp_path / "pairs.csv", 'image,caption\na.png,\nb.png,"  "\nc.png, \u3000frog \n')
    assert captions_of(opened(path)) == [(), (), ("frog",)]


def test_a_caption_that_is_too_large_costs_its_row_alone(tmp_path):
    rows = (f"{name}.png,{'x' * size}\n" for name, size in (("a", 3_000_000), ("b", 65_537), ("c", 65_536), ("d", 1)))
    source = opened(write(tmp_path / "pairs.csv", "image,caption\n" + "".join(rows)))
    assert [problem_of(source, index).reason for index in (0, 1)] == ["caption_too_large"] * 2
    assert [len(source[index].captions[0]) for index in (2, 3)] == [65_536, 1]


def test_json_lines_with_lists_missing_and_unlike_cells(tmp_path):
    rows = [
        '{"image": "a.png", "caption": ["one", " two ", "", null], "meta": {"nested": 1}}',
        "",
        '{"image": "b.png", "caption": "three", "id": 7}',
        '{"image": "c.png", "caption": null}',
        '{"image": "d.png", "caption": NaN}',
        '{"image": "e.png"}',
        '{"image": "f.png", "caption": "half \\ud83d"}',
    ]
    source = opened(write(tmp_path / "pairs.jsonl", "\n".join(rows)))
    assert captions_of(source) == [("one", "two"), ("three",), (), (), (), ("half ?",)]
    assert [source.key(index) for index in range(6)] == [f"{letter}.png" for letter in "abcdef"]


def test_json_lines_with_captions_that_come_late(tmp_path, monkeypatch):
    monkeypatch.setattr(table, "ROWS_AT_ONCE", 2)
    rows = [{"image": "a"}, {"image": "b"}, {"image": "c", "caption": "x"}, {"image": "d", "caption": ["y", "z"]}]
    source = opened(write(tmp_path / "pairs.jsonl", "\n".join(map(json.dumps, rows))))
    assert captions_of(source) == [(), (), ("x",), ("y", "z")]


@pytest.mark.parametrize("line", ["{'image': 'a.png'}", "[1]", "{", "[" * 100_000])
def test_json_lines_that_are_none_name_the_line(line, tmp_path):
    path = write(tmp_path / "pairs.jsonl", '{"image": "a.png", "caption": "x"}\n\n' + line + "\n")
    with pytest.raises(DataError, match=r"pairs\.jsonl: line 3 is no"):
        opened(path)


def test_parquet_with_paths_bytes_structs_lists_and_missing_cells(tmp_path):
    cells = {
        "image": [{"bytes": plain("red"), "path": "same.png"}, {"bytes": plain("blue"), "path": "same.png"}, None],
        "caption": [["one", "two"], [], None],
    }
    pyarrow.parquet.write_table(pyarrow.table(cells), tmp_path / "structs.parquet")
    source = opened(tmp_path / "structs.parquet")
    assert [source.captions(index) for index in range(3)] == [(("one", "two"), ()), ((), ()), ((), ())]
    assert [source[index].image for index in range(2)] == [plain("red"), plain("blue")]
    assert problem_of(source, 2).reason == "missing_file"

    flat = pyarrow.table({"photo": [plain("red"), plain("red")], "text": ["nan", "y"]})
    pyarrow.parquet.write_table(flat, tmp_path / "bytes.parquet")
    source = opened(tmp_path / "bytes.parquet")
    assert (source[0].image, source[0].captions) == (plain("red"), ("nan",))
    assert source.key(0) == source.key(1)

    paths = pyarrow.table({"image": pyarrow.array(["a.png"], pyarrow.large_string()), "caption": ["x"], "label": [3]})
    pyarrow.parquet.write_table(paths, tmp_path / "paths.parquet")
    write_plain(tmp_path / "a.png")
    pair = opened(tmp_path / "paths.parquet")[0]
    assert pair == Pair((tmp_path / "a.png").resolve(), ("x",), "3")


def test_parquet_that_was_written_anew_is_read_anew(tmp_path):
    path = tmp_path / "pairs.parquet"
    for text in ("old", "new"):
        pyarrow.parquet.write_table(pyarrow.table({"image": ["a.png"], "caption": [text]}), path)
        assert captions_of(opened(path)) == [(text,)]


@pytest.mark.parametrize("name", ["pairs.parquet", "pairs.csv", "pairs.jsonl"])
@pytest.mark.parametrize("content", [b"", b"\0\x01\x02\x80\x81" * 50])
def test_files_that_are_no_tables_name_the_file(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises((DataError, ConfigError), match=name.replace(".", r"\.")):
        opened(tmp_path / name)


def test_headers_alone_duplicates_and_nameless_columns(tmp_path):
    with pytest.raises(DataError, match="no rows"):
        opened(write(tmp_path / "empty.csv", "image,caption\n"))
    with pytest.raises(DataError, match="'caption' stands twice"):
        opened(write(tmp_path / "twice.csv", "image,caption,caption\na,b,c\n"))
    source = opened(write(tmp_path / "index.csv", ",image,caption,,\n0,a.png,x,,\n"))
    assert captions_of(source) == [("x",)]


def test_unknown_columns_name_the_setting_the_columns_and_the_nearest(tmp_path):
    path = write(tmp_path / "pairs.csv", "photo,headline,image\na.png,x,b.png\n")
    with pytest.raises(
        ConfigError, match=r"data\.caption_key: .*'headlin', did you mean 'headline'\?.*photo, headline"
    ):
        opened(path, caption_key=["headlin"])
    with pytest.raises(ConfigError, match=r"data\.image_key: .*'foto', did you mean 'photo'\?"):
        opened(path, caption_key=["headline"], image_key="foto")
    with pytest.raises(ConfigError, match=r"data\.caption_key: .*caption, captions, text, title.*photo, headline"):
        opened(path)
    with pytest.raises(ConfigError, match=r"eval\.label_key: .*'clas'"):
        open_labelled(str(path), DataConfig(), "clas")
    with pytest.raises(ConfigError, match=r"data\.image_key: "):
        opened(write(tmp_path / "other.csv", "foto,caption\na.png,x\n"))


def test_columns_of_an_item_win_over_those_of_the_section(tmp_path):
    path = write(tmp_path / "pairs.csv", "photo,a,b\nx.png,one,two\n")
    item = SourceConfig(str(path), image_key="photo", caption_key=["b", "a"])
    assert captions_of(opened(item, image_key="none", caption_key=["none"])) == [("two", "one")]


def weighted_table(folder: Path, suffix: str) -> Path:
    """Write rows with a title and several alternative texts, of which some are missing; a .csv has but one a cell."""
    rows = [
        {"image": "a.png", "title": " one ", "alt": ["two", "", "three "], "note": "n"},
        {"image": "a.png", "title": "", "alt": ["two"], "note": "n"},
        {"image": "a.png", "title": "one", "alt": [], "note": "n"},
        {"image": "a.png", "title": "  ", "alt": [" "], "note": "n"},
    ]
    write_plain(folder / "a.png")
    path = folder / f"pairs{suffix}"
    if suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif suffix == ".jsonl":
        write(path, "\n".join(json.dumps(row) for row in rows))
    else:
        rows = [{**row, "alt": "".join(row["alt"][:1])} for row in rows]
        lines = [",".join(rows[0]), *(",".join(row.values()) for row in rows)]
        write(path, "\n".join(lines))
    return path


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_weights_of_columns_are_shared_by_their_captions(suffix, tmp_path):
    path = weighted_table(tmp_path, suffix)
    both = opened(path, caption_key={"title": 1.0, "alt": 3.0})
    found = [(pair.captions, pair.weights) for pair in (both[index] for index in range(4))]
    several = (("one", "two"), (1.0, 3.0)) if suffix == ".csv" else (("one", "two", "three"), (1.0, 1.5, 1.5))
    assert found == [several, (("two",), (3.0,)), (("one",), (1.0,)), ((), ())]
    swapped = opened(path, caption_key={"alt": 3.0, "title": 1.0})[0]
    assert dict(zip(swapped.captions, swapped.weights, strict=True)) == dict(zip(*several, strict=True))


@pytest.mark.parametrize("written", [["title", "alt"], {"title": 2.0, "alt": 2.0}])
def test_columns_that_weigh_the_same_show_all_captions_alike(written, tmp_path):
    pair = opened(weighted_table(tmp_path, ".jsonl"), caption_key=written)[0]
    assert (pair.captions, pair.weights) == (("one", "two", "three"), ())


def test_an_item_has_columns_and_weights_of_its_own(tmp_path):
    path = str(weighted_table(tmp_path, ".jsonl"))
    items = [path, *(SourceConfig(path, caption_key=own) for own in ("note", ["alt"], {"note": 1.0, "title": 9.0}))]
    data = DataConfig(train=items, caption_key={"title": 1.0, "alt": 4.0})
    source = open_sources(items, data)
    found = [(pair.captions, pair.weights) for pair in (source[index] for index in (0, 4, 8, 12))]
    assert found == [
        (("one", "two", "three"), (1.0, 2.0, 2.0)),
        (("n",), ()),
        (("two", "three"), ()),
        (("n", "one"), (1.0, 9.0)),
    ]


def test_a_weight_of_a_column_that_is_not_there_names_the_nearest(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.caption_key: .* no column 'titel', did you mean 'title'"):
        opened(weighted_table(tmp_path, ".csv"), caption_key={"titel": 1.0, "alt": 2.0})


def test_folders_of_text_files_show_their_lines_alike_whatever_columns_weigh(tmp_path):
    write_plain(tmp_path / "a.png")
    write(tmp_path / "a.txt", "one\ntwo\n")
    pair = opened(tmp_path, caption_key={"title": 1.0, "alt": 4.0})[0]
    assert (pair.captions, pair.weights) == (("one", "two"), ())


def test_usual_columns_in_any_case_and_in_order(tmp_path):
    path = write(tmp_path / "pairs.csv", "Title,Caption,File_Name\nx,y,a.png\n")
    source = opened(path)
    assert captions_of(source) == [("y",)] and source.key(0) == "a.png"


def test_captions_that_are_objects_are_refused(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"image": ["a"], "caption": [{"en": "x"}]}), tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match=r"data\.caption_key: the column 'caption' of .* holds struct"):
        opened(tmp_path / "a.parquet")


def test_addresses_are_no_paths(tmp_path):
    with pytest.raises(DataError, match="download the pictures"):
        opened(write(tmp_path / "pairs.csv", "image,caption\nhttps://example.org/a.png,x\n"))


# --- paths


def test_cjk_spaces_and_windows_paths(tmp_path):
    names = ["图片/青蛙 一.png", "images/a b.png", "images/c.png"]
    for name in names:
        write_plain(tmp_path / name)
    path = write(tmp_path / "pairs.csv", "image,caption\n图片/青蛙 一.png,x\nimages/a b.png,y\nimages\\c.png,z\n")
    source = opened(path)
    assert [source[index].image for index in range(3)] == [(tmp_path / name).resolve() for name in names]


def test_paths_stay_inside_the_root_links_resolved(tmp_path):
    inside, outside = tmp_path / "data", write_plain(tmp_path / "secret" / "a.png")
    real = write_plain(inside / "real.png")
    (inside / "link.png").symlink_to(outside)
    (inside / "folder").symlink_to(outside.parent)
    (inside / "good.png").symlink_to(real)
    (inside.parent / "data2").mkdir()
    write_plain(inside.parent / "data2" / "b.png")
    cells = [
        *("../secret/a.png", str(outside), "link.png", "folder/a.png", "../data2/b.png", "x/../../secret/a.png"),
        *("real.png", str(real), "good.png", "missing.png"),
    ]
    path = write(inside / "pairs.csv", "image,caption\n" + "".join(f"{cell},x\n" for cell in cells))
    source = opened(path)
    for index in range(6):
        problem = problem_of(source, index)
        assert (problem.reason, problem.path) == ("outside_root", cells[index]), cells[index]
        assert "data.image_root" in problem.detail
    assert [source[index].image for index in (6, 7, 8)] == [real.resolve()] * 3
    with pytest.raises(UnusableSample, match="missing_file"):
        decode_picture(source[9].image, 1e6)
    everywhere = opened(path, image_root="/")
    assert everywhere[1].image == outside.resolve()
    wider = opened(path, image_root=str(tmp_path))
    assert wider[1].image == outside.resolve()
    assert "data" in str(wider.file("data/real.png"))


def test_image_root_through_a_link(tmp_path):
    real = write_plain(tmp_path / "real" / "a.png")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    path = write(tmp_path / "pairs.csv", f"image,caption\na.png,x\n{tmp_path}/link/a.png,y\n")
    source = opened(path, image_root=str(tmp_path / "link"))
    assert source[0].image == source[1].image == real.resolve()
    assert source.key(0) == source.key(1) == "a.png"


def test_empty_paths_and_null_characters(tmp_path):
    source = opened(write(tmp_path / "pairs.csv", "image,caption\n,x\n"))
    assert problem_of(source).reason == "missing_file"
    source = opened(write(tmp_path / "pairs.jsonl", '{"image": "a\\u0000b", "caption": "x"}'))
    assert problem_of(source).reason == "missing_file"


def test_missing_root(tmp_path):
    path = write(tmp_path / "pairs.csv", "image,caption\na.png,x\n")
    with pytest.raises(ConfigError, match=r"data\.image_root: .*nowhere"):
        opened(path, image_root=str(tmp_path / "nowhere"))


def test_keys_of_one_file_are_one_however_it_is_written_and_wherever_it_lies(tmp_path):
    cells = ["a/b.png", "./a/b.png", "a//b.png", "a/../a/b.png"]
    keys = set()
    for place in ("here", "there"):
        folder = tmp_path / place
        absolute = str(folder / "a" / "b.png")
        rows = "".join(f"{cell},x\n" for cell in [*cells, absolute])
        source = opened(write(folder / "pairs.csv", "image,caption\n" + rows))
        keys |= {source.key(index) for index in range(5)}
    assert keys == {"a/b.png"}


def test_keys_of_bytes_are_equal_for_equal_bytes_alone():
    generator = numpy.random.default_rng(0)
    for size in (0, 1, 5000, 100_000):
        content = generator.bytes(size)
        assert table.content_key(memoryview(content)) == table.content_key(memoryview(bytes(content)))
        for place in {0, size - 1, *generator.integers(size, size=20).tolist()} if size else ():
            other = bytearray(content)
            other[place] ^= 1
            assert table.content_key(memoryview(other)) != table.content_key(memoryview(content))
    assert table.content_key(memoryview(b"\0" * 10)) != table.content_key(memoryview(b"\0" * 11))


@pytest.mark.parametrize("form", ["saved dataset", "parquet", "hf-stream"])
def test_pictures_that_differ_in_a_few_pixels_are_different_pictures(tmp_path, form):
    """Large, uncompressed and alike but for a mark somewhere: 16-bit arrays are stored as TIFF, icons as BMP."""
    pictures = []
    for number in range(24):
        pixels = numpy.zeros((160, 160), numpy.uint16)
        pixels[20 + 5 * number] = 40_000
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "TIFF") if number % 2 else Image.fromarray(
            (pixels >> 8).astype(numpy.uint8)
        ).convert("RGB").save(buffer, "BMP")
        pictures.append(buffer.getvalue())
    rows = {"image": [{"bytes": each, "path": None} for each in pictures], "caption": [f"{n}" for n in range(24)]}
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    dataset = datasets.Dataset.from_dict(rows, features=features)
    dataset.save_to_disk(tmp_path / "saved")
    dataset.to_parquet(tmp_path / "pairs.parquet")
    if form == "hf-stream":
        stream = resolve.open_item(f"hf-stream:{tmp_path / 'saved'}", DataConfig())
        keys = [item.key for shard in range(stream.num_shards) for item in stream.read(shard, 0)]
    else:
        source = open_source(str(tmp_path / ("saved" if form == "saved dataset" else "pairs.parquet")), DataConfig())
        keys = [source.key(index) for index in range(24)]
        assert list(source.keys()) == keys == [source.identity(index) for index in range(24)]
    assert len(set(keys)) == 24


# --- folders


def test_folder_with_a_metadata_table_of_any_kind(tmp_path):
    write_plain(tmp_path / "a" / "x.png")
    write(tmp_path / "csv" / "metadata.csv", "file_name,text\nx.png,from csv\n")
    write(tmp_path / "jsonl" / "metadata.jsonl", '{"file_name": "x.png", "text": "from jsonl"}')
    (tmp_path / "parquet").mkdir()
    columns = {"file_name": ["x.png"], "text": ["from parquet"]}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "parquet" / "metadata.parquet")
    for kind in ("csv", "jsonl", "parquet"):
        assert captions_of(opened(tmp_path / kind)) == [(f"from {kind}",)]


def test_folder_with_text_files(tmp_path):
    for name in ("b.PNG", "a.jpg", "deep/c.webp", "without.png", ".hidden.png", "._a.jpg"):
        write_plain(tmp_path / name)
    write(tmp_path / "a.txt", "\ufefffirst line\r\n second line \r\n\r\n")
    write(tmp_path / "b.TXT", "一只青蛙")
    write(tmp_path / "deep" / "c.txt", "\n \n")
    write(tmp_path / "README.md", "x")
    source = opened(tmp_path)
    assert [source.key(index) for index in range(len(source))] == ["a.jpg", "b.PNG", "deep/c.webp", "without.png"]
    assert captions_of(source) == [("first line", "second line"), ("一只青蛙",), (), ()]
    assert source[0].image == (tmp_path / "a.jpg").resolve()


def test_text_files_in_another_encoding_are_guessed_once_and_said(tmp_path, capsys):
    for number, text in enumerate([*CHINESE, "frog"]):
        write_plain(tmp_path / f"{number}.png")
        write(tmp_path / f"{number}.txt", text, "gb18030")
    write_plain(tmp_path / "utf8.png")
    write(tmp_path / "utf8.txt", "青蛙")
    source = opened(tmp_path)
    assert captions_of(source) == [(text,) for text in [*CHINESE, "frog", "青蛙"]]
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "gb18030" in said and "data.encoding" in said


def test_text_file_that_does_not_decode_costs_its_pair_alone(tmp_path):
    for name in ("a", "b"):
        write_plain(tmp_path / f"{name}.png")
    write(tmp_path / "a.txt", "frog")
    (tmp_path / "b.txt").write_bytes(b"\xff\x80\x81 frog")
    source = opened(tmp_path, encoding="utf-8")
    assert source[0].captions == ("frog",)
    problem = problem_of(source, 1)
    assert problem.reason == "caption_encoding" and "data.encoding" in problem.detail


def test_folder_per_class(tmp_path):
    for name in ("sea_lion/1.png", "sea_lion/more/2.png", "polar-bear/1.jpg", "empty/readme.txt"):
        write_plain(tmp_path / name)
    source = opened(tmp_path)
    pairs = [source[index] for index in range(len(source))]
    assert [(pair.captions, pair.label) for pair in pairs] == [
        (("polar bear",), "polar bear"),
        (("sea lion",), "sea lion"),
        (("sea lion",), "sea lion"),
    ]
    labelled = open_labelled(str(tmp_path), DataConfig(caption_key=["caption_zh"], image_root="/nowhere"))
    assert [labelled[index].label for index in range(3)] == ["polar bear", "sea lion", "sea lion"]


def test_links_in_folders_stay_inside_unless_the_root_is_wider(tmp_path):
    store = tmp_path / "store"
    for name in ("cat/1.png", "dog/1.png"):
        write_plain(store / name)
    chosen = tmp_path / "chosen"
    chosen.mkdir()
    for name in ("cat", "dog"):
        (chosen / name).symlink_to(store / name)
    (store / "cat" / "loop").symlink_to(chosen)
    assert problem_of(opened(chosen)).reason == "outside_root"
    source = opened(chosen, image_root=str(tmp_path))
    assert [source[index].image for index in range(2)] == [
        (store / f"{name}/1.png").resolve() for name in ("cat", "dog")
    ]


def test_folders_without_pairs_say_what_was_looked_for(tmp_path):
    with pytest.raises(DataError, match=r"metadata\.csv.*\.txt.*class.*0 pictures"):
        opened(tmp_path)
    write_plain(tmp_path / "images" / "a.png")
    write(tmp_path / "captions.csv", "image,caption\nimages/a.png,x\n")
    with pytest.raises(DataError, match=r"it holds the table captions\.csv"):
        opened(tmp_path)
    for part in ("train", "val"):
        write_plain(tmp_path / "parts" / part / "cat" / "a.png")
    with pytest.raises(DataError, match=r"one of its parts, such as .*parts.train"):
        opened(tmp_path / "parts")


# --- datasets


def features() -> datasets.Features:
    names = datasets.ClassLabel(names=["frog", "owl"])
    return datasets.Features({"photo": datasets.Image(), "caption": datasets.Value("string"), "label": names})


def small_dataset() -> datasets.Dataset:
    photos = [{"bytes": plain(colour), "path": "x.png"} for colour in ("red", "blue", "red")]
    return datasets.Dataset.from_dict(
        {"photo": photos, "caption": ["a frog", "an owl", "nan"], "label": [0, 1, -1]}, features=features()
    )


def check_small(source) -> None:
    pairs = [source[index] for index in range(len(source))]
    assert [pair.image for pair in pairs] == [plain("red"), plain("blue"), plain("red")]
    assert [pair.captions for pair in pairs] == [("a frog",), ("an owl",), ("nan",)]
    assert [pair.label for pair in pairs] == ["frog", "owl", None]
    assert source.key(0) == source.key(2) != source.key(1)


def test_saved_datasets(tmp_path):
    small_dataset().save_to_disk(tmp_path / "one")
    check_small(opened(tmp_path / "one"))
    parts = datasets.DatasetDict({"train": small_dataset(), "test": small_dataset().select([1])})
    parts.save_to_disk(tmp_path / "parts")
    check_small(opened(tmp_path / "parts"))
    assert captions_of(opened(tmp_path / "parts" / "test")) == [("an owl",)]
    datasets.DatasetDict({"a": small_dataset(), "b": small_dataset()}).save_to_disk(tmp_path / "others")
    with pytest.raises(DataError, match="splits a, b"):
        opened(tmp_path / "others")


def test_parquet_of_a_dataset_keeps_its_class_names(tmp_path):
    small_dataset().to_parquet(tmp_path / "pairs.parquet")
    check_small(opened(tmp_path / "pairs.parquet"))


def test_class_names_can_be_captions(tmp_path):
    small_dataset().save_to_disk(tmp_path / "one")
    assert captions_of(opened(tmp_path / "one", caption_key=["label"])) == [("frog",), ("owl",), ()]


def test_datasets_by_hf_from_a_folder(tmp_path):
    folder = tmp_path / "name"
    folder.mkdir()
    small_dataset().to_parquet(folder / "train.parquet")
    small_dataset().select([1]).to_parquet(folder / "test.parquet")
    check_small(opened(f"hf:{folder}"))
    check_small(opened(f"hf:{folder}:train"))
    assert captions_of(opened(f"hf:{folder}:test")) == [("an owl",)]
    assert captions_of(opened(f"hf:{folder}:train[:2]")) == [("a frog",), ("an owl",)]
    with pytest.raises(DataError, match=r"hf:.*name:none cannot be loaded: .*train.*test"):
        opened(f"hf:{folder}:none")


def write_configurations(folder: Path, names: Sequence[str]) -> Path:
    """Write a dataset in which every configuration has the splits train and test, with one row each."""
    lines = ["---", "configs:"]
    for name in names:
        lines += [f"- config_name: {name}", "  data_files:"]
        for split in ("train", "test"):
            write(folder / name / f"{split}.csv", f"image,caption\na.png,{name} {split}\n")
            lines += [f"  - split: {split}", f"    path: {name}/{split}.csv"]
    write(folder / "README.md", "\n".join([*lines, "---", ""]))
    return folder


@pytest.mark.parametrize("kind", ["hf", "hf-stream"])
def test_one_of_several_configurations_is_chosen_by_its_name(kind, tmp_path):
    names = ["en", "de", "test", *(f"wiki.{number}" for number in range(30))]
    folder = write_configurations(tmp_path / "set", names)

    def caption(words: str) -> str:
        source = open_item(f"{kind}:{folder}{words}", DataConfig())
        pair = next(iter(source.read(0, 0))).pair if isinstance(source, Stream) else source[0]
        return pair.captions[0]

    assert caption(":de") == "de train" and caption(":de:test") == "de test"
    assert caption(":wiki.29:train") == "wiki.29 train"
    assert caption(":test") == "test train" and caption(":test:test") == "test test"
    if kind == "hf":
        assert caption(":en:test[:1]") == "en test"
    for words in ("", ":train", ":none", ":none:test"):
        with pytest.raises(DataError, match=rf"^{kind}:.*{', '.join(names)}: name one, as {kind}:\S+set:en,[^\n]*$"):
            caption(words)
    with pytest.raises(DataError, match=r"set:de:none cannot be loaded: .*train.*test"):
        caption(":de:none")


def test_splits_of_a_saved_dataset_by_hf(tmp_path):
    parts = {"train": small_dataset(), "test": small_dataset().select([1])}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    check_small(opened(f"hf:{tmp_path}/saved"))
    check_small(opened(f"hf:{tmp_path}/saved:train"))
    assert captions_of(opened(f"hf:{tmp_path}/saved:test")) == [("an owl",)]
    with pytest.raises(DataError, match=r"has the splits test, train, and no 'none'"):
        opened(f"hf:{tmp_path}/saved:none")


def test_picture_folders_by_hf_stay_inside(tmp_path):
    write_plain(tmp_path / "set" / "train" / "a.png")
    write(tmp_path / "set" / "train" / "metadata.csv", "file_name,text\na.png,a frog\n")
    source = opened(f"hf:{tmp_path / 'set'}")
    assert source[0] == Pair((tmp_path / "set" / "train" / "a.png").resolve(), ("a frog",), None)


def test_datasets_that_cannot_be_reached_name_themselves_in_one_line(monkeypatch):
    def unreachable(*args, **options):
        raise ConnectionError("Couldn't reach 'org/name' on the Hub\nand a second line")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(DataError, match=r"^hf:org/name:train cannot be loaded: Couldn't reach [^\n]*$"):
        opened("hf:org/name")
    with pytest.raises(DataError, match="hf:org/name"):
        opened("hf")


def test_broken_saved_dataset(tmp_path):
    write(tmp_path / "state.json", "{}")
    with pytest.raises(DataError, match="saved dataset cannot be loaded"):
        opened(tmp_path)


def test_memory_mapped_tables_are_pickled_by_reference(tmp_path):
    pictures = [{"bytes": numpy.random.default_rng(number).bytes(100_000), "path": None} for number in range(10)]
    cells = {"photo": pictures, "caption": ["x"] * 10, "label": [0] * 10}
    datasets.Dataset.from_dict(cells, features=features()).save_to_disk(tmp_path / "one")
    source = opened(tmp_path / "one")
    pickled = pickle.dumps(source)
    assert len(pickled) < 10_000
    assert pickle.loads(pickled)[9].image == pictures[9]["bytes"]


# --- words that find a source


def test_words_that_find_nothing_name_the_setting_what_was_written_and_the_forms(tmp_path):
    write(tmp_path / "photos.csv", "image,caption\na.png,x\n")
    with pytest.raises(DataError, match=r"data\.train: .*phots\.csv', did you mean 'photos\.csv'\? write a table"):
        locate(str(tmp_path / "phots.csv"))
    with pytest.raises(DataError, match=r"data\.val: .*'demoo', did you mean 'demo'\?"):
        locate("demoo", "data.val")
    with pytest.raises(DataError, match=r"data\.val: "):
        open_source("none.csv", DataConfig(val=["none.csv"]))
    with pytest.raises(DataError, match=r"eval\.zero_shot: "):
        open_labelled("none.csv", DataConfig())
    for words in ("", "hff:org/name"):
        with pytest.raises(DataError, match="hf:org/name"):
            locate(words)
    with pytest.raises(DataError, match=r"'\.xlsx'; write a table \(\.csv, \.tsv, \.jsonl, \.parquet, \.json, "):
        locate(str(write_plain(tmp_path / "pairs.xlsx")))


def test_registered_names_win_over_paths_and_unregistered_prefixes_are_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "odd:name.csv", "image,caption\na.png,x\n")
    (tmp_path / "demo").mkdir()
    assert captions_of(opened("odd:name.csv")) == [("x",)]
    assert locate("demo").kind == "registered"


def test_registered_sources_get_the_argument_and_complete_settings(own_entries):
    asked = []

    @SOURCES.register("argued", "argued too")
    def mine(argument, options):
        """Mine."""
        asked.append((argument, options))
        return Numbers(3)

    item = SourceConfig("argued too:a:b", image_key="photo")
    assert len(open_source(item, DataConfig(image_key="image", caption_key=["text"]))) == 3
    argument, options = asked[0]
    assert argument == "a:b" and isinstance(options, SourceConfig)
    assert (options.source, options.image_key, options.caption_key) == ("argued too:a:b", "photo", ["text"])
    open_source("argued", DataConfig())
    assert asked[1][0] == ""


def test_suffixes_and_names_are_those_of_the_modules_that_serve_them():
    resolve.register_built_in()
    assert set(resolve.BUILT_IN) <= set(SOURCES.names())
    read = {suffix for form in table_files.FORMATS for suffix in form.suffixes}
    assert read == set(resolve.TABLE_SUFFIXES)


def test_missing_data_is_found_without_heavy_imports():
    code = (
        "import sys\n"
        "from accel_clip.data.sources.resolve import locate\n"
        "from accel_clip.faults import DataError\n"
        "try: locate('nowhere.csv')\n"
        "except DataError: print(sorted({'torch', 'pyarrow', 'datasets', 'PIL', 'numpy'} & set(sys.modules)))\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


# --- sources made of sources


class Numbers:
    """A source of a user's own, whose keys are only its own."""

    def __init__(self, size: int, name: str = "numbers") -> None:
        self.size, self.name = size, name

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Pair:
        return Pair(b"", (f"{self.name} {index}",))

    def key(self, index: int) -> str:
        return str(index)


class WithHeldOut(Numbers):
    def held_out(self) -> Numbers:
        return Numbers(2, "held out")


def test_concatenated_sources_follow_one_another():
    both = Concatenated([Numbers(2, "a"), Numbers(3, "b")])
    assert captions_of(both) == [("a 0",), ("a 1",), ("b 0",), ("b 1",), ("b 2",)]
    assert [origin(both, index)[0].name for index in range(5)] == ["a", "a", "b", "b", "b"]
    for index in (-1, 5):
        with pytest.raises(IndexError):
            both[index]


def test_concatenated_keys_are_one_for_one_file_and_apart_for_others(tmp_path):
    english = write(tmp_path / "en.csv", "image,caption\na.png,frog\nb.png,owl\n")
    chinese = write(tmp_path / "zh" / "zh.csv", "image,caption\n../a.png,青蛙\na.png,另一只\n")
    data = DataConfig(train=[str(english), str(chinese)])
    both = Concatenated([open_sources(data.train, data), Numbers(2), Numbers(2)])
    keys = [both.key(index) for index in range(8)]
    assert keys[0] == keys[2]
    assert len(set(keys)) == 7


def test_one_item_is_opened_as_itself_and_several_in_order(tmp_path):
    paths = [str(write(tmp_path / f"{n}.csv", f"image,caption\n{n}.png,{n}\n")) for n in range(2)]
    assert captions_of(open_sources(paths, DataConfig())) == [("0",), ("1",)]
    assert isinstance(open_sources(paths[:1], DataConfig()), table.TableSource)


def test_subset_maps_indices():
    part = Subset(Numbers(5), numpy.array([4, 1]))
    assert len(part) == 2 and captions_of(part) == [("numbers 4",), ("numbers 1",)] and part.key(0) == "4"


def test_held_out_part_is_the_fraction_disjoint_and_whole_pictures(tmp_path):
    rows = "".join(f"{number % 1000}.png,caption {number}\n" for number in range(3000))
    source = opened(write(tmp_path / "pairs.csv", "image,caption\n" + rows))
    training, held_out = split_held_out(source, 0.1)
    kept = {training.key(index) for index in range(len(training))}
    taken = {held_out.key(index) for index in range(len(held_out))}
    assert not kept & taken and len(kept | taken) == 1000
    assert len(training) + len(held_out) == 3000
    assert 60 <= len(taken) <= 140  # 100 expected, standard deviation 9.5


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet", "bytes"])
def test_what_is_held_out_follows_from_the_keys_one_by_one(tmp_path, kind):
    paths = [f"{n % 70}.png" if n % 3 else f"deep\\{n}.png" for n in range(2500)]
    columns = {"image": paths if kind != "bytes" else [path.encode() for path in paths], "caption": ["a"] * 2500}
    if kind == "csv":
        rows = "\n".join(f"{path},a" for path in paths)
        source = opened(write(tmp_path / "pairs.csv", f"image,caption\n{rows}"))
    elif kind == "jsonl":
        rows = "\n".join(json.dumps({"image": path, "caption": "a"}) for path in paths)
        source = opened(write(tmp_path / "pairs.jsonl", rows))
    else:
        pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "pairs.parquet")
        source = opened(tmp_path / "pairs.parquet")
    keys = [source.key(index) for index in range(2500)]
    assert list(source.keys()) == keys
    training, held_out = split_held_out(source, 0.2)
    expected = [index for index, key in enumerate(keys) if fraction_of("held out", key) < 0.2]
    assert held_out.indices.tolist() == expected and len(training) == 2500 - len(expected) > 1500


def test_held_out_part_does_not_move_with_the_data_or_when_rows_are_added(tmp_path):
    parts = []
    for place, size in (("here", 500), ("there", 700)):
        rows = "".join(f"{number}.png,x\n" for number in range(size))
        _, held_out = split_held_out(opened(write(tmp_path / place / "pairs.csv", "image,caption\n" + rows)), 0.1)
        parts.append([held_out.key(index) for index in range(len(held_out))])
    before, after = parts
    assert before == after[: len(before)]


def test_a_source_with_its_own_held_out_part_keeps_it_beside_others():
    training, held_out = split_held_out(Concatenated([WithHeldOut(10), Numbers(400, "hashed")]), 0.1)
    assert captions_of(training)[:10] == [(f"numbers {index}",) for index in range(10)]
    assert captions_of(held_out)[:2] == [("held out 0",), ("held out 1",)]
    hashed = {text for (text,) in captions_of(held_out)[2:]}
    assert 15 <= len(hashed) <= 65
    assert hashed.isdisjoint({text for (text,) in captions_of(training)})


def test_nothing_is_held_out_at_fraction_zero_or_of_too_little():
    for source, fraction in ((Numbers(100), 0), (WithHeldOut(10), 0), (Numbers(1), 1e-9)):
        assert split_held_out(source, fraction) == (source, None)


def test_rows_are_not_held_in_python_lists(tmp_path):
    path = write(tmp_path / "pairs.csv", "image,caption\n" + "a.png,x\n" * 25_000)
    source = opened(path)
    assert len(source) == 25_000
    assert isinstance(source.table, pyarrow.Table) and source.table.nbytes < 25_000 * 20
    assert source[24_999].captions == ("x",)
    assert os.path.basename(source.name) == "pairs.csv"
