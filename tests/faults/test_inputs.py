"""Data and files that change between two starts of a run: told with what changed, before any step."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from accel_clip import Config
from accel_clip.checkpoint.manifest import Checkpoint
from accel_clip.config import DataConfig, EvalConfig, LossConfig, ModelConfig, SourceConfig
from accel_clip.data.pairs import open_training
from accel_clip.data.sources import rows
from accel_clip.data.sources.base import SOURCES, Pair
from accel_clip.data.sources.resolve import open_labelled
from accel_clip.faults import ConfigError
from accel_clip.run.inputs import Inputs
from helpers.commands import train_py
from helpers.models import SMALL_MODEL

NUM_PAIRS = 12


def picture(number: int, kind: str = "BMP") -> bytes:
    """Return a picture; all of a kind take as many bytes."""
    content = io.BytesIO()
    Image.new("RGB", (12, 10), (20 * number, 255 - 10 * number, 7)).save(content, kind)
    return content.getvalue()


def captions() -> list[str]:
    return [f"picture number {number:02d}" for number in range(NUM_PAIRS)]


def write_pictures(folder: Path) -> list[str]:
    for number in range(NUM_PAIRS):
        (folder / f"{number:02d}.bmp").write_bytes(picture(number))
    return [f"{number:02d}.bmp" for number in range(NUM_PAIRS)]


def write_table(folder: Path, names: list[str] | None = None, texts: list[str] | None = None) -> str:
    names = names or write_pictures(folder)
    rows = [f"{name},{text}" for name, text in zip(names, texts or captions(), strict=True)]
    (folder / "pairs.csv").write_text("\n".join(["image,caption", *rows]))
    return str(folder / "pairs.csv")


def write_parquet(folder: Path, pictures: list[bytes] | None = None, texts: list[str] | None = None) -> str:
    pictures = pictures or [picture(number) for number in range(NUM_PAIRS)]
    table = pyarrow.table({"image": pictures, "caption": [[text, "b"] for text in texts or captions()]})
    pyarrow.parquet.write_table(table, folder / "pairs.parquet")
    return str(folder / "pairs.parquet")


def write_folder(folder: Path, texts: list[str] | None = None) -> str:
    for name, text in zip(write_pictures(folder), texts or captions(), strict=True):
        (folder / name).with_suffix(".txt").write_text(text)
    return str(folder)


def write_shards(folder: Path, texts: list[str] | None = None) -> str:
    texts = texts or captions()
    for shard in range(2):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for number in range(shard, NUM_PAIRS, 2):
                for ending, content in (("bmp", picture(number)), ("txt", texts[number].encode())):
                    member = tarfile.TarInfo(f"{number}.{ending}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return str(folder / "{0,1}.tar")


def inputs_of(config: Config) -> Inputs:
    opened = open_training(config.data, ())
    zero_shot = config.eval.zero_shot
    labelled = None if zero_shot is None else open_labelled(zero_shot, config.data, config.eval.label_key)
    return Inputs(config, {"data.train": opened.source, "data.val": opened.held_out, "eval.zero_shot": labelled})


def checkpoint_of(config: Config, run: Path, listed: list[Any] | None = None) -> Checkpoint:
    """Return a checkpoint as a run writes it, as far as inputs are concerned."""
    inputs = inputs_of(config)
    folder = run / "checkpoints" / "step-00000001"
    folder.mkdir(parents=True)
    inputs.keep(folder.parent)
    state = {"inputs": inputs.state_dict(), "bad_samples": {"listed": listed or []}}
    (folder / "state.json").write_text(json.dumps(state))
    return Checkpoint(folder, 1, 1, {})


def config_for(train: str, **more: Any) -> Config:
    return Config(data=DataConfig(train=[train], val_fraction=0.3), **more)


def touch_later(folder: Path) -> None:
    for file in folder.rglob("*"):
        os.utime(file, ns=(0, file.stat().st_mtime_ns + 5 * 10**9))


def swapped(texts: list[str]) -> list[str]:
    return [texts[1], texts[0], *texts[2:]]


def shifted(texts: list[str]) -> list[str]:
    return [*texts[1:], texts[0]]


def replaced(folder: Path, *numbers: int) -> None:
    """Put other pictures of as many bytes in the place of some."""
    for number in numbers:
        (folder / f"{number:02d}.bmp").write_bytes(picture(number + 1))


ORDER = "its rows stand in another order"
CHANGES: dict[str, tuple[Callable[[Path], str], Callable[[Path], object], str]] = {
    "captions of a table": (write_table, lambda f: write_table(f, texts=shifted(captions())), "captions: 12 of 12"),
    "two captions": (write_table, lambda f: write_table(f, texts=swapped(captions())), "captions: 2 of 12"),
    "rows reversed": (write_table, lambda f: write_table(f, write_pictures(f)[::-1], captions()[::-1]), ORDER),
    "names": (write_table, lambda f: write_table(f, ["x.bmp", *write_pictures(f)[1:]]), "names of pictures: 1 of 12"),
    "a row more": (write_table, lambda f: write_table(f, [*write_pictures(f), "z.bmp"], [*captions(), "z"]), "12 rows"),
    "pictures": (write_table, lambda f: replaced(f, 3, 7), "pictures: 2 of 12 differ, the first is 03.bmp, row 4"),
    "a picture is gone": (write_table, lambda f: (f / "05.bmp").unlink(), "pictures: 1 of 12 .* 05.bmp"),
    "bytes": (write_parquet, lambda f: write_parquet(f, [picture(1)] * NUM_PAIRS), "names of pictures: 11 of 12"),
    "lists of captions": (write_parquet, lambda f: write_parquet(f, texts=shifted(captions())), "captions: 12 of 12"),
    "bytes reversed": (
        write_parquet,
        lambda f: write_parquet(f, [picture(n) for n in range(NUM_PAIRS)][::-1], captions()[::-1]),
        ORDER,
    ),
    "caption files": (write_folder, lambda f: write_folder(f, swapped(captions())), "captions: 2 of 12"),
    "pictures of a folder": (write_folder, lambda f: replaced(f, 0), "pictures: 1 of 12 differ, the first is 00.bmp"),
    "shards": (write_shards, lambda f: write_shards(f, swapped(captions())), "shards: 2 of 2 differ.*0.tar"),
    "longer captions": (write_shards, lambda f: write_shards(f, [c * 99 for c in captions()]), "places in shards: 2"),
}


@pytest.mark.parametrize("details", ["kept", "lost", "cut", "short"])
@pytest.mark.parametrize("case", CHANGES)
def test_data_that_changed_is_refused_with_what_changed_and_the_ways_out(
    tmp_path: Path, case: str, details: str
) -> None:
    write, change, said = CHANGES[case]
    data = tmp_path / "data"
    data.mkdir()
    config = config_for(write(data))
    checkpoint = checkpoint_of(config, tmp_path / "run")
    inputs_of(config).require_same_as_in(checkpoint)
    change(data)
    touch_later(data)
    if details != "kept":
        [kept] = (tmp_path / "run" / "checkpoints").glob("rows-*.npz")
        kept.write_bytes(kept.read_bytes()[: 99 if details == "cut" else -400]) if details != "lost" else kept.unlink()
        said = r"data\.train: .* is not what the run began with: "
    with pytest.raises(ConfigError, match=said) as refused:
        inputs_of(config).require_same_as_in(checkpoint)
    for part in ("data.train: ", "put it back", "another output_dir"):
        assert part in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("write", [write_table, write_parquet, write_folder, write_shards])
def test_data_that_moved_or_was_copied_is_the_same(tmp_path: Path, write: Callable[[Path], str]) -> None:
    data = tmp_path / "data"
    data.mkdir()
    written = write(data)
    checkpoint = checkpoint_of(config_for(written), tmp_path / "run")
    touch_later(data)
    shutil.move(data, tmp_path / "elsewhere")
    inputs_of(config_for(written.replace(str(data), str(tmp_path / "elsewhere")))).require_same_as_in(checkpoint)


def test_pictures_may_move_under_another_image_root(tmp_path: Path) -> None:
    table = write_table(tmp_path)
    checkpoint = checkpoint_of(config_for(table), tmp_path / "run")
    (tmp_path / "moved").mkdir()
    for file in tmp_path.glob("*.bmp"):
        file.rename(tmp_path / "moved" / file.name)
    config = config_for(table)
    moved = replace(config, data=replace(config.data, image_root=str(tmp_path / "moved")))
    inputs_of(moved).require_same_as_in(checkpoint)
    with pytest.raises(ConfigError, match="pictures: 12 of 12 differ"):
        inputs_of(config).require_same_as_in(checkpoint)


def test_what_the_run_could_not_use_may_be_mended(tmp_path: Path) -> None:
    """A picture that was missing, one that it listed as unreadable, and a caption that it listed as missing."""
    table = write_table(tmp_path, texts=["", *captions()[1:]])
    (tmp_path / "02.bmp").unlink()
    (tmp_path / "03.bmp").write_bytes(b"<html>")
    checkpoint = checkpoint_of(config_for(table), tmp_path / "run", [[table, 0], [table, 3], ["another", 5]])
    write_table(tmp_path)
    inputs_of(config_for(table)).require_same_as_in(checkpoint)
    replaced(tmp_path, 5)
    with pytest.raises(ConfigError, match=r"pictures: 1 of 12 differ, the first is 05\.bmp"):
        inputs_of(config_for(table)).require_same_as_in(checkpoint)


def test_where_contents_are_too_large_to_be_read_sizes_and_times_decide(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rows, "MOST_BYTES", 2 * len(picture(0)))
    config = config_for(write_table(tmp_path))
    checkpoint = checkpoint_of(config, tmp_path / "run")
    known = numpy.flatnonzero(inputs_of(config).sources["data.train"].rows.contents)
    assert known.tolist() == [0, 6]
    replaced(tmp_path, 4)
    with pytest.raises(ConfigError, match=r"pictures: 1 of 12 differ, the first is 04\.bmp"):
        inputs_of(config).require_same_as_in(checkpoint)
    write_pictures(tmp_path)
    touch_later(tmp_path)
    inputs_of(config).require_same_as_in(checkpoint)
    assert "all pictures have another time and the same size: they are taken for a copy" in capsys.readouterr().err
    replaced(tmp_path, 6)
    with pytest.raises(ConfigError, match="pictures: "):
        inputs_of(config).require_same_as_in(checkpoint)


def test_only_some_files_of_many_are_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "MOST_FILES", 5)
    config = config_for(write_folder(tmp_path))
    found = inputs_of(config).sources["data.train"].rows
    assert numpy.flatnonzero(found.sizes).tolist() == numpy.flatnonzero(found.texts).tolist() == [0, 3, 6, 9]
    checkpoint = checkpoint_of(config, tmp_path / "run")
    (tmp_path / "09.txt").write_text("another")
    with pytest.raises(ConfigError, match=r"captions: 1 of 12 differ, the first is 09\.bmp, row 10"):
        inputs_of(config).require_same_as_in(checkpoint)


@pytest.mark.parametrize("setting", ["data.val", "eval.zero_shot"])
def test_what_a_run_is_measured_on_is_compared_too(tmp_path: Path, setting: str) -> None:
    for name in ("train", "measured"):
        (tmp_path / name).mkdir()
    train, measured = write_table(tmp_path / "train"), write_table(tmp_path / "measured")
    config = config_for(train)
    if setting == "data.val":
        config = replace(config, data=replace(config.data, val=[measured]))
    else:
        config = replace(config, eval=EvalConfig(zero_shot=measured, label_key="caption"))
    checkpoint = checkpoint_of(config, tmp_path / "run")
    write_table(tmp_path / "measured", texts=swapped(captions()))
    with pytest.raises(ConfigError, match=rf"{setting}: .*captions: 2 of 12"):
        inputs_of(config).require_same_as_in(checkpoint)
    if setting == "eval.zero_shot":  # which may be another one, openly
        other = replace(config, eval=EvalConfig(zero_shot=train, label_key="caption"))
        inputs_of(other).require_same_as_in(checkpoint)


def test_the_second_of_several_sources_is_named(tmp_path: Path) -> None:
    written = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        written.append(write_table(tmp_path / name))
    data = DataConfig(train=[SourceConfig(written[0], weight=2.0), SourceConfig(written[1])])
    checkpoint = checkpoint_of(Config(data=data), tmp_path / "run")
    write_table(tmp_path / "b", texts=swapped(captions()))
    with pytest.raises(ConfigError, match=r"data\.train\[1\]: .*b/pairs\.csv"):
        inputs_of(Config(data=data)).require_same_as_in(checkpoint)


def test_a_source_of_ones_own_that_reads_a_file(tmp_path: Path, own_entries: None) -> None:
    @SOURCES.register("own")
    class Own:
        name = "own"

        def __init__(self, file: str, options: Any) -> None:
            self.lines = Path(file).read_text().splitlines()
            self.folder = Path(file).parent

        def __len__(self) -> int:
            return len(self.lines)

        def __getitem__(self, index: int) -> Pair:
            return Pair(self.folder / self.key(index), (self.lines[index],))

        def key(self, index: int) -> str:
            return f"{index:02d}.bmp"

    write_pictures(tmp_path)
    listed = tmp_path / "listed.txt"
    listed.write_text("\n".join(captions()))
    config = config_for(f"own:{listed}")
    checkpoint = checkpoint_of(config, tmp_path / "run")
    listed.write_text("\n".join(swapped(captions())))
    with pytest.raises(ConfigError, match=r"data\.train\[0\]: the content of .*listed\.txt has changed"):
        inputs_of(config).require_same_as_in(checkpoint)
    listed.write_text("\n".join(captions()))
    replaced(tmp_path, 2)
    with pytest.raises(ConfigError, match=r"data\.train: own .*pictures: 1 of 12 differ, the first is 02\.bmp"):
        inputs_of(config).require_same_as_in(checkpoint)


def files_named(folder: Path) -> Config:
    """Return settings that name files of every kind."""
    text_tower = folder / "tower"
    text_tower.mkdir()
    (text_tower / "config.json").write_text("{}")
    described = json.loads(SMALL_MODEL)
    described["text_cfg"]["hf_model_name"] = str(text_tower)
    (folder / "model.json").write_text(json.dumps(described))
    for name in ("plugin.py", "weights.pt", "tower.pt", "teacher.safetensors"):
        (folder / name).write_bytes(name.encode())
    (folder / "taught").mkdir()
    (folder / "taught" / "open_clip_config.json").write_text("{}")
    return Config(
        plugins=[str(folder / "plugin.py")],
        model=ModelConfig(
            str(folder / "model.json"),
            str(folder / "weights.pt"),
            {"pretrained_image_path": str(folder / "tower.pt"), "force_image_size": 32},
        ),
        loss=LossConfig(
            "distill",
            {
                "teachers": [
                    {"name": "ViT-B-32", "pretrained": str(folder / "teacher.safetensors")},
                    {"name": f"local-dir:{folder / 'taught'}"},
                ]
            },
        ),
    )


NAMED = {
    "model.json": r"model\.name: ",
    "weights.pt": r"model\.pretrained: ",
    "tower.pt": r"model\.options\.pretrained_image_path: ",
    "plugin.py": r"plugins\[0\]: ",
    "teacher.safetensors": r"loss\.options\.teachers\[0\]\.pretrained: ",
    "taught/open_clip_config.json": r"loss\.options\.teachers\[1\]\.name/open_clip_config\.json: ",
    "tower/config.json": r"model\.name:\.text_cfg\.hf_model_name/config\.json: ",
}


@pytest.mark.parametrize("file", NAMED)
def test_files_that_settings_name_are_compared(tmp_path: Path, file: str) -> None:
    config = files_named(tmp_path)
    checkpoint = checkpoint_of(config, tmp_path / "run")
    touch_later(tmp_path)
    inputs_of(config).require_same_as_in(checkpoint)
    content = (tmp_path / file).read_bytes()
    (tmp_path / file).write_bytes(content[:-1] + (b" " if content[-1:] != b" " else b"\n"))
    with pytest.raises(ConfigError, match=NAMED[file] + r"the content of .* has changed since the run began"):
        inputs_of(config).require_same_as_in(checkpoint)
    (tmp_path / file).unlink()  # whoever reads it says so, or does without
    inputs_of(config).require_same_as_in(checkpoint)


def test_a_checkpoint_that_says_nothing_of_its_inputs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = config_for(write_table(tmp_path))
    checkpoint = checkpoint_of(config, tmp_path / "run")
    (checkpoint.path / "state.json").write_text('{"bad_samples": {"listed": []}}')
    inputs_of(config).require_same_as_in(checkpoint)
    assert "are not compared" in capsys.readouterr().err


def flags_of(folder: Path, *more: str) -> list[str]:
    words = ["--train.batch_size=4", "--train.steps=6", "--train.threads=1", "--track.to=[]", "--checkpoint.every=1"]
    words += [f"--output_dir={folder / 'run'}", f"--data.train={folder / 'pairs.csv'}", "--data.val_fraction=0"]
    return [*words, f"--model.name={folder / 'small.json'}", "--data.workers=0", *more]


@pytest.mark.slow
@pytest.mark.parametrize("changed", ["captions", "model", "plugin", "nothing"])
def test_a_killed_run_is_refused_before_any_step_when_its_inputs_have_changed(tmp_path: Path, changed: str) -> None:
    write_table(tmp_path)
    (tmp_path / "small.json").write_text(SMALL_MODEL)
    (tmp_path / "plugin.py").write_text("FACTOR = 1\n")
    words = flags_of(tmp_path, f"--plugins=[{tmp_path / 'plugin.py'}]")
    assert train_py(*words, folder=tmp_path, ACCEL_CLIP_FAULT="latest:2").code == 9
    files = {file: file.stat().st_mtime_ns for file in (tmp_path / "run").rglob("*") if file.is_file()}
    if changed == "captions":
        write_table(tmp_path, texts=shifted(captions()))
    elif changed == "model":
        described = json.loads(SMALL_MODEL)
        described["vision_cfg"]["patch_dropout"] = 0.5
        (tmp_path / "small.json").write_text(json.dumps(described))
    elif changed == "plugin":
        (tmp_path / "plugin.py").write_text("FACTOR = 2\n")
    done = train_py(*words, folder=tmp_path)
    if changed == "nothing":
        assert done.code == 0
        return
    said = {"captions": "captions: 12 of 12 differ", "model": "model.name: the content of", "plugin": "plugins[0]: "}
    assert done.code == 2 and said[changed] in done.err and "Traceback" not in done.err
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "run").rglob("*") if file.is_file()} == files
