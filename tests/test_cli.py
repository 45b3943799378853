"""The commands: exit codes, one line for every mistake, and no folder left behind by one."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from accel_clip import cli
from helpers.commands import ROOT, accel_clip, train_py, without_torch
from helpers.models import small_model
from helpers.patience import HANG_SECONDS


def small_run(folder: Path) -> list[str]:
    """Return settings of a run that takes a few seconds."""
    model = ["--model.name", small_model(folder), "--output_dir", "run", "--train.batch_size", "16"]
    return [*model, "--train.steps", "4", "--track.every", "2", "--data.workers", "1"]


@pytest.mark.parametrize(
    ("words", "code", "parts"),
    [
        (["--optim.lrr", "1"], 2, ["optim.lrr", "optim.lr"]),
        (["--optim.lr", "fast"], 2, ["optim.lr", "float", "fast"]),
        (["--data.train", "photos.csv"], 3, ["data.train", "photos.csv"]),
        (["--data.train", "dmeo"], 3, ["data.train", "dmeo", "demo"]),
        (["--plugins", "mine.py"], 2, ["plugins", "mine.py"]),
        (["--output_dir", "file/run"], 2, ["output_dir", "file"]),
    ],
)
def test_mistakes_that_need_no_torch_are_told_in_one_line_without_it(
    tmp_path: Path, words: list[str], code: int, parts: list[str]
) -> None:
    (tmp_path / "file").touch()
    done = train_py("--output_dir", "run", *words, folder=tmp_path, **without_torch(tmp_path))
    assert done.code == code, done.err
    assert len(done.err.strip().splitlines()) == 1 and all(part in done.err for part in parts), done.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["blocked", "file"]


@pytest.mark.parametrize(
    ("words", "code", "parts"),
    [
        (["--loss.name", "clipp"], 2, ["loss.name", "clipp", "clip", "siglip"]),
        (["--loss.options", "{margin: 1}"], 2, ["loss.options", "margin"]),
        (["--optim.name", "adamv"], 2, ["optim.name", "adamv", "adamw"]),
        (["--optim.schedule", "cosin"], 2, ["optim.schedule", "cosin", "cosine"]),
        (["--track.to", "tensorbord"], 2, ["track.to", "tensorbord", "tensorboard"]),
        (["--track.to", "aim"], 2, ["track.to", "aim", "pip install aim"]),
        (["--model.name", "ViT-B-99"], 2, ["model.name", "ViT-B-99", "ViT-B-"]),
        (["--model.name", "nowhere.json"], 2, ["model.name", "nowhere.json"]),
        (["--model.name", "local-dir:nowhere"], 2, ["model.name", "nowhere"]),
        (["--model.name", "ViT-B-32", "--model.pretrained", "laion3b"], 2, ["model.pretrained", "laion3b", "laion2b"]),
        (["--model.options", "{precision: fp16}"], 2, ["model.options", "precision"]),
        (["--model.options", "{layers: 3}"], 2, ["model.options", "layers"]),
        (["--model.freeze", "visul.*"], 2, ["model.freeze", "visul.*"]),
        (["--model.freeze", "*"], 2, ["model.freeze", "nothing to train"]),
        (["--optim.lr_by_name", "{'visul.*': 1e-5}"], 2, ["optim.lr_by_name", "visul.*"]),
        (["--optim.warmup", "50", "--train.steps", "20"], 2, ["optim.warmup", "50", "20"]),
        (["--train.batch_size", "1000000"], 2, ["train.batch_size", "1000000"]),
        (["--data.train", "broken.csv"], 2, ["data.image_key", "broken.csv"]),
    ],
)
def test_mistakes_in_names_are_told_in_one_line_and_leave_no_folder(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    code: int,
    parts: list[str],
) -> None:
    (tmp_path / "broken.csv").write_text("a,b\n1,2\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", "--output_dir", "run", *words])
    assert cli.train_main() == code
    said = [line for line in capsys.readouterr().err.strip().splitlines() if "error" in line]
    assert len(said) == 1 and all(part in said[0] for part in parts), said
    assert not (tmp_path / "run").exists()


def test_a_run_writes_its_folder_and_open_clip_loads_the_export(tmp_path: Path) -> None:
    done = train_py(*small_run(tmp_path), folder=tmp_path)
    assert done.code == 0, done.err
    run = tmp_path / "run"
    status = json.loads((run / "STATUS.json").read_text())
    assert (status["state"], status["step"], status["exit_code"]) == ("complete", 4, 0)
    points = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    training = [point for point in points if "loss" in point]
    assert [point["step"] for point in training] == [2, 4]
    expected = {"samples", "epoch", "loss/contrastive_loss", "lr", "logit_scale", "grad_norm", "samples_per_second"}
    assert expected | {"data_time", "step_time"} <= set(training[0])
    assert training[1]["samples"] == 64
    evaluations = [point for point in points if "val/loss" in point]
    assert [point["step"] for point in evaluations] == [0, 4]
    names = {f"val/{way}_R@{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)}
    assert names | {"val/image_to_text_mean_rank", "val/text_to_image_median_rank"} <= set(evaluations[0])
    assert (
        "local-dir:run/export" in done.err and "tensorboard --logdir run" in done.err and "accel-clip eval" in done.err
    )

    again = train_py(*small_run(tmp_path), folder=tmp_path)
    assert again.code == 0 and "the run in run is complete at step 4" in again.err
    refused = train_py(*small_run(tmp_path), "--checkpoint.resume", "never", folder=tmp_path)
    assert refused.code == 2 and "checkpoint.resume: never" in refused.err and "another output_dir" in refused.err
    (tmp_path / "red").mkdir()
    (tmp_path / "blue").mkdir()
    for number, colour in enumerate(("red", "blue", "red")):
        Image.new("RGB", (40, 30), colour).save(tmp_path / colour / f"{number}.png")
    (tmp_path / "test.csv").write_text("image,caption\nred/0.png,red\nblue/1.png,blue\nred/2.png,also red\n")
    words = ("--model.name", "local-dir:run/export", "--data.val", "test.csv", "--json")
    measured = accel_clip("eval", *words, folder=tmp_path)
    assert measured.code == 0, measured.err
    assert json.loads(measured.out)["val/loss"] > 0

    exported = accel_clip("export", "run", "--to", "copy", folder=tmp_path)
    assert exported.code == 0, exported.err
    file = "open_clip_model.safetensors"
    assert (tmp_path / "copy" / file).read_bytes() == (run / "export" / file).read_bytes()
    reloaded = train_py("--config", "run/config.yaml", "--output_dir", "run2", "--train.steps", "2", folder=tmp_path)
    assert reloaded.code == 0, reloaded.err


@pytest.mark.parametrize("kind", cli.KINDS)
def test_list_names_what_settings_can_take(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    cli.list_command([kind])
    expected = {
        "evaluators": ["retrieval", "zero_shot"],
        "hooks": [],  # all are a user's own
        "losses": ["clip", "siglip"],
        "optimizers": ["adamw", "sgd", "lion", "muon"],
        "schedules": ["cosine", "constant", "linear", "cosine_restarts", "wsd"],
        "sources": ["demo", "hf"],
        "models": ["tiny", "ViT-B-32"],
        "trackers": ["tensorboard", "wandb", "trackio"],
    }
    said = capsys.readouterr()
    listed = {line.split()[0] for line in said.out.splitlines()}
    assert bool(listed) != ("no hooks are registered" in said.err)
    assert set(expected[kind]) <= listed


def processor_seconds() -> float:
    """Return what ended commands have used, which other programs on the machine hardly change."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def test_help_and_wrong_commands(tmp_path: Path) -> None:
    before = processor_seconds()
    done = train_py("--help", folder=tmp_path)
    assert done.code == 0 and "--optim.lr_by_name" in done.out and processor_seconds() - before < 2
    assert accel_clip("--help", folder=tmp_path).out.count("\n") > 5
    wrong = accel_clip("exprot", folder=tmp_path)
    assert wrong.code == 2 and "did you mean 'export'" in wrong.err
    assert accel_clip("export", "nowhere", folder=tmp_path).code == 2
    assert accel_clip("eval", folder=tmp_path).code == 2


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["starting", "training"])
def test_ctrl_c_ends_every_process_with_one_line(tmp_path: Path, moment: str) -> None:
    words = [sys.executable, str(ROOT / "train.py"), *small_run(tmp_path), "--train.steps", "100000"]
    started = tmp_path / "started"
    if moment == "starting":
        (tmp_path / "sleeps.py").write_text("import time\nopen('started', 'w').close()\ntime.sleep(600)\n")
        words += ["--plugins", "sleeps.py"]
    process = subprocess.Popen(
        words,
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509  a handler alone
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not (started.is_file() or (metrics.is_file() and '"loss"' in metrics.read_text())):
        assert process.poll() is None
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    said = process.communicate(timeout=HANG_SECONDS)[1]
    code, last_words = (130, "interrupted") if moment == "starting" else (75, "and saved: the same command goes on")
    assert process.returncode == code
    assert "Traceback" not in said and last_words in said.strip().splitlines()[-1], said
    with pytest.raises(ProcessLookupError):  # the whole group is gone, loader workers included
        os.killpg(process.pid, 0)
    if moment == "training":
        status = json.loads((tmp_path / "run" / "STATUS.json").read_text())
        assert (status["state"], status["exit_code"]) == ("preempted", 75)
