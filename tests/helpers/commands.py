"""Runs the commands as a user does: real processes, their exit codes and what they said."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from helpers.patience import HANG_SECONDS

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Finished:
    """A process that has ended."""

    code: int
    out: str
    err: str


def outside_of_launches() -> dict[str, str]:
    """Return the environment without the variables that a launcher sets, and without a network."""
    of_launchers = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT")
    return {k: v for k, v in os.environ.items() if k not in of_launchers} | {"HF_HUB_OFFLINE": "1"}


def run(*words: str, folder: Path, **environment: str) -> Finished:
    """Run a command in a folder, outside of any launch."""
    done = subprocess.run(
        words,
        cwd=folder,
        env={**outside_of_launches(), **environment},
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        check=False,
    )
    return Finished(done.returncode, done.stdout, done.stderr)


def train_py(*words: str, folder: Path, **environment: str) -> Finished:
    """Run `python train.py …`."""
    return run(sys.executable, str(ROOT / "train.py"), *words, folder=folder, **environment)


def accel_clip(*words: str, folder: Path) -> Finished:
    """Run `accel-clip …`."""
    code = "import sys; from accel_clip.cli import main; sys.exit(main())"
    return run(sys.executable, "-c", code, *words, folder=folder)


def launch(*words: str, folder: Path, launcher: tuple[str, ...], **environment: str) -> Finished:
    """Run `accelerate launch LAUNCHER train.py …`."""
    command = [sys.executable, "-m", "accelerate.commands.launch", *launcher, str(ROOT / "train.py"), *words]
    return run(*command, folder=folder, **environment)


CPU_2 = ("--config_file", str(ROOT / "accelerate_configs" / "cpu_2.yaml"))


def without_torch(folder: Path) -> dict[str, str]:
    """Return the environment of a command that ends, and says why, as soon as it imports torch."""
    (folder / "blocked" / "torch").mkdir(parents=True)
    (folder / "blocked" / "torch" / "__init__.py").write_text("raise SystemExit('torch is imported')\n")
    return {"PYTHONPATH": str(folder / "blocked")}


def losses_of(folder: Path) -> list[float]:
    """Return the training losses in a run's folder, in their order."""
    points = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [point["loss"] for point in points if "loss" in point]
