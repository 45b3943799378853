"""A run killed at any of its changes of the disk: the same command goes on with it and ends in the same bits."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pyarrow.csv  # noqa: F401  (once, and not in every process that is killed)
import pytest
import torch

from accel_clip import Config, train
from accel_clip.config import CheckpointConfig, EvalConfig, StopConfig, TrackConfig
from helpers.kills import count_changes, killed_at, run_forked
from helpers.runs import assert_same_end, config_that_draws, ends_of

NUM_STEPS = 5
EVERY = int(os.environ.get("EVERY_CHANGE", "9"))
"""How many changes lie between two that are tried; 1 tries all of them."""


def short(folder: Path, output: Path) -> Config:
    """Return settings of a run that does everything which changes the disk, in a few steps."""
    config = config_that_draws(
        folder,
        output,
        checkpoint=CheckpointConfig(every=2, keep=1),
        eval=EvalConfig(every=2),
        stop=StopConfig(metric="val/loss", patience=9),
        track=TrackConfig(to=[], every=1),
    )
    data = replace(config.data, image_cache_gib=1.0)
    return replace(config, data=data, train=replace(config.train, steps=NUM_STEPS))


def go(config: Config) -> None:
    torch.set_num_threads(1)
    train(config)


@pytest.mark.slow
@pytest.mark.parametrize("opened", [False, True], ids=["before", "opened"])
def test_killed_at_any_change_of_the_disk_it_ends_in_the_same_bits(data: Path, tmp_path: Path, opened: bool) -> None:
    whole = short(data, tmp_path / "whole")
    num_changes = count_changes(tmp_path / "whole", lambda: go(whole))
    tried = range(EVERY // 2 if opened else 0, num_changes, EVERY)
    for number in tried:
        config = short(data, tmp_path / "killed")
        assert killed_at(number, tmp_path / "killed", lambda config=config: go(config), opened), number
        assert run_forked(lambda config=config: go(config)) == 0, number
        assert_same_end(config, whole)
        left = [path for path in (tmp_path / "killed").rglob("*") if path.name.startswith(".accel_clip-")]
        assert left == [], number
        shutil.rmtree(tmp_path / "killed")
    assert len(tried) >= num_changes // EVERY
    assert ends_of(whole)[0]
