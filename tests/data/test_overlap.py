"""Held-out pairs whose pictures are trained on: found by path, by bytes, by member, and as copies."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy
import pyarrow
from PIL import Image
from pyarrow import parquet

from accel_clip.config import DataConfig
from accel_clip.data.pairs import open_training
from accel_clip.data.sources.combine import Subset
from accel_clip.data.sources.resolve import open_source
from accel_clip.evaluation.validation import read_held_out
from helpers.shards import numbered, write_tar


def table(file: Path, pictures: list[str]) -> str:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("image,caption\n" + "".join(f"{each},a word\n" for each in pictures))
    return str(file)


def pictures(folder: Path, number: int) -> list[str]:
    folder.mkdir(parents=True)
    for each in range(number):
        Image.new("RGB", (8, 8), (each, 3 * each, 7)).save(folder / f"{each}.png")
    return [f"{folder}/{each}.png" for each in range(number)]


def shared(train: list[str], val: str) -> int:
    return open_training(DataConfig(train=train, val=[val])).num_shared


def test_paths_written_in_another_way_are_the_same_pictures(tmp_path, capsys):
    files = pictures(tmp_path / "a", 9)
    train = table(tmp_path / "train.csv", [f"a/{Path(file).name}" for file in files])
    val = table(tmp_path / "a" / "val.csv", ["3.png", "../a/4.png", files[5], files[5], "gone.png"])
    other = table(tmp_path / "other.csv", ["b/c/gone.png"])
    assert shared([other, train], val) == 4
    assert "data.val: 4 of its 5 pairs show pictures that are trained on" in capsys.readouterr().err
    assert shared([other], val) == 0 and "trained on" not in capsys.readouterr().err


def test_copies_under_other_names_are_the_same_pictures(tmp_path):
    files = pictures(tmp_path / "a", 9)
    new = tmp_path / "b"
    new.mkdir()
    for number in (1, 2):
        shutil.copy(files[number], new / f"copy{number}.png")
    Image.new("RGB", (8, 8), "white").save(new / "3.png")
    val = table(tmp_path / "val.csv", ["b/copy1.png", "b/copy2.png", "b/3.png"])
    assert shared([table(tmp_path / "train.csv", files)], val) == 2
    assert shared([table(tmp_path / "train.csv", files[3:])], val) == 0


def test_bytes_in_tables_and_members_of_shards(tmp_path):
    contents = [Path(file).read_bytes() for file in pictures(tmp_path / "a", 6)]
    for name, part in (("train", contents[:4]), ("val", contents[2:])):
        rows = pyarrow.table({"image": pyarrow.array(part, pyarrow.binary()), "caption": ["x"] * len(part)})
        parquet.write_table(rows, tmp_path / f"{name}.parquet")
    assert shared([str(tmp_path / "train.parquet")], str(tmp_path / "val.parquet")) == 2
    first, second = (str(write_tar(tmp_path / f"{name}.tar", numbered(name == "y"))) for name in "xy")
    assert shared([first], first) == 3 and shared([first], second) == 0


def test_a_part_that_is_held_out_by_fraction_shares_nothing_and_few_pairs_are_told(tmp_path, capsys):
    train = table(tmp_path / "train.csv", pictures(tmp_path / "a", 40))
    opened = open_training(DataConfig(train=[train], val_fraction=0.3))
    assert opened.num_shared == 0 and isinstance(opened.held_out, Subset)
    read_held_out(opened.held_out)
    assert f"there are {len(opened.held_out)}, and below 32 loss and recall say little" in capsys.readouterr().err
    read_held_out(Subset(opened.held_out, numpy.arange(1)))
    assert "there is 1, which is right whatever the model is" in capsys.readouterr().err
    read_held_out(open_source(train, DataConfig()))
    assert "say little" not in capsys.readouterr().err
