"""Runs that are launched as a user does and watched while they go, with a loss and a source that make trouble."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from helpers.commands import ROOT, Finished, outside_of_launches
from helpers.models import SMALL_MODEL
from helpers.patience import HANG_SECONDS

NUM_STEPS = 12
ALONE: tuple[str, ...] = ()
CPU_1 = ("--cpu", "--num_processes", "1")
SLOWLY = {"SECONDS_A_STEP": "0.3"}
TROUBLED = '''
import os
import time
from pathlib import Path

import torch
from accel_clip import LOSSES, SOURCES
from accel_clip.data.sources.demo import open_demo

RANK = os.environ.get("RANK", "0")


def asked(trouble, number):
    """Whether NAN or HANG names this process and step, as `rank:step`."""
    return os.environ.get(trouble) == f"{RANK}:{number}"


@LOSSES.register("troubled")
class Troubled:
    """The contrastive loss, slow or in trouble as the environment says; its first call is a trial."""

    def __init__(self):
        self.number = -1

    def __call__(self, image_features, text_features, logit_scale, output_dict=True):
        self.number += image_features.requires_grad
        logits = logit_scale * image_features @ text_features.T
        labels = torch.arange(len(logits))
        loss = torch.nn.functional.cross_entropy(logits, labels) + torch.nn.functional.cross_entropy(logits.T, labels)
        time.sleep(float(os.environ.get("SECONDS_A_STEP", 0)))
        if asked("HANG", self.number):
            time.sleep(60)
        return {"both_loss": loss * float("nan") if asked("NAN", self.number) else loss}


@SOURCES.register("late")
class Late:
    """Drawings that take long as soon as a file named `late` is there."""

    def __init__(self, argument, options):
        self.drawings = open_demo("", options)
        self.name = "late"

    def __len__(self):
        return 64

    def __getitem__(self, index):
        time.sleep(0.2 * Path("late").exists())
        return self.drawings[index]

    def key(self, index):
        return self.drawings.key(index)
'''


@dataclass
class Launch:
    """A command that is running in a folder, and the run that it trains."""

    process: subprocess.Popen[bytes]
    run: Path
    said: Path

    def wait_for_step(self, step: int) -> None:
        """Wait until the run has logged a step."""
        self.wait_until(lambda: step in losses_by_step(self.run), f"step {step}")

    def wait_until(self, holds: Callable[[], bool], what: str, seconds: float = HANG_SECONDS) -> None:
        deadline = time.monotonic() + seconds
        while not holds():
            assert self.process.poll() is None, f"ended before {what}: {self.text()}"
            assert time.monotonic() < deadline, f"{what} never came: {self.text()}"
            time.sleep(0.02)

    def everyone(self) -> list[psutil.Process]:
        """Return the launcher and all that it has started, which is in sessions of its own under torchrun."""
        launcher = psutil.Process(self.process.pid)
        return [launcher, *launcher.children(recursive=True)]

    def trainers(self) -> list[psutil.Process]:
        """Return the processes that train, by rank."""
        found = [each for each in self.everyone() if "train.py" in " ".join(each.cmdline()) and not is_launcher(each)]
        return sorted(found, key=lambda each: int(each.environ().get("RANK", 0)))

    def kill(self) -> None:
        """End all of it as a power cut would."""
        everyone = self.everyone()
        for each in everyone:
            each.kill()
        psutil.wait_procs(everyone[1:], timeout=HANG_SECONDS)
        self.process.wait()

    def ended(self, everyone: list[psutil.Process], seconds: float = HANG_SECONDS) -> Finished:
        """Wait until none of the processes is left and return how the first one ended."""
        alive = psutil.wait_procs(everyone[1:], timeout=seconds)[1]
        assert not [each for each in alive if each.status() != psutil.STATUS_ZOMBIE], f"still there: {self.text()}"
        return Finished(self.process.wait(seconds), "", self.text())

    def text(self) -> str:
        return self.said.read_text(errors="replace")


def hear_interrupts() -> None:
    """Undo what a shell does to a command that it starts in the background: its children ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def is_launcher(process: psutil.Process) -> bool:
    return "accelerate.commands.launch" in process.cmdline()


class FolderOfLaunches:
    """A folder with a model and a plugin, in which runs with the same settings are launched."""

    def __init__(self, path: Path, patch_dropout: float = 0.5) -> None:
        self.path = path
        described = json.loads(SMALL_MODEL)
        described["vision_cfg"]["patch_dropout"] = patch_dropout
        (path / "small.json").write_text(json.dumps(described))
        (path / "troubled.py").write_text(TROUBLED)

    def words(self, run: str, *more: str) -> list[str]:
        """Return the flags of a run; `more` are further ones, or other values of these."""
        words = {
            "--model.name": "small.json",
            "--plugins": "troubled.py",
            "--loss.name": "troubled",
            "--train.steps": str(NUM_STEPS),
            "--train.batch_size": "8",
            "--train.threads": "1",
            "--checkpoint.every": "2",
            "--data.workers": "0",
            "--data.val_fraction": "0",
            "--track.to": "[]",
            "--track.every": "1",
            "--output_dir": run,
        } | dict(zip(more[::2], more[1::2], strict=True))
        return [word for pair in words.items() for word in pair]

    def start(self, launcher: tuple[str, ...], run: str, *more: str, **environment: str) -> Launch:
        """Start a run: with the words of `accelerate launch`, or by `python train.py` without any."""
        launched = ("-m", "accelerate.commands.launch", *launcher) if launcher else ()
        said = self.path / f"said-{Path(run).name}.txt"
        with said.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, *launched, str(ROOT / "train.py"), *self.words(run, *more)],
                cwd=self.path,
                env={**outside_of_launches(), **environment},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
                preexec_fn=hear_interrupts,  # noqa: PLW1509  sets a handler alone
            )
        return Launch(process, self.path / run, said)

    def finish(self, launcher: tuple[str, ...], run: str, *more: str, **environment: str) -> Finished:
        """Run to the end."""
        launch = self.start(launcher, run, *more, **environment)
        try:
            return Finished(launch.process.wait(240), "", launch.text())
        except subprocess.TimeoutExpired:
            launch.kill()
            raise


def losses_by_step(run: Path) -> dict[int, float]:
    """Return the training losses by step; a line that is being written is left out."""
    losses = {}
    for line in (run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").exists() else []:
        point = json.loads(line) if line.endswith("}") else {}
        if "loss" in point:
            losses[point["step"]] = point["loss"]
    return losses


def status_of(run: Path) -> dict[str, Any]:
    status: dict[str, Any] = json.loads((run / "STATUS.json").read_text())
    return status


def newest(run: Path) -> Path:
    return run / "checkpoints" / (run / "checkpoints" / "LATEST").read_text().strip()


def export_of(run: Path) -> bytes:
    return (run / "export" / "open_clip_model.safetensors").read_bytes()
