"""python benchmarks/checkpoints.py: the share of a run's time in checkpoints, beside the training and on the spot.

Trains the built-in model on the demo and saves it every 20 steps: once with a thread that writes while the training
goes on, once with the writing that a machine short of memory falls back to. The shares are those of metrics.jsonl
(`checkpoint_share`: snapshots and waiting by the time since the start); after each other, on whatever else is running.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from timing import describe_machine

from accel_clip import Config, train
from accel_clip.checkpoint import background
from accel_clip.config import CheckpointConfig, DataConfig, TrackConfig, TrainConfig


def measure(folder: Path, num_steps: int, every: int, batch_size: int) -> dict[str, float]:
    """Train and return the last training point."""
    config = Config(
        output_dir=str(folder),
        data=DataConfig(val_fraction=0, workers=1),
        train=TrainConfig(batch_size=batch_size, steps=num_steps, threads=1),
        checkpoint=CheckpointConfig(every=every, minutes=None),
        track=TrackConfig(to=[], every=num_steps),
    )
    train(config)
    points = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    point: dict[str, float] = [point for point in points if "checkpoint_share" in point][-1]
    return point


def main() -> None:
    """Measure both ways of writing and print their shares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--every", type=int, default=20, help="steps between checkpoints")
    parser.add_argument("--batch-size", type=int, default=128)
    options = parser.parse_args()
    shares = {}
    with tempfile.TemporaryDirectory(prefix="checkpoints-") as name:
        for way in ("in the background", "on the spot"):
            if way == "on the spot":
                background.has_memory_for = lambda snapshot: False
            folder = Path(name) / way.replace(" ", "-")
            point = measure(folder, options.steps, options.every, options.batch_size)
            shares[way] = point["checkpoint_share"], point["step_time"], size_of(folder)
    print(describe_machine())
    print(f"{options.steps} steps of {options.batch_size} pairs, a checkpoint every {options.every}")
    for way, (share, step_time, mebibytes) in shares.items():
        print(f"{way:18} {share:7.2%} of the time   {step_time * 1e3:.0f} ms a step, {mebibytes:.1f} MiB a checkpoint")


def size_of(run: Path) -> float:
    """Return the size of a run's last checkpoint in MiB."""
    latest = run / "checkpoints" / (run / "checkpoints" / "LATEST").read_text(encoding="utf-8").strip()
    return sum(file.stat().st_size for file in latest.iterdir()) / 2**20


if __name__ == "__main__":
    main()
