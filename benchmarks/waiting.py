"""python benchmarks/waiting.py

How long a whole run waits for its data: it trains on 640 x 480 JPEGs in tar shards with one loader worker and one
thread, a model whose step takes longer than the loader does. Prints the rates of the loader and of the step alone,
as `accel-clip check` measures them, and from the run's metrics the share of the time that its steps waited, with the
first steps, for which the worker fills the queue, and without. On a busy machine it says little: look at the load.

Needs what loader.py needs, whose pictures it uses.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from loader import write_shard
from timing import describe_machine

ROOT = Path(__file__).resolve().parent.parent
CHECK = "import sys; from accel_clip.cli import main; sys.exit(main())"
NUM_SHARDS = 4
NUM_FIRST_STEPS = 3  # while these are taken the queue fills


def main() -> None:
    """Write shards and a model, measure both sides alone, train, and print the share."""
    parser = argparse.ArgumentParser(description="The share of a run's time that it waits for data")
    parser.add_argument("--num-pictures", type=int, default=128, help="in each of four shards")
    parser.add_argument("--quality", type=int, default=80, help="of the JPEGs")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--width", type=int, default=192, help="of the towers: the wider, the slower the step")
    given = parser.parse_args()
    torch.set_num_threads(1)
    print(describe_machine("pillow"), flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "shards").mkdir()
        for number in range(NUM_SHARDS):
            write_shard(folder / "shards" / f"{number}.tar", 640, 480, given)
        (folder / "model.json").write_text(json.dumps(model_of(given.width)))
        words = words_for(given)
        loader, step = rates(folder, words)
        print(
            f"alone: loader {loader:.0f} pairs/s, step {step:.0f} pairs/s, loader/step {loader / step:.2f}", flush=True
        )
        run(folder, str(ROOT / "train.py"), *words)
        report(folder / "run" / "metrics.jsonl", given.batch_size)
    print(f"load after {os.getloadavg()[0]:.2f}")


def model_of(width: int) -> dict[str, Any]:
    """Return the description of a model."""
    return {
        "embed_dim": 64,
        "vision_cfg": {"image_size": 224, "layers": 4, "width": width, "head_width": 64, "patch_size": 32},
        "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 128, "heads": 2, "layers": 2},
    }


def words_for(given: Namespace) -> list[str]:
    """Return the settings of the run."""
    words = {
        "--model.name": "model.json",
        "--data.train": "shards",
        "--data.val_fraction": "0",
        "--data.workers": "1",
        "--train.threads": "1",
        "--train.batch_size": str(given.batch_size),
        "--train.steps": str(given.steps),
        "--track.every": "1",
        "--track.to": "[]",
        "--output_dir": "run",
    }
    return [word for pair in words.items() for word in pair]


def run(folder: Path, *words: str) -> str:
    """Run Python in a folder and return what it printed; raises `SystemExit` with its errors when it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise SystemExit(done.stderr)
    return done.stdout


def rates(folder: Path, words: list[str]) -> tuple[float, float]:
    """Return the pairs a second of the loader alone and of the step alone."""
    speed = json.loads(run(folder, "-c", CHECK, "check", "--json", "--seconds", "20", *words))["speed"]
    return speed["loader"]["1"], speed["step"]


def report(metrics: Path, batch_size: int) -> None:
    """Print how long the steps of a run waited."""
    points = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    steps = [(point["data_time"], point["step_time"]) for point in points if "data_time" in point]
    for what, part in (("all steps", steps), (f"without the first {NUM_FIRST_STEPS}", steps[NUM_FIRST_STEPS:])):
        waited, worked = (sum(seconds) for seconds in zip(*part, strict=True))
        share, pairs = waited / (waited + worked), batch_size * len(part)
        longest = max(seconds for seconds, _ in part)
        print(
            f"{what}: {100 * share:.2f} % of {waited + worked:.1f} s waited, the longest {longest:.3f} s, "
            f"{pairs / (waited + worked):.0f} pairs/s",
            flush=True,
        )


if __name__ == "__main__":
    main()
