"""Runs that are asked to stop while they wait: for data, for what is computed once, for each other, in a library."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from helpers.commands import CPU_2, ROOT, losses_of, outside_of_launches
from helpers.launches import ALONE, hear_interrupts
from helpers.models import small_model
from helpers.patience import HANG_SECONDS

pytestmark = pytest.mark.slow

TROUBLED = '''
import os
import time
from pathlib import Path

import torch
from accel_clip import LOSSES, SOURCES
from accel_clip.data.sources.demo import open_demo
from torch.utils.data import get_worker_info

NUM_PAIRS = 300


def stay(where):
    """Wait as long as a file is there that names a place, and say so by another."""
    while Path(f"stay-{where}").exists():
        Path("staying").touch()
        time.sleep(0.05)


@SOURCES.register("staying")
class Staying:
    """Drawings that do not come from loader workers, from a middle one on, while `stay-data` is there."""

    name = "staying"

    def __init__(self, argument, options):
        self.drawings = open_demo("", options)

    def __len__(self):
        return NUM_PAIRS

    def __getitem__(self, index):
        if get_worker_info() is not None and index % NUM_PAIRS >= 100:
            stay("data")
        return self.drawings[index]

    def key(self, index):
        return self.drawings.key(index)


@LOSSES.register("staying")
class StayingLoss:
    """The contrastive loss, which never comes while `stay-step` is there; its first call is a trial."""

    def __init__(self):
        self.number = -1

    def __call__(self, image_features, text_features, logit_scale, output_dict=True):
        self.number += image_features.requires_grad
        if self.number > 0:
            self.stay()
        logits = logit_scale * image_features @ text_features.T
        return {"own_loss": torch.nn.functional.cross_entropy(logits, torch.arange(len(logits)))}

    def stay(self):
        try:
            stay("step")
        except KeyboardInterrupt:
            stay("deaf")
            raise
'''
NUM_STEPS = 4


class Folder:
    """A folder in which runs wait where a file says so."""

    def __init__(self, path: Path) -> None:
        self.path, self.run = path, path / "run"
        (path / "troubled.py").write_text(TROUBLED)
        small_model(path)

    def stay(self, *places: str) -> None:
        """Let runs wait in some places and nowhere else."""
        for file in self.path.glob("stay*"):
            file.unlink()
        for place in places:
            (self.path / f"stay-{place}").touch()

    def command(self, launcher: tuple[str, ...], *more: str) -> list[str]:
        words = {
            "--model.name": "small.json",
            "--plugins": "troubled.py",
            "--loss.name": "staying",
            "--data.train": "staying:",
            "--data.val_fraction": "0",
            "--data.workers": "1",
            "--train.steps": str(NUM_STEPS),
            "--train.batch_size": "8",
            "--train.threads": "1",
            "--track.to": "[]",
            "--track.every": "1",
            "--output_dir": "run",
        } | dict(zip(more[::2], more[1::2], strict=True))
        launched = ["-m", "accelerate.commands.launch", *launcher] if launcher else []
        return [sys.executable, *launched, str(ROOT / "train.py"), *(word for pair in words.items() for word in pair)]

    def status(self) -> dict[str, Any]:
        status: dict[str, Any] = json.loads((self.run / "STATUS.json").read_text())
        return status


@contextmanager
def started(folder: Folder, command: list[str]) -> Iterator[subprocess.Popen[str]]:
    """Start a command in a folder; what is left of it at the end is killed."""
    process = subprocess.Popen(
        command,
        cwd=folder.path,
        env=outside_of_launches(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=hear_interrupts,  # noqa: PLW1509  sets a handler alone
    )
    everyone = [psutil.Process(process.pid)]
    try:
        yield process
    finally:
        everyone += [each for known in everyone if known.is_running() for each in known.children(recursive=True)]
        for each in everyone:
            if each.is_running():
                each.kill()
        process.wait()


def stopped_while_staying(folder: Folder, command: list[str]) -> tuple[int, str]:
    """Send SIGTERM to a command that waits somewhere; return how it ended, and what it said."""
    with started(folder, command) as process:
        while not (folder.path / "staying").exists():
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.05)
        children = psutil.Process(process.pid).children(recursive=True)
        time.sleep(0.5)
        process.terminate()
        said = process.communicate(timeout=HANG_SECONDS)[1]
        alive = psutil.wait_procs(children, timeout=HANG_SECONDS)[1]
        assert not [each for each in alive if each.status() != psutil.STATUS_ZOMBIE], said
    return process.returncode, said


PLACES = {
    "pictures": ("--data.image_cache_gib", "1"),
    "features": ("--model.freeze", "image", "--train.cache_features", "true", "--data.augmentation", "none"),
    "evaluation": ("--data.val", "staying:"),
}


@pytest.mark.parametrize("launcher", [ALONE, CPU_2], ids=["1", "2"])
@pytest.mark.parametrize("place", PLACES)
def test_a_stop_is_heard_in_long_work_before_the_first_step(
    place: str, launcher: tuple[str, ...], tmp_path: Path
) -> None:
    folder = Folder(tmp_path)
    command = folder.command(launcher, *PLACES[place])
    folder.stay("data")
    code, said = stopped_while_staying(folder, command)
    assert code == (1 if launcher else 75), said  # torchrun says 1 for all failures
    assert "stopped at step 0 and saved" in said and "Exception ignored" not in said
    assert launcher or "Traceback" not in said  # torchrun's own says that it was stopped
    status = folder.status()
    assert (status["state"], status["step"], status["exit_code"]) == ("preempted", 0, 75)
    folder.stay()
    with started(folder, command) as process:
        said = process.communicate(timeout=HANG_SECONDS)[1]
    assert process.returncode == 0 and "going on from" in said, said
    assert folder.status()["state"] == "complete" and len(losses_of(folder.run)) == NUM_STEPS


def test_a_stop_is_heard_while_batches_do_not_come(tmp_path: Path) -> None:
    """Here after a step: the batches that were fetched and not trained on are trained on when the run goes on."""
    folder = Folder(tmp_path)
    command = folder.command(ALONE, "--checkpoint.every", "1")
    folder.stay("data")
    code, said = stopped_while_staying(folder, command)
    assert code == 75 and f"stopped at step {folder.status()['step']} and saved" in said, said
    folder.stay()
    with started(folder, command) as process:
        assert process.wait(HANG_SECONDS) == 0
    whole = folder.command(ALONE, "--checkpoint.every", "1", "--output_dir", "whole")
    with started(folder, whole) as process:
        assert process.wait(HANG_SECONDS) == 0
    assert losses_of(folder.run) == losses_of(tmp_path / "whole")


@pytest.mark.parametrize("places", [("step",), ("step", "deaf")], ids=["slow", "deaf"])
def test_a_first_step_that_does_not_end_is_left(places: tuple[str, ...], tmp_path: Path) -> None:
    """As one that compiles for minutes; and one in a library that goes on after an interruption."""
    folder = Folder(tmp_path)
    folder.stay(*places)
    code, said = stopped_while_staying(folder, folder.command(ALONE))
    status = folder.status()
    assert (status["state"], status["step"], status["exit_code"]) == ("preempted", 0, 130) and code == 130, said
    assert "Traceback" not in said


def test_a_start_that_meets_a_run_as_it_was_saved_is_as_good_as_a_stop(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    command = folder.command(ALONE, "--checkpoint.every", "2")
    folder.stay("data")
    stopped_while_staying(folder, command)
    step = folder.status()["step"]
    (folder.path / "staying").unlink()
    folder.stay("step")
    code, said = stopped_while_staying(folder, command)
    status = folder.status()
    assert (status["state"], status["step"], status["exit_code"], code) == ("preempted", step, 75, 75), said


def test_an_interrupted_start_is_told_where_a_kill_left_the_run_as_running(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    command = folder.command(ALONE)
    folder.stay("step")
    with started(folder, command) as process:
        while not (folder.path / "staying").exists():
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.05)
        process.kill()
    assert folder.status()["state"] == "running"
    code = "import signal, accel_clip.commands.train as t; t.Trainer = lambda *_: signal.raise_signal(signal.SIGTERM)"
    code += "; import sys; from accel_clip.cli import train_main; sys.exit(train_main())"
    with started(folder, [sys.executable, "-c", code, *command[2:]]) as process:
        said = process.communicate(timeout=HANG_SECONDS)[1]
    status = folder.status()
    assert process.returncode == 130 and said.endswith("interrupted\n") and "Traceback" not in said
    assert (status["state"], status["exit_code"], status["error"]) == ("preempted", 130, "interrupted")
