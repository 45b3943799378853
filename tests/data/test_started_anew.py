"""Workers that are started anew and not forked: the rule on macOS and Windows, and from Python 3.14 on everywhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from accel_clip.faults import recognise
from helpers.commands import train_py
from helpers.models import small_model

STARTED_ANEW = """
import multiprocessing
import numpy
from accel_clip import SOURCES
from PIL import Image
from accel_clip.data.sources.base import Pair

if multiprocessing.parent_process() is None:
    multiprocessing.set_start_method("METHOD", force=True)


class Own:
    def __init__(self): self.name = "own"
    def __len__(self): return 64
    def __getitem__(self, index):
        FAIL
        return Pair(Image.fromarray(numpy.full((40, 40, 3), index, numpy.uint8)), (f"number {index}",))
    def key(self, index): return str(index)


@SOURCES.register("own")
def own(argument, options): return Own()
"""


def words(folder: Path, method: str, fail: str = "pass") -> tuple[str, ...]:
    (folder / "plugin.py").write_text(STARTED_ANEW.replace("METHOD", method).replace("FAIL", fail))
    model = ("--model.name", small_model(folder), "--plugins", "plugin.py", "--data.train", "own", "--track.to", "[]")
    return (
        *model,
        "--output_dir",
        method,
        "--train.steps",
        "3",
        "--train.batch_size",
        "16",
        "--data.val_fraction",
        "0.2",
    )


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_plugins_run_in_workers_before_what_they_define_arrives(method: str, tmp_path: Path) -> None:
    runs = {}
    for name in ("fork", method):
        done = train_py(*words(tmp_path, name), "--data.workers", "1", "--track.every", "1", folder=tmp_path)
        assert done.code == 0, done.err
        runs[name] = [json.loads(line).get("loss") for line in (tmp_path / name / "metrics.jsonl").open()]
        assert done.err.count("plugins: running") == 1
    assert runs["fork"] == runs[method]


@pytest.mark.parametrize(
    ("end", "said", "unsaid"),
    [
        ("is killed by signal: Killed", "memory", "decoder"),
        ("is killed by signal: Segmentation fault", "whether a picture crashes the decoder", "memory"),
        ("exited unexpectedly", "ended by itself: its own error stands above", "memory"),
    ],
)
def test_memory_is_blamed_only_where_the_kernel_killed(end: str, said: str, unsaid: str) -> None:
    plural = "(s)" if "exited" in end else ""
    told = recognise(RuntimeError(f"DataLoader worker (pid{plural} 4711) {end}. It is possible that …"))
    assert told is not None and "4711" in str(told) and said in str(told) and unsaid not in str(told)
