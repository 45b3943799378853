"""Killed and started again, a run ends as if nothing had happened: weights, metrics, early stopping, bad samples."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from accel_clip import Config, train
from accel_clip.config import (
    CheckpointConfig,
    DataConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    StopConfig,
    TrackConfig,
    TrainConfig,
)
from accel_clip.faults import ConfigError, NonFiniteError
from accel_clip.losses.base import LOSSES
from helpers.runs import NUM_STEPS, assert_same_end, config_that_draws, ends_of, run_to_the_end, run_until


@pytest.mark.parametrize(
    "faults",
    [
        pytest.param(["step:1"], marks=pytest.mark.slow),  # before the first checkpoint
        pytest.param(["step:3"], marks=pytest.mark.slow),  # in the first epoch
        pytest.param(["step:4"], marks=pytest.mark.slow),  # at its end
        ["step:7"],  # in a later epoch
        pytest.param(["step:14"], marks=pytest.mark.slow),  # after the last step
        pytest.param(["step:5", "step:6", "step:11"], marks=pytest.mark.slow),  # again and again
        pytest.param(["latest:8"], marks=pytest.mark.slow),  # in a checkpoint
        ["rename:8"],
        pytest.param(["model:8"], marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
def test_a_killed_run_ends_like_one_that_was_not(
    data: Path, tmp_path: Path, uninterrupted: Config, faults: list[str]
) -> None:
    config = config_that_draws(data, tmp_path / "run")
    for fault in faults:
        run_until(config, fault)
    run_to_the_end(config)
    assert_same_end(config, uninterrupted)


@pytest.mark.slow
def test_the_best_weights_and_early_stopping_survive(data: Path, tmp_path: Path) -> None:
    sections = {
        "stop": StopConfig(metric="val/loss", patience=3),
        "train": TrainConfig(batch_size=8, steps=30, threads=1),
    }
    whole = config_that_draws(data, tmp_path / "whole", **sections)
    run_to_the_end(whole)
    killed = config_that_draws(data, tmp_path / "killed", **sections)
    for fault in ("step:4", "step:8"):
        run_until(killed, fault)
    run_to_the_end(killed)
    assert_same_end(killed, whole)
    last = ends_of(whole)[1][-1]["step"]
    best = (tmp_path / "killed" / "checkpoints" / "BEST").read_text()
    assert best == (tmp_path / "whole" / "checkpoints" / "BEST").read_text()
    assert f"step-{last:08d}" not in best or last == 30


def test_accumulated_batches_and_a_frozen_tower(data: Path, tmp_path: Path) -> None:
    sections = {
        "train": TrainConfig(batch_size=8, steps=8, threads=1, accumulate=2),
        "model": ModelConfig(str(data / "drops_patches.json"), freeze=["text"]),
        "loss": LossConfig("siglip"),
    }
    whole, killed = (config_that_draws(data, tmp_path / name, **sections) for name in ("whole", "killed"))
    run_to_the_end(whole)
    run_until(killed, "step:5")
    run_to_the_end(killed)
    assert_same_end(killed, whole)


def test_a_finished_run_stays_as_it_is(uninterrupted: Config) -> None:
    folder = Path(uninterrupted.output_dir)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    result = train(uninterrupted)
    assert result.num_steps == NUM_STEPS and result.export == folder / "export" and "val/loss" in result.metrics
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_a_longer_run_goes_on_with_the_schedule_of_its_new_length(data: Path, tmp_path: Path) -> None:
    sections = {"optim": OptimConfig(lr=1e-3, warmup=0), "track": TrackConfig(to=[], every=1)}
    short = config_that_draws(data, tmp_path / "run", **sections, train=TrainConfig(batch_size=8, steps=4, threads=1))
    run_to_the_end(short)
    run_to_the_end(replace(short, train=replace(short.train, steps=8)))
    points = [point for point in ends_of(short)[1] if "lr" in point]
    assert [point["step"] for point in points] == list(range(1, 9))
    assert points[4]["lr"] == pytest.approx(1e-3 * (1 + math.cos(math.pi * 4 / 8)) / 2)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [("optim", "lr", 1e-4), ("data", "val_fraction", 0.3), ("train", "batch_size", 4), ("model", "freeze", ["text"])],
)
def test_other_settings_are_refused_with_both_values_and_the_ways_out(
    uninterrupted: Config, section: str, key: str, value: Any
) -> None:
    changed = replace(uninterrupted, **{section: replace(getattr(uninterrupted, section), **{key: value})})
    before = getattr(getattr(uninterrupted, section), key)
    with pytest.raises(ConfigError) as refused:
        train(changed)
    for part in (f"{section}.{key}", repr(before), repr(value), "set it back", "another output_dir"):
        assert part in str(refused.value)


def test_a_run_is_not_continued_where_that_is_forbidden(uninterrupted: Config) -> None:
    with pytest.raises(ConfigError, match=r"checkpoint\.resume: never"):
        train(replace(uninterrupted, checkpoint=CheckpointConfig(resume="never")))


def test_a_run_goes_on_from_a_checkpoint_that_is_named(data: Path, tmp_path: Path, uninterrupted: Config) -> None:
    named = Path(uninterrupted.output_dir) / "checkpoints" / f"step-{NUM_STEPS - 2:08d}"
    config = config_that_draws(data, tmp_path / "run", checkpoint=CheckpointConfig(every=2, resume=str(named)))
    run_to_the_end(config)
    export = Path("export") / "open_clip_model.safetensors"
    assert (tmp_path / "run" / export).read_bytes() == (Path(uninterrupted.output_dir) / export).read_bytes()
    with pytest.raises(ConfigError, match="cannot be used"):
        train(config_that_draws(data, tmp_path / "other", checkpoint=CheckpointConfig(resume=str(tmp_path))))


@pytest.mark.slow
def test_a_damaged_newest_checkpoint_is_set_aside_and_the_one_before_used(
    data: Path, tmp_path: Path, uninterrupted: Config, capfd: pytest.CaptureFixture[str]
) -> None:
    config = config_that_draws(data, tmp_path / "run")
    run_until(config, "latest:8")
    file = tmp_path / "run" / "checkpoints" / "step-00000008" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    run_to_the_end(config)
    assert_same_end(config, uninterrupted)
    said = capfd.readouterr().err
    assert said.count("damaged checkpoint") == 1 and "step-00000008" in said and "step-00000006 is used" in said


def test_fewer_samples_than_before_are_refused(data: Path, tmp_path: Path) -> None:
    table = data / "shrinking.csv"
    lines = (data / "pairs.csv").read_text().splitlines()
    table.write_text("\n".join(lines))
    source = DataConfig(train=[str(table)], val_fraction=0, workers=0, max_bad_fraction=0.5)
    config = config_that_draws(data, tmp_path / "run", data=source)
    run_until(config, "latest:2")
    table.write_text("\n".join(lines[:-3]))
    with pytest.raises(ConfigError, match="it had 48 rows and now has 45"):
        train(config)


class NoNumberAt:
    """A loss whose value is no number at some steps, counted from 1; before them it is called once, for a trial."""

    def __init__(self, steps: list[int]) -> None:
        self.steps, self.number = steps, -1

    def __call__(self, image_features: torch.Tensor, text_features: torch.Tensor, logit_scale: torch.Tensor) -> Any:
        loss = torch.nn.functional.cross_entropy(
            logit_scale * image_features @ text_features.T, torch.arange(len(image_features))
        )
        self.number += loss.requires_grad
        return loss * math.nan if self.number in self.steps else loss


@pytest.fixture(autouse=True)
def loss_without_numbers(own_entries: None) -> None:
    LOSSES.register("no number at")(NoNumberAt)


def config_without_numbers(data: Path, output: Path, policy: str, steps: list[int], limit: int = 2) -> Config:
    return config_that_draws(
        data,
        output,
        train=TrainConfig(batch_size=8, steps=6, threads=1, non_finite=policy, non_finite_limit=limit),
        loss=LossConfig("no number at", {"steps": steps}),
        track=TrackConfig(to=[], every=1),
    )


def test_a_loss_that_is_no_number_stops_the_run_before_the_weights_change(data: Path, tmp_path: Path) -> None:
    config = config_without_numbers(data, tmp_path / "run", "stop", [3])
    with pytest.raises(NonFiniteError) as stopped:
        train(config)
    for part in ("step 3 is not finite", "gradient norm nan", "samples", "train.non_finite"):
        assert part in str(stopped.value)
    status = json.loads((tmp_path / "run" / "STATUS.json").read_text())
    assert (status["state"], status["exit_code"], status["step"]) == ("failed", 4, 2)
    short = config_without_numbers(data, tmp_path / "short", "stop", [])
    run_to_the_end(replace(short, train=replace(short.train, steps=2), optim=config.optim))
    weights = [tmp_path / name / "checkpoints/step-00000002/model.safetensors" for name in ("run", "short")]
    assert (tmp_path / "run/checkpoints/LATEST").read_text().strip() == "step-00000002"
    assert len({file.stat().st_size for file in weights}) == 1


def test_a_step_that_is_no_number_is_left_out(data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    train(config_without_numbers(data, tmp_path / "run", "skip", [3, 5]))
    points = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = {point["step"]: point.get("loss") for point in points if "lr" in point}
    assert [step for step, loss in losses.items() if loss is None] == [3, 5] and len(losses) == 6
    assert capfd.readouterr().err.count("the step is left out") == 2
    with pytest.raises(NonFiniteError, match="step 5 is not finite"):
        train(config_without_numbers(data, tmp_path / "other", "skip", [3, 4, 5]))


def test_a_run_goes_back_to_its_checkpoint_and_past_the_batch(
    data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    train(config_without_numbers(data, tmp_path / "run", "rollback", [4]))
    points = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [(point["step"], point["samples"] // 8) for point in points if "lr" in point]
    assert steps == [(1, 1), (2, 2), (3, 5), (4, 6), (5, 7), (6, 8)]  # batches 2 and 3 are behind step 2, and left
    assert "back to step 2" in capfd.readouterr().err
    with pytest.raises(NonFiniteError):
        train(config_without_numbers(data, tmp_path / "other", "rollback", [4, 5, 6]))


def resumed_from(path: Path, data: Path, output: Path) -> Config:
    return config_that_draws(data, output, checkpoint=CheckpointConfig(every=2, resume=str(path)))


def points_after(config: Config, step: int) -> list[dict[str, Any]]:
    return [point for point in ends_of(config)[1] if point["step"] > step]


@pytest.mark.slow
@pytest.mark.parametrize("faults", [[], ["step:5"], ["step:5", "step:7", "latest:10"]], ids=" ".join)
def test_a_run_that_began_at_a_named_checkpoint_goes_on_from_its_own(
    data: Path, tmp_path: Path, uninterrupted: Config, faults: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    """The same command each time; the first end comes before any checkpoint of its own."""
    run_until(config_that_draws(data, tmp_path / "other"), "latest:4")
    named = tmp_path / "other" / "checkpoints" / "step-00000004"
    config = resumed_from(named, data, tmp_path / "run")
    for fault in faults:
        run_until(config, fault)
    capfd.readouterr()
    if "latest:10" in faults:
        (named / "manifest.json").rename(tmp_path / "away")  # it is not needed any more
    run_to_the_end(config)
    expected = 10 if "latest:10" in faults else 4
    assert f"step-{expected:08d}" in capfd.readouterr().err
    assert ends_of(config)[0] == ends_of(uninterrupted)[0]
    assert points_after(config, -1) == points_after(uninterrupted, 4)
    before = (tmp_path / "run" / "STATUS.json").stat().st_mtime_ns
    train(config)
    assert (tmp_path / "run" / "STATUS.json").stat().st_mtime_ns == before  # it is complete


@pytest.mark.slow
def test_a_run_goes_back_to_its_own_checkpoint_once(data: Path, tmp_path: Path, uninterrupted: Config) -> None:
    config = config_that_draws(data, tmp_path / "run", checkpoint=CheckpointConfig(every=2, keep=9))
    run_until(config, "latest:10")
    checkpoints = tmp_path / "run" / "checkpoints"
    back = replace(config, checkpoint=replace(config.checkpoint, resume=str(checkpoints / "step-00000004")))
    run_until(back, "latest:8")
    assert (checkpoints / "step-00000010.superseded").is_dir()
    assert (checkpoints / "LATEST").read_text().strip() == "step-00000008"
    content = (checkpoints / "step-00000008" / "manifest.json").stat().st_mtime_ns
    run_to_the_end(back)
    assert (checkpoints / "step-00000008" / "manifest.json").stat().st_mtime_ns == content
    assert_same_end(back, uninterrupted)


@pytest.mark.slow
def test_a_newer_checkpoint_of_the_runs_own_is_not_left_behind(
    data: Path, tmp_path: Path, uninterrupted: Config, capfd: pytest.CaptureFixture[str]
) -> None:
    run_until(config_that_draws(data, tmp_path / "other"), "latest:4")
    run_until(config_that_draws(data, tmp_path / "run"), "latest:8")
    config = resumed_from(tmp_path / "other" / "checkpoints" / "step-00000004", data, tmp_path / "run")
    run_to_the_end(config)
    assert "has step-00000008, which is newer" in capfd.readouterr().err
    assert_same_end(config, uninterrupted)


@pytest.mark.slow
def test_an_older_run_in_the_folder_keeps_its_points_up_to_its_checkpoint(data: Path, tmp_path: Path) -> None:
    run_until(config_that_draws(data, tmp_path / "other"), "latest:10")
    run_until(config_that_draws(data, tmp_path / "run"), "latest:6")
    config = resumed_from(tmp_path / "other" / "checkpoints" / "step-00000010", data, tmp_path / "run")
    run_until(config, "step:11")
    run_to_the_end(config)
    steps = [point["step"] for point in ends_of(config)[1] if "lr" in point]
    assert steps == [4, 12, 14]
