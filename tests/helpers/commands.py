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
SMALL_MODEL = """{"embed_dim": 32,
 "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
 "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}}"""


@dataclass(frozen=True)
class Finished:
    """A process that has ended."""

    code: int
    out: str
    err: str


def run(*words: str, folder: Path, **environment: str) -> Finished:
    """Run a command in a folder; WORLD_SIZE and the like are taken out of its environment."""
    kept = {k: v for k, v in os.environ.items() if k not in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT")}
    done = subprocess.run(
        words,
        cwd=folder,
        env={**kept, "HF_HUB_OFFLINE": "1", **environment},
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


def small_model(folder: Path) -> str:
    """Write the description of a model that trains in milliseconds and return its path."""
    file = folder / "small.json"
    file.write_text(SMALL_MODEL)
    return str(file)


def losses_of(folder: Path) -> list[float]:
    """Return the training losses in a run's folder, in their order."""
    points = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [point["loss"] for point in points if "loss" in point]
