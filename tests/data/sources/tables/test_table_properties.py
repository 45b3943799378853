"""Tables with odd cells of every kind, generated at random and read beside the readers of Python and pyarrow.

Always: every row of the file is a pair that is used or one that is counted with a reason, and what is used has the
picture and the captions of its row.
"""

from __future__ import annotations

import base64
import csv
import itertools
import json
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy
import pyarrow
import pyarrow.parquet
from hypothesis import assume
from hypothesis import strategies as st

from accel_clip.config import DataConfig
from accel_clip.data.bad_samples import REASONS, UnusableSample
from accel_clip.data.pictures.decode import decode_picture
from accel_clip.data.sources.base import Source
from accel_clip.data.sources.resolve import open_source
from accel_clip.faults import ConfigError
from helpers.generated import check, quick_and_slow
from helpers.pictures import numbered_picture

NUM_PICTURES = 4
PATHS = ("plain.png", "deep/two words.png", "deep/Caf\u00e9.png", "four.JPG")


@dataclass(frozen=True)
class Cell:
    """What is written, and what it means: a picture's number or captions; None where it is unusable."""

    written: Any
    meaning: Any


@dataclass(frozen=True)
class Row:
    image: Cell
    caption: Cell


# --- what is generated

TEXT = st.text(
    st.one_of(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), st.sampled_from("\"',;\t|\n [a1")),
    min_size=1,
    max_size=20,
).filter(lambda text: text.strip()[:1] not in tuple("[{(") and not text.strip().startswith("array"))


def stripped(texts: list[str]) -> tuple[str, ...]:
    return tuple(text.strip() for text in texts if text.strip())


def as_numpy_prints(texts: list[str]) -> str:
    return str(numpy.array(texts, dtype=object))


plain_captions = TEXT.map(lambda text: Cell(text, stripped([text])))
empty_captions = st.sampled_from(["", " ", "\t \n"]).map(lambda text: Cell(text, ()))
objects = st.dictionaries(st.sampled_from(["en", "zh", "raw"]), st.integers(), min_size=1)
printers = st.sampled_from([json.dumps, repr, as_numpy_prints, lambda texts: json.dumps(texts, ensure_ascii=False)])
printed_lists = st.builds(
    lambda texts, write: Cell(write(texts), stripped(texts)), st.lists(TEXT, min_size=1), printers
)
printed_objects = st.builds(lambda value, write: Cell(write(value), None), objects, st.sampled_from([json.dumps, repr]))
text_captions = st.one_of(
    plain_captions, plain_captions, plain_captions, empty_captions, printed_lists, printed_objects
)
json_captions = st.one_of(
    text_captions,
    st.none().map(lambda value: Cell(value, ())),
    st.integers().map(lambda number: Cell(number, (str(number),))),
    objects.map(lambda value: Cell(value, None)),
    st.lists(st.one_of(st.none(), TEXT)).map(lambda texts: Cell(texts, stripped([t for t in texts if t is not None]))),
)

numbers = st.integers(0, NUM_PICTURES - 1)
SPELLINGS: list[Callable[[str], str]] = [
    str,
    lambda path: "./" + path,
    lambda path: path.replace("/", "\\"),
    lambda path: unicodedata.normalize("NFD", path),
    quote,
    lambda path: f" {path} ",
    lambda path: path[:-3] + path[-3:].swapcase(),
    lambda path: path + "#3",
]
CONTENTS: list[Callable[[bytes], str]] = [
    lambda content: base64.b64encode(content).decode(),
    lambda content: base64.urlsafe_b64encode(content).decode().rstrip("="),
    lambda content: "data:image/png;base64," + base64.b64encode(content).decode(),
    repr,
    lambda content: repr({"bytes": content, "path": None}),
]
paths = st.builds(lambda number, spell: Cell(spell(PATHS[number]), number), numbers, st.sampled_from(SPELLINGS))
contents = st.builds(
    lambda number, write: Cell(write(numbered_picture(number)), number), numbers, st.sampled_from(CONTENTS)
)
broken_pictures = st.sampled_from(
    [
        "",
        "gone.png",
        "deep",
        "../plain.png",
        "['plain.png', 'four.JPG']",
        '{"height": 3}',
        "<PIL.Image.Image image mode=RGB size=4x4 at 0x7F>",
        base64.b64encode(numbered_picture(0)).decode()[:-30],
        "x" * 5000,
    ]
).map(lambda text: Cell(text, None))
text_pictures = st.one_of(paths, paths, contents, broken_pictures)
json_pictures = st.one_of(
    text_pictures,
    st.sampled_from([None, [], {"height": 3}, ["plain.png", "four.JPG"]]).map(lambda value: Cell(value, None)),
    numbers.map(lambda number: Cell([PATHS[number]], number)),
    numbers.map(lambda number: Cell({"path": PATHS[number], "bytes": None}, number)),
)
text_rows = st.lists(st.builds(Row, text_pictures, text_captions), min_size=1, max_size=12)
json_rows = st.lists(st.builds(Row, json_pictures, json_captions), min_size=1, max_size=12)


# --- what must hold


def outcome(source: Source, index: int) -> tuple[int | None, tuple[str, ...] | None]:
    """Return the picture's number and the captions of a pair; None, and never both, for what is unusable."""
    try:
        pair = source[index]
        number = decode_picture(pair.image, 1e6).getpixel((0, 0))[0]
    except UnusableSample as problem:
        assert problem.reason in REASONS and len(problem.detail) < 500
        return None, None
    return number, pair.captions


