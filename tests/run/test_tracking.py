"""Trackers that fail: a full disk under TensorBoard ends the run in one line, anybody else's error does not end it."""

from __future__ import annotations

import errno
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from accelerate.utils import LoggerType
from tensorboard.summary.writer.record_writer import RecordWriter

from accel_clip import Config, train
from accel_clip.config import DataConfig, TrackConfig
from accel_clip.faults import StorageError
from accel_clip.run.folder import RunFolder
from accel_clip.run.tracking import Tracking
from helpers.commands import CPU_2, launch, losses_of
from helpers.launches import status_of
from helpers.models import small_model
from helpers.runs import short_config

FAKE_WANDB = r"""
import os


class Run:
    id = "1"

    def __init__(self):
        self.config = self

    def update(self, *values, **more):
        fail("config")

    def log(self, values, **more):
        fail("log")
        with open(os.environ["LOGGED"], "a") as lines:
            lines.write(",".join(values) + "\n")

    def finish(self):
        fail("finish")


def init(**settings):
    fail("init")
    return Run()


def fail(where):
    if where in os.environ.get("FAILS", ""):
        raise ConnectionError(f"no server at {where}\nsecond line")


Image, config, __version__ = repr, Run(), "0.19.0"
"""
FULL_PLUGIN = """
import errno
from tensorboard.summary.writer.record_writer import RecordWriter
def full(self, data):
    raise OSError(errno.ENOSPC, "No space left on device")
RecordWriter.write = full
"""


def config_for(folder: Path, *trackers: str) -> Config:
    data, track = DataConfig(train=["demo"], workers=0), TrackConfig(to=list(trackers), every=1)
    return short_config(folder / "run", "demo", small_model(folder), steps=3, data=data, track=track)


@pytest.fixture
def wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_plugins: None) -> Path:
    """Put a Weights & Biases without a server into the path; return the file that it writes a line a point to."""
    (tmp_path / "wandb.py").write_text(FAKE_WANDB)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("LOGGED", str(tmp_path / "logged"))
    monkeypatch.setitem(sys.modules, "wandb", None)  # so that what is imported in its place goes with the test
    del sys.modules["wandb"]
    monkeypatch.setattr("accelerate.tracking._available_trackers", [LoggerType.WANDB, LoggerType.TENSORBOARD])
    return tmp_path / "logged"


class Full:
    """Stands for the writing of TensorBoard on a disk that takes so many records and no more."""

    def __init__(self, num_records: int) -> None:
        self.left = num_records

    def write(self, data: bytes) -> None:
        if not self.left:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.left -= 1


@pytest.mark.parametrize("num_records", [0, 1, 6, 16])
def test_a_full_disk_under_tensorboard_ends_the_run_in_one_line(
    tmp_path: Path, num_records: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(RecordWriter, "write", Full(num_records).write)
    config = config_for(tmp_path, "tensorboard")
    with pytest.raises(StorageError, match=r"run/tensorboard: .*No space left on device.*track\.to") as caught:
        train(config)
    assert "\n" not in str(caught.value)
    status = status_of(Path(config.output_dir))
    assert (status["state"], status["exit_code"]) == (
        "failed",
        5,
    )
    assert "Traceback" not in capfd.readouterr().err  # of the thread that writes
    monkeypatch.undo()
    assert train(config).num_steps == 3 and len(losses_of(tmp_path / "run")) == 3


def test_a_disk_that_is_full_at_the_last_flush_leaves_the_run_to_be_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: RecordWriter) -> None:
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(RecordWriter, "close", full)
    config = config_for(tmp_path, "tensorboard")
    with pytest.raises(StorageError, match="quota"):
        train(config)
    assert status_of(Path(config.output_dir))["state"] == "failed"
    monkeypatch.undo()
    assert train(config).num_steps == 3 and status_of(Path(config.output_dir))["state"] == "complete"


def test_something_in_the_place_of_tensorboards_folder_is_told_at_the_start(tmp_path: Path) -> None:
    config = config_for(tmp_path, "tensorboard")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tensorboard").write_text("a file")
    with pytest.raises(StorageError, match="run/tensorboard"):
        train(config)


@pytest.mark.parametrize("fails", ["init", "config", "log", "finish"])
def test_another_tracker_that_fails_is_said_once_and_left_out(
    tmp_path: Path, wandb: Path, fails: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FAILS", fails)
    config = config_for(tmp_path, "wandb", "tensorboard")
    assert train(config).num_steps == 3
    said = [line for line in capfd.readouterr().err.splitlines() if "wandb" in line and "warning" in line]
    assert len(said) == 1 and f"no server at {fails} second line" in said[0]
    assert len(losses_of(tmp_path / "run")) == 3 and status_of(Path(config.output_dir))["state"] == "complete"
    assert list((tmp_path / "run" / "tensorboard").iterdir())
    assert wandb.exists() == (fails == "finish")


def test_the_stand_in_gets_every_point_as_long_as_it_works(tmp_path: Path, wandb: Path) -> None:
    train(config_for(tmp_path, "wandb"))
    points = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    names = [line.split(",") for line in wandb.read_text().splitlines()]
    assert [each for each in names if each != ["retrieval"]] == [list(point)[1:] for point in points]


def test_a_picture_that_a_tracker_cannot_show_does_not_end_the_run(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    class Blind:
        name = "blind"

        def log_images(self, *values: Any, **more: Any) -> None:
            raise ValueError("no pictures here")

    folder = RunFolder(tmp_path / "run")
    folder.create()
    tracking = Tracking(Accelerator(cpu=True), config_for(tmp_path), folder, "one run")
    tracking.trackers = [Blind()]
    for _ in range(2):
        tracking.log_picture(1, "retrieval", lambda: [[0]])
    assert tracking.trackers == [] and capfd.readouterr().err.count("no pictures here") == 1


@pytest.mark.slow
@pytest.mark.parametrize("full", [True, False])
def test_two_processes_end_together_or_go_on_together(tmp_path: Path, wandb: Path, full: bool) -> None:
    (tmp_path / "full.py").write_text(FULL_PLUGIN)
    words = ["--train.batch_size=8", "--train.steps=4", "--eval.every=100", "--track.every=1", "--train.threads=1"]
    words += [f"--output_dir={tmp_path / 'run'}", f"--model.name={small_model(tmp_path)}", "--data.workers=0"]
    words += ["--track.to=[tensorboard]", f"--plugins=[{tmp_path / 'full.py'}]"] if full else ["--track.to=[wandb]"]
    paths = f"{tmp_path}:{Path(__file__).parents[2]}"
    ended = launch(*words, folder=tmp_path, launcher=CPU_2, FAILS="log", LOGGED=str(wandb), PYTHONPATH=paths)
    if full:
        assert ended.code != 0 and ended.err.count("accel-clip: error: ") == 1 and "No space left" in ended.err
        assert "another process ended" not in ended.err
        assert status_of(tmp_path / "run")["exit_code"] == 5
    else:
        assert ended.code == 0, ended.err
        assert ended.err.count("left out, the run goes on") == 1 and len(losses_of(tmp_path / "run")) == 4
