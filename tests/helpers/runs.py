"""Runs in processes of this one: their settings, how they are killed, and what must be equal at their ends."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from accel_clip import Config, train
from accel_clip.config import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    ModelConfig,
    OptimConfig,
    TrackConfig,
    TrainConfig,
)
from helpers.kills import run_forked

NUM_STEPS = 14
NEVER_EQUAL = ("samples_per_second", "step_time", "data_time", "checkpoint_share")


def short_config(output: Path, train: str, model: str, /, steps: int, **sections: Any) -> Config:
    """Return settings of a short run: 8 pairs a step, one thread, no loader workers, nothing held out, no tracker."""
    config = Config(
        output_dir=str(output),
        data=DataConfig(train=[train], val_fraction=0, workers=0),
        model=ModelConfig(model),
        train=TrainConfig(batch_size=8, steps=steps, threads=1),
        eval=EvalConfig(every=100),
        track=TrackConfig(to=[], every=1),
    )
    return replace(config, **sections)


def config_that_draws(folder: Path, output: Path, **sections: Any) -> Config:
    """Return settings in which everything that draws or adapts is on."""
    config = Config(
        output_dir=str(output),
        data=DataConfig(train=[str(folder / "pairs.csv")], val_fraction=0.25, workers=0, max_bad_fraction=0.5),
        model=ModelConfig(str(folder / "drops_patches.json")),
        optim=OptimConfig(lr=3e-3, warmup=0.2),
        train=TrainConfig(batch_size=8, steps=NUM_STEPS, threads=1, micro_batch_size=3, activation_gib=0.0005),
        eval=EvalConfig(every=3),
        checkpoint=CheckpointConfig(every=2),
        track=TrackConfig(to=[], every=4),
    )
    return replace(config, **sections)


def in_a_process(action: Callable[[], object], **environment: str) -> int:
    """Run an action on one thread in a process of its own and return its exit code, negative for a signal."""

    def on_one_thread() -> None:
        torch.set_num_threads(1)
        action()

    return run_forked(on_one_thread, **environment)


def run_until(config: Config, fault: str) -> None:
    """Train until the fault hook kills the process."""
    assert in_a_process(lambda: train(config), ACCEL_CLIP_FAULT=fault) == 9


def run_to_the_end(config: Config) -> None:
    """Train, and fail if that does not end well."""
    assert in_a_process(lambda: train(config)) == 0


def points_of(config: Config) -> list[dict[str, Any]]:
    """Return what a run has logged."""
    return [json.loads(line) for line in (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()]


def ends_of(config: Config) -> tuple[bytes, list[dict[str, Any]], str]:
    """Return what must be equal: the export's bytes, the points without times, the bad samples."""
    folder = Path(config.output_dir)
    comparable = [{key: value for key, value in each.items() if key not in NEVER_EQUAL} for each in points_of(config)]
    weights = (folder / "export" / "open_clip_model.safetensors").read_bytes()
    return weights, comparable, (folder / "bad_samples.jsonl").read_text()


def assert_same_end(config: Config, reference: Config) -> None:
    """Fail unless two runs have come to the same bits."""
    weights, points, bad_samples = ends_of(config)
    expected_weights, expected_points, expected_bad_samples = ends_of(reference)
    assert points == expected_points
    assert weights == expected_weights
    assert bad_samples == expected_bad_samples