def assert_as_written(path: Path, rows: list[Row], **options: Any) -> bool:
    """Assert that every row is used as it is written or counted; return whether the file was opened at all.

    A file may be refused as a whole where most of its rows hold no picture, or no caption.
    """
    try:
        source = open_source(str(path), DataConfig(**options))
    except ConfigError as error:
        of_image = "data.image_key" in str(error)
        unusable = sum((row.image.meaning if of_image else row.caption.meaning) is None for row in rows)
        assert unusable > len(rows) / 2, error
        return False
    assert len(source) == len(rows)
    for index, row in enumerate(rows):
        number, captions = outcome(source, index)
        if row.image.meaning is None or row.caption.meaning is None:
            assert number is None, (index, row)
        else:
            assert (number, captions) == (row.image.meaning, row.caption.meaning), (index, row)
    assert [source.key(index) for index in range(len(rows))] == list(source.keys())  # type: ignore[attr-defined]
    return True


def with_pictures(folder: Path) -> Path:
    for number, name in enumerate(PATHS):
        (folder / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "set" / name).write_bytes(numbered_picture(number))
    (folder / "plain.png").write_bytes(numbered_picture(99))  # outside of the root
    return folder / "set"


@quick_and_slow(20, 1000)
def test_delimited_tables(num_examples: int, tmp_path: Path) -> None:
    root, numbered = with_pictures(tmp_path), itertools.count()
    dialects = st.tuples(
        st.sampled_from([(",", ".csv"), (";", ".csv"), ("\t", ".tsv"), ("|", ".csv"), ("\t", ".csv")]),
        st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
        st.sampled_from(["\n", "\r\n"]),
        st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32"]),
        st.booleans(),
    )

    def try_one(value: Any) -> bool:
        rows, ((separator, suffix), quoting, end, encoding, is_image_first) = value
        path = root / f"{next(numbered)}{suffix}"
        with path.open("w", encoding=encoding, newline="") as file:
            table = csv.writer(file, delimiter=separator, quoting=quoting, lineterminator=end)
            order = slice(None, None, 1 if is_image_first else -1)
            table.writerow(["image", "caption"][order])
            table.writerows([row.image.written, row.caption.written][order] for row in rows)
        with path.open(encoding=encoding, newline="") as file:  # its writer leaves a lone carriage return unquoted
            assume(len(list(csv.reader(file, delimiter=separator))) == len(rows) + 1)
        return assert_as_written(path, rows, encoding="utf-8", quoting="standard")

    check(st.tuples(text_rows, dialects), num_examples, try_one)


@quick_and_slow(20, 1000)
def test_json_lines_and_lists(num_examples: int, tmp_path: Path) -> None:
    root, numbered = with_pictures(tmp_path), itertools.count()

    def try_one(value: tuple[list[Row], bool, bool]) -> bool:
        rows, is_list, is_ascii = value
        contents = [{"image": row.image.written, "caption": row.caption.written, "other": {"a": [1]}} for row in rows]
        path = root / f"{next(numbered)}{'.json' if is_list else '.jsonl'}"
        lines = [json.dumps(each, ensure_ascii=is_ascii) for each in contents]
        path.write_text(json.dumps(contents) if is_list else "\n".join(lines) + "\n", encoding="utf-8", newline="")
        return assert_as_written(path, rows)

    check(st.tuples(json_rows, st.booleans(), st.booleans()), num_examples, try_one)


def stored(numbers_or_none: list[int | None], kind: str) -> pyarrow.Array:
    """Return pictures as parquet tables have them."""
    raw = [None if number is None else numbered_picture(number) for number in numbers_or_none]
    structs = [None if content is None else {"bytes": content, "path": None} for content in raw]
    names = [None if number is None else PATHS[number] for number in numbers_or_none]
    struct = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    return {
        "bytes": lambda: pyarrow.array(raw, pyarrow.large_binary()),
        "structs": lambda: pyarrow.array(structs, struct),
        "lists": lambda: pyarrow.array([[each] for each in structs], pyarrow.list_(struct)),
        "paths": lambda: pyarrow.array(names, pyarrow.large_string()),
        "categories": lambda: pyarrow.array(names, pyarrow.string()).dictionary_encode(),
    }[kind]()


@quick_and_slow(8, 300)
def test_parquet_tables_and_their_parts(num_examples: int, tmp_path: Path) -> None:
    root, numbered = with_pictures(tmp_path), itertools.count()
    kinds = st.sampled_from(["bytes", "structs", "lists", "paths", "categories"])
    captions = st.lists(st.one_of(st.none(), st.lists(st.one_of(st.none(), TEXT))), min_size=12, max_size=12)
    shapes = st.tuples(st.lists(st.one_of(numbers, numbers, st.none()), min_size=1, max_size=12), captions)

    def try_one(value: Any) -> bool:
        (pictures, texts), kind, num_parts = value
        texts = texts[: len(pictures)]
        table = pyarrow.table(
            {
                "image": stored(pictures, kind),
                "caption": pyarrow.array(texts, pyarrow.list_(pyarrow.string())),
                "other": pyarrow.array([[("a", 1)]] * len(pictures), pyarrow.map_(pyarrow.string(), pyarrow.int8())),
            }
        )
        folder = root / f"{next(numbered)}.parquet"
        folder.mkdir()
        size = -(-len(pictures) // num_parts)
        for part in range(num_parts):
            pyarrow.parquet.write_table(table.slice(part * size, size), folder / f"part-{part:05d}.snappy.parquet")
        assert sum(pyarrow.parquet.read_metadata(file).num_rows for file in folder.iterdir()) == len(pictures)
        meanings = [stripped([text for text in each or [] if text is not None]) for each in texts]
        rows = [Row(Cell(None, a), Cell(None, b)) for a, b in zip(pictures, meanings, strict=True)]
        return assert_as_written(folder, rows)

    check(st.tuples(shapes, kinds, st.integers(1, 3)), num_examples, try_one)
