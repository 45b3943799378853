"""Stages of a run: which batch belongs to which, and that a run that passes from one to the next loses nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from accel_clip import Config
from accel_clip.checkpoint.run_state import RunState
from accel_clip.config import CheckpointConfig, DataConfig, EvalConfig, TrainConfig
from accel_clip.run.stages import Stage, stage_at
from accel_clip.run.timetable import Timetable
from helpers.models import model_that_drops_patches
from helpers.plugin_files import small_table
from helpers.runs import points_of, run_to_the_end, run_until, short_config

NUM_STEPS = 9


def stages_beginning_at(first_batches: Sequence[int], config: Config) -> tuple[Stage, ...]:
    ends = [*first_batches[1:], None]
    return tuple(
        Stage(number, first, end, config) for number, (first, end) in enumerate(zip(first_batches, ends, strict=True))
    )


@pytest.mark.parametrize("first_batches", [(0,), (0, 1), (0, 4, 5, 17)])
def test_every_batch_belongs_to_the_stage_that_began_last(first_batches: tuple[int, ...]) -> None:
    stages = stages_beginning_at(first_batches, Config())
    for batch in range(20):
        expected = sum(first <= batch for first in first_batches) - 1
        assert stage_at(stages, batch).number == expected


def test_the_batches_of_a_stage_end_where_the_next_one_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    """With batches that a roll-back has left: they belong to no step, and the run is as many steps long."""
    config = Config(train=TrainConfig(accumulate=2))
    monkeypatch.setattr("accel_clip.run.timetable.stages_of", lambda config: stages_beginning_at((0, 6, 10), config))
    timetable = Timetable(config, num_steps=8, batches_per_epoch=100)
    assert timetable.batches_left(RunState(step=0, next_batch=0)) == range(6)
    assert timetable.batches_left(RunState(step=1, next_batch=4)) == range(4, 6)
    assert timetable.batches_left(RunState(step=3, next_batch=6)) == range(6, 10)
    assert timetable.batches_left(RunState(step=5, next_batch=10)) == range(10, 16)
    assert timetable.batches_left(RunState(step=5, next_batch=12)) == range(12, 18)
    assert [timetable.stage(RunState(next_batch=batch)).number for batch in (0, 5, 6, 10, 99)] == [0, 0, 1, 2, 2]


def config_for(folder: Path, output: str, workers: int) -> Config:
    model = model_that_drops_patches(folder)
    return short_config(
        folder / output,
        "",
        model,
        NUM_STEPS,
        data=DataConfig(train=[str(folder / "pairs.csv")], val_fraction=0.25, workers=workers),
        train=TrainConfig(batch_size=8, steps=NUM_STEPS, threads=1, micro_batch_size=3, activation_gib=0.0005),
        eval=EvalConfig(every=4),
        checkpoint=CheckpointConfig(every=2),
    )


def end_of(config: Config) -> tuple[bytes, list[float]]:
    weights = (Path(config.output_dir) / "export" / "open_clip_model.safetensors").read_bytes()
    return weights, [point["loss"] for point in points_of(config) if "loss" in point]


@pytest.mark.parametrize(
    ("workers", "faults"),
    [
        (0, []),
        pytest.param(1, [], marks=pytest.mark.slow),
        (0, ["step:3", "step:7"]),
        pytest.param(1, ["latest:4", "step:5"], marks=pytest.mark.slow),
    ],
)
def test_stages_that_differ_in_nothing_end_as_one(
    workers: int, faults: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the first or in the second of three, too; the checkpoint says for which one its plan was made."""
    small_table(tmp_path)
    one = config_for(tmp_path, "one", workers)
    run_to_the_end(one)
    monkeypatch.setattr("accel_clip.run.timetable.stages_of", lambda config: stages_beginning_at((0, 4, 7), config))
    several = config_for(tmp_path, "several", workers)
    for fault in faults:
        run_until(several, fault)
    run_to_the_end(several)
    assert end_of(several) == end_of(one)
    plans = {
        path.parent.name: json.loads(path.read_text())["plan"]["stage"]
        for path in Path(several.output_dir).glob("checkpoints/step-*/state.json")
    }
    assert plans["step-00000006"] == 1 and plans["step-00000009"] == 2


def test_a_stage_has_the_settings_that_are_in_force_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here the size of the micro-batch and the pixels: the last stage crops nothing."""
    small_table(tmp_path)

    def two(config: Config) -> tuple[Stage, ...]:
        data = replace(config.data, augmentation="none")
        train = replace(config.train, micro_batch_size=8)
        first, last = stages_beginning_at((0, 4), config)
        return first, replace(last, config=replace(config, data=data, train=train))

    plain, changed, uncropped = (config_for(tmp_path, name, 0) for name in ("plain", "changed", "uncropped"))
    run_to_the_end(plain)
    run_to_the_end(replace(uncropped, data=replace(uncropped.data, augmentation="none")))
    monkeypatch.setattr("accel_clip.run.timetable.stages_of", two)
    run_to_the_end(changed)
    losses, before, never = end_of(changed)[1], end_of(plain)[1], end_of(uncropped)[1]
    assert losses[:4] == before[:4] and losses[4] != before[4] and losses[:4] != never[:4]
    last = Path(changed.output_dir) / "checkpoints" / "step-00000009" / "state.json"
    assert json.loads(last.read_text())["plan"]["micro_batch_size"] == 8
