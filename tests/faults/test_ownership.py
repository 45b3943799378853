"""What is the user's stays: folders that a command would replace, runs that others own, disks that are not there."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from accel_clip import Config, train
from accel_clip.cli import dispatch
from accel_clip.commands.export import export_run
from accel_clip.commands.plots import plot_curves, plot_run
from accel_clip.config import CheckpointConfig, StopConfig
from accel_clip.faults import ConfigError
from accel_clip.run.folder import RunFolder
from accel_clip.run.preconditions import prepare
from helpers.commands import ROOT, accel_clip
from helpers.kills import count_changes, killed_at, run_forked
from helpers.models import small_model
from helpers.patience import HANG_SECONDS
from helpers.runs import assert_same_end, config_that_draws, run_to_the_end, run_until


def hashes(folder: Path) -> dict[str, str]:
    """Return the hash of every file below a folder; links are told by where they point."""
    return {
        str(path.relative_to(folder)): str(path.readlink())
        if path.is_symlink()
        else hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


def put(folder: Path, **files: str) -> None:
    for name, text in files.items():
        file = folder / name.replace("__", "/").replace("_txt", ".txt")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


def with_pictures_cached(config: Config) -> Config:
    return replace(config, data=replace(config.data, image_cache_gib=1.0))


def with_features_cached(config: Config) -> Config:
    frozen = replace(config.model, freeze=["image"])
    kept = replace(config.train, cache_features=True)
    return replace(config, model=frozen, train=kept, data=replace(config.data, augmentation="none"))


THEIRS: dict[str, tuple[Callable[[Path], object], Callable[[Config], Config]]] = {
    "pictures": (lambda run: put(run, pictures__cat_txt="x"), with_pictures_cached),
    "pictures that are a file": (lambda run: put(run, pictures="x"), with_pictures_cached),
    "features": (lambda run: put(run, features__image__mine_txt="x"), with_features_cached),
    "export": (lambda run: put(run, export__thesis_txt="x"), lambda config: config),
    "an export of a project of theirs": (lambda run: put(run, export__README="x"), lambda config: config),
    "export as a link that points nowhere": (
        lambda run: [run.mkdir(), (run / "export").symlink_to("/not/there")],
        lambda config: config,
    ),
    "checkpoints as a link that points nowhere": (
        lambda run: [run.mkdir(), (run / "checkpoints").symlink_to("/not/there")],
        lambda config: config,
    ),
    "metrics.jsonl": (lambda run: [run.mkdir(), (run / "metrics.jsonl").write_text("{}")], lambda config: config),
    "bad_samples.jsonl": (
        lambda run: [run.mkdir(), (run / "bad_samples.jsonl").write_text("{}")],
        lambda config: config,
    ),
    "config.yaml": (lambda run: [run.mkdir(), (run / "config.yaml").write_text("seed: 0")], lambda config: config),
    "STATUS.json": (lambda run: [run.mkdir(), (run / "STATUS.json").write_text("{}")], lambda config: config),
    "a folder that has the name of a checkpoint": (
        lambda run: put(run, **{"checkpoints__step-00000004__mine_txt": "x"}),
        lambda config: config,
    ),
}


@pytest.mark.parametrize("what", THEIRS)
def test_what_a_run_would_replace_is_refused_before_anything_starts(data: Path, tmp_path: Path, what: str) -> None:
    prepare, settings = THEIRS[what]
    prepare(tmp_path / "run")
    before = hashes(tmp_path)
    name = what.split(maxsplit=1)[0] if "." in what else ""
    with pytest.raises(ConfigError, match=rf"^output_dir: .*{name}.*(move|mount)"):
        train(settings(config_that_draws(data, tmp_path / "run")))
    assert hashes(tmp_path) == before


def test_pictures_beside_the_table_are_no_cache(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    rows = ["image,caption"]
    for number in range(20):
        Image.new("RGB", (32, 32), (number, 0, 0)).save(tmp_path / "pictures" / f"{number}.png")
        rows.append(f"pictures/{number}.png,number {number}")
    (tmp_path / "photos.csv").write_text("\n".join(rows))
    before = hashes(tmp_path)
    words = ("--data.train", str(tmp_path / "photos.csv"), "--output_dir", str(tmp_path), "--data.image_cache_gib", "1")
    with pytest.raises(ConfigError, match=r"pictures is where the decoded pictures would go.*pictures/0\.png|0\.png"):
        dispatch(["train", *words])
    assert hashes(tmp_path) == before


@pytest.mark.slow
def test_folders_beside_what_a_run_writes_stay(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for name in ("export.old", "export.tmp", "pictures", "features/text", "plots"):
        put(run, **{f"{name.replace('/', '__')}__mine_txt": name})
    before = hashes(run)
    run_to_the_end(config_that_draws(data, run))
    assert hashes(run).items() >= before.items()
    assert (run / "export" / "open_clip_model.safetensors").is_file()


@pytest.mark.slow
def test_an_export_goes_into_no_folder_of_theirs(uninterrupted: Config, tmp_path: Path) -> None:
    home = tmp_path / "home"
    put(home, models__a_txt="1", **{"models.old__b_txt": "2", "models.tmp__c_txt": "3"})
    before = hashes(home)
    with pytest.raises(ConfigError, match=r"^--to: .*models is where the export would go.*a\.txt"):
        dispatch(["export", uninterrupted.output_dir, "--to", str(home / "models")])
    assert hashes(home) == before
    dispatch(["export", uninterrupted.output_dir, "--to", str(home / "new")])
    dispatch(["export", uninterrupted.output_dir, "--to", str(home / "new")])  # one of ours is replaced
    assert hashes(home).items() >= before.items()
    (home / "new" / "README.md").write_text("# My model, in my own words")
    with pytest.raises(ConfigError, match=r"README\.md"):
        dispatch(["export", uninterrupted.output_dir, "--to", str(home / "new")])
    assert (home / "new" / "README.md").read_text() == "# My model, in my own words"


@pytest.mark.slow
def test_a_plot_replaces_no_picture_of_theirs(uninterrupted: Config, tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "curves.png")
    before = hashes(tmp_path)
    with pytest.raises(ConfigError, match=r"^--to: .*curves\.png is not a plot of ours"):
        plot_run(Path(uninterrupted.output_dir), tmp_path)
    assert hashes(tmp_path) == before
    (tmp_path / "curves.png").unlink()
    paths = RunFolder(uninterrupted.output_dir)
    plot_curves(paths.metrics, tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as drawn:
        assert drawn.info["Software"] == "accel_clip"


GONE: dict[str, Callable[[Path, Path], object]] = {
    "a link to a disk that is not mounted": lambda run, away: [
        (run / "checkpoints").rename(away),
        (run / "checkpoints").symlink_to(away / "not-mounted"),
    ],
    "an empty mount point": lambda run, away: [(run / "checkpoints").rename(away), (run / "checkpoints").mkdir()],
    "removed": lambda run, away: (run / "checkpoints").rename(away),
    "emptied but for the pointer": lambda run, away: [
        away.mkdir(),
        *[path.rename(away / path.name) for path in (run / "checkpoints").glob("step-*")],
    ],
    "all damaged": lambda run, away: [
        file.write_bytes(file.read_bytes()[:-9]) for file in (run / "checkpoints").glob("step-*/model.safetensors")
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("how", GONE)
def test_a_run_whose_checkpoints_are_gone_does_not_begin_anew(data: Path, tmp_path: Path, how: str) -> None:
    config = config_that_draws(data, tmp_path / "run")
    run_until(config, "step:9")
    GONE[how](tmp_path / "run", tmp_path / "away")
    metrics = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(ConfigError, match=r"^output_dir: .*(mount|put one back)"):
        train(config)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == metrics


@pytest.mark.slow
def test_a_run_goes_on_when_its_disk_is_back(data: Path, tmp_path: Path, uninterrupted: Config) -> None:
    config = config_that_draws(data, tmp_path / "run")
    run_until(config, "step:9")
    checkpoints = tmp_path / "run" / "checkpoints"
    checkpoints.rename(tmp_path / "disk")
    checkpoints.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="mount that"):
        prepare(config)
    (tmp_path / "disk").rename(tmp_path / "elsewhere")
    run_to_the_end(config)
    assert_same_end(config, uninterrupted)
    assert checkpoints.is_symlink()


def wait_for(happened: Callable[[], bool], seconds: float = HANG_SECONDS) -> None:
    begin = time.monotonic()
    while not happened():
        assert time.monotonic() - begin < seconds
        time.sleep(0.05)


@pytest.mark.slow
def test_a_second_start_is_refused_and_the_first_ends_as_if_there_had_been_none(tmp_path: Path) -> None:
    words = [sys.executable, str(ROOT / "train.py"), "--model.name", small_model(tmp_path), "--train.steps", "60"]
    words += ["--train.batch_size", "16", "--checkpoint.every", "2", "--track.to", "[]", "--eval.every", "30"]
    words += ["--train.threads", "1", "--data.workers", "0"]
    first = subprocess.Popen([*words, "--output_dir", "run"], cwd=tmp_path, stderr=subprocess.PIPE)
    wait_for((tmp_path / "run" / "metrics.jsonl").exists)
    for _ in range(2):
        second = subprocess.run(
            [*words, "--output_dir", "run"], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert second.returncode == 2
        assert f"output_dir: process {first.pid} on " in second.stderr
        assert "Traceback" not in second.stderr
    said = accel_clip("check", *words[2:], "--output_dir", "run", "--seconds", "0", folder=tmp_path)
    assert said.code == 2
    first.communicate(timeout=HANG_SECONDS)
    assert first.returncode == 0
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)
    alone = subprocess.run(
        [*words, "--output_dir", "alone"], cwd=tmp_path, capture_output=True, timeout=HANG_SECONDS, check=False
    )
    assert alone.returncode == 0
    weights = Path("export") / "open_clip_model.safetensors"
    assert (tmp_path / "run" / weights).read_bytes() == (tmp_path / "alone" / weights).read_bytes()


@pytest.mark.slow
def test_a_killed_run_is_free_at_once_though_its_workers_live_on(tmp_path: Path) -> None:
    words = [sys.executable, str(ROOT / "train.py"), "--model.name", small_model(tmp_path), "--train.steps", "4000"]
    words += ["--train.batch_size", "16", "--checkpoint.every", "2", "--track.to", "[]", "--data.workers", "2"]
    first = subprocess.Popen([*words, "--output_dir", "run"], cwd=tmp_path, stderr=subprocess.DEVNULL)
    wait_for((tmp_path / "run" / "checkpoints" / "LATEST").exists)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    assert run_forked(lambda: RunFolder(tmp_path / "run").own()) == 0


def go(config: Config) -> None:
    torch.set_num_threads(1)
    train(config)


@pytest.mark.slow
def test_two_that_begin_at_the_same_time_do_not_share_a_folder(data: Path, tmp_path: Path) -> None:
    config = config_that_draws(data, tmp_path / "run")
    folder = RunFolder(config.output_dir)
    folder.create()  # another process has built its parts sooner

    def begin() -> None:
        with pytest.raises(ConfigError, match="trains in"):
            train(config)

    try:
        assert run_forked(begin) == 0
        assert not (tmp_path / "run" / "config.yaml").exists()
    finally:
        folder.lock.release()


@pytest.mark.slow
def test_a_kill_while_the_settings_are_written_loses_nothing(data: Path, tmp_path: Path, uninterrupted: Config) -> None:
    config = config_that_draws(data, tmp_path / "run")
    run_until(config, "step:5")
    for number in range(12):
        killed_at(number, tmp_path / "run", lambda: go(config), opened=True)
    run_to_the_end(config)
    assert_same_end(config, uninterrupted)


@pytest.mark.slow
def test_settings_that_a_crash_emptied_are_those_of_the_checkpoint(
    data: Path, tmp_path: Path, uninterrupted: Config
) -> None:
    config = config_that_draws(data, tmp_path / "run")
    run_until(config, "step:5")
    (tmp_path / "run" / "config.yaml").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"^seed: .* holds a run with 0, and now it is 1"):
        train(replace(config, seed=1))
    run_to_the_end(config)
    assert_same_end(config, uninterrupted)


def weights_in(folder: Path) -> bytes:
    return (folder / "open_clip_model.safetensors").read_bytes()


@pytest.mark.slow
def test_a_complete_run_without_its_export_makes_it_again(data: Path, tmp_path: Path, uninterrupted: Config) -> None:
    config = config_that_draws(data, tmp_path / "run")
    shutil.copytree(uninterrupted.output_dir, tmp_path / "run")
    whole = weights_in(tmp_path / "run" / "export")
    shutil.rmtree(tmp_path / "run" / "export")
    run_to_the_end(config)
    assert weights_in(tmp_path / "run" / "export") == whole
    shutil.rmtree(tmp_path / "run" / "export")
    export_run(tmp_path / "run", None)
    assert weights_in(tmp_path / "run" / "export") == whole


@pytest.mark.slow
def test_an_export_in_place_that_is_killed_at_any_change_is_made_again(tmp_path: Path, uninterrupted: Config) -> None:
    run = tmp_path / "run"
    shutil.copytree(uninterrupted.output_dir, run)
    whole = weights_in(run / "export")
    for number in range(count_changes(run, lambda: export_run(run, None))):
        assert killed_at(number, run, lambda: export_run(run, None))
        if number % 2:
            export_run(run, None)
        else:
            run_to_the_end(replace(uninterrupted, output_dir=str(run)))
        assert weights_in(run / "export") == whole
        assert not list(run.glob(".accel_clip-*"))


@pytest.mark.slow
def test_a_stopped_run_is_exported_from_its_newest_checkpoint(data: Path, tmp_path: Path) -> None:
    run_until(config_that_draws(data, tmp_path / "run"), "latest:6")
    export_run(tmp_path / "run", tmp_path / "model")
    saved = load_file(tmp_path / "run" / "checkpoints" / "step-00000006" / "model.safetensors")
    loaded = open_clip.create_model(f"local-dir:{tmp_path / 'model'}").state_dict()
    assert {f"clip.{name}" for name in loaded} <= set(saved)
    assert all(torch.equal(tensor, saved[f"clip.{name}"]) for name, tensor in loaded.items())
    assert json.loads((tmp_path / "model" / "metrics.json").read_text())["val/loss"] > 0


@pytest.mark.slow
def test_a_run_that_watches_a_metric_is_exported_from_its_best_checkpoint(data: Path, tmp_path: Path) -> None:
    watching = {"stop": StopConfig(metric="val/loss", mode="max", patience=99), "checkpoint": CheckpointConfig(every=1)}
    config = config_that_draws(data, tmp_path / "run", **watching)
    run_to_the_end(config)
    whole = weights_in(tmp_path / "run" / "export")
    best = (tmp_path / "run" / "checkpoints" / "BEST").read_text().strip()
    newest = (tmp_path / "run" / "checkpoints" / "LATEST").read_text().strip()
    assert best != newest, "the test would show nothing"
    assert weights_in(export_run(tmp_path / "run", tmp_path / "again")) == whole


@pytest.mark.slow
@pytest.mark.parametrize("what", ["nothing", "a folder of theirs", "a run that saved nothing"])
def test_what_is_no_run_is_not_exported(data: Path, tmp_path: Path, what: str) -> None:
    run = tmp_path / "run"
    if what == "a folder of theirs":
        put(run, a_txt="x")
    if what == "a run that saved nothing":
        run_until(config_that_draws(data, run), "step:1")
    with pytest.raises(ConfigError, match="holds no checkpoint that is whole, and no exported model"):
        export_run(run, tmp_path / "model")
    assert not (tmp_path / "model").exists()
