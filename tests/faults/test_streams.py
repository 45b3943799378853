"""Runs on shards that come from a web server: killed, badly served and cut short, they end as an undisturbed one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, Image

from accel_clip import Config, cli, train
from accel_clip.config import DataConfig
from helpers import nasty
from helpers.commands import CPU_2
from helpers.launches import NUM_STEPS, FolderOfLaunches, export_of, losses_by_step, status_of
from helpers.models import model_that_drops_patches
from helpers.pictures import encoded, noise
from helpers.runs import assert_same_end, config_that_draws, ends_of, in_a_process, points_of, run_to_the_end, run_until
from helpers.web import Behaviour, served

pytestmark = pytest.mark.slow
PATTERN = "{shard-0,shard-1,shard-2,shard-wild}.tar"


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return nasty.write_wild_shards(tmp_path_factory.mktemp("web") / "shards")


@pytest.fixture(scope="module")
def address(shards: Path) -> Iterator[str]:
    with served(shards) as found:
        yield found


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    model_that_drops_patches(folder)
    return folder


def streamed(models: Path, output: Path, address: str, shards: Path, workers: int = 0) -> Config:
    """Return settings of a run on a stream that is measured on one of the shards."""
    data = DataConfig(
        train=[f"{address}/{PATTERN}"],
        val=[str(shards / "shard-0.tar")],
        workers=workers,
        max_bad_fraction=0.9,
        shuffle_buffer=16,
    )
    return config_that_draws(models, output, data=data)


@pytest.fixture(scope="module")
def uninterrupted(models: Path, shards: Path, address: str, tmp_path_factory: pytest.TempPathFactory) -> Config:
    config = streamed(models, tmp_path_factory.mktemp("whole") / "run", address, shards)
    run_to_the_end(config)
    return config


def test_the_run_is_on_all_of_it(uninterrupted: Config) -> None:
    """Equality below means something."""
    _, points, bad_samples = ends_of(uninterrupted)
    reasons = {json.loads(line)["reason"] for line in bad_samples.splitlines()}
    assert {"truncated_shard", "unreadable", "no_caption"} <= reasons
    assert max(point.get("epoch", 0) for point in points) >= 0.75  # all lanes but the longest have begun again
    assert all("val/loss" in points_of(uninterrupted)[number] for number in (0, -1))


@pytest.mark.parametrize(
    "faults", [["step:1"], ["step:7"], ["step:5", "step:6", "step:11"], ["rename:8"]], ids=" ".join
)
def test_a_killed_run_on_a_stream_ends_like_one_that_was_not(
    models: Path, shards: Path, address: str, tmp_path: Path, uninterrupted: Config, faults: list[str]
) -> None:
    config = streamed(models, tmp_path / "run", address, shards, workers=2)
    for fault in faults:
        run_until(config, fault)
    run_to_the_end(config)
    assert_same_end(config, uninterrupted)


def test_a_killed_run_on_a_streamed_dataset_ends_like_one_that_was_not(
    models: Path, shards: Path, tmp_path: Path
) -> None:
    """A folder that `datasets` saved is read like a dataset of the hub, without a network."""
    pictures = [{"bytes": encoded(noise(seed=number)), "path": None} for number in range(40)]
    columns = {"image": pictures, "caption": [f"picture {number} of noise" * (number != 3) for number in range(40)]}
    Dataset.from_dict(columns).cast_column("image", Image()).save_to_disk(tmp_path / "saved")
    data = replace(streamed(models, tmp_path, "", shards).data, train=[f"hf-stream:{tmp_path / 'saved'}"])
    whole, killed = (config_that_draws(models, tmp_path / name, data=data) for name in ("whole", "killed"))
    run_to_the_end(whole)
    run_until(killed, "step:5")
    run_until(killed, "step:9")
    run_to_the_end(killed)
    assert_same_end(killed, whole)


def test_a_bad_server_changes_nothing(
    models: Path, shards: Path, tmp_path: Path, uninterrupted: Config, address: str
) -> None:
    behaviour = Behaviour(drop_after=9_000, num_drops=6, statuses=[200, 503, 200, 503], headers={"Retry-After": "0"})
    with served(shards, behaviour) as other:
        config = streamed(models, tmp_path / "run", other, shards)
        run_to_the_end(config)
    assert behaviour.num_drops < 6 or len(behaviour.told) > 20
    weights, _, bad_samples = ends_of(config)
    expected_weights, _, expected_bad_samples = ends_of(uninterrupted)
    assert weights == expected_weights
    assert bad_samples.replace(other, address) == expected_bad_samples


def test_two_killed_processes_on_a_stream_end_like_two_that_were_not(
    shards: Path, address: str, tmp_path: Path
) -> None:
    folder = FolderOfLaunches(tmp_path)
    words = ("--data.train", f"{address}/{PATTERN}", "--data.max_bad_fraction", "0.9", "--data.shuffle_buffer", "16")
    words = (*words, "--data.workers", "1", "--loss.name", "clip")
    assert folder.finish(CPU_2, "whole", *words).code == 0
    assert folder.finish(CPU_2, "killed", *words, ACCEL_CLIP_FAULT="step:5").code != 0
    assert max(losses_by_step(tmp_path / "killed")) < 6
    done = folder.finish(CPU_2, "killed", *words)
    assert done.code == 0 and "going on from" in done.err
    assert losses_by_step(tmp_path / "killed") == losses_by_step(tmp_path / "whole")
    assert export_of(tmp_path / "killed") == export_of(tmp_path / "whole")
    assert len(losses_by_step(tmp_path / "whole")) == NUM_STEPS


def test_a_server_that_goes_away_ends_the_run_which_goes_on_later(
    models: Path, shards: Path, tmp_path: Path, uninterrupted: Config
) -> None:
    with served(shards) as other:
        config = streamed(models, tmp_path / "run", other, shards)
        run_until(config, "step:6")
    assert in_a_process(lambda: train(config)) != 0  # nobody answers
    assert status_of(tmp_path / "run")["state"] != "complete"


def test_streams_need_a_length_and_cannot_be_measured_on(
    models: Path, shards: Path, address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    config = streamed(models, tmp_path / "run", address, shards)
    monkeypatch.chdir(tmp_path)
    common = ["train", "--data.train", config.data.train[0], "--output_dir", "x", "--train.batch_size", "8"]  # type: ignore[list-item]
    for words, told in (
        ([], "train.steps: null, and http"),
        (["--train.steps", "5", "--data.val", f"{address}/shard-0.tar"], "is a stream"),
        (["--train.steps", "5", "--data.image_cache_gib", "1"], "data.image_cache_gib: http"),
    ):
        monkeypatch.setattr("sys.argv", ["accel-clip", *common, *words])
        assert cli.main() == 2
        assert told in capsys.readouterr().err
    assert replace(config, output_dir="x")
