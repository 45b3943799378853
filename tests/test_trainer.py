"""Whole runs in this process: what the loop does to weights, metrics, trackers and bad data."""

from __future__ import annotations

import json
import os
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from accel_clip import Config, train
from accel_clip.commands.evaluate import evaluate_run
from accel_clip.config import (
    DataConfig,
    EvalConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    StopConfig,
    TrackConfig,
    TrainConfig,
)
from accel_clip.data.examples import Preparation, preparation_for
from accel_clip.data.loader import BatchPlaces, TrainingPairs, iterate
from accel_clip.data.order import Order
from accel_clip.data.sources.resolve import open_source
from accel_clip.faults import ConfigError, DataError, NonFiniteError
from accel_clip.losses.base import LOSSES
from accel_clip.models.build import build_model
from helpers.commands import train_py
from helpers.comparison import EPSILON, assert_equal_to_rounding, rounding
from helpers.models import small_model
from helpers.pictures import write_coloured_pictures
from helpers.runs import points_of, short_config

NUM_PAIRS = 48


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Write 48 small pictures with captions that name their colour, the last six in Chinese."""
    rows = write_coloured_pictures(tmp_path, NUM_PAIRS)
    rows[42:] = [f"{number}.png,第{number}张图" for number in range(42, NUM_PAIRS)]
    (tmp_path / "pairs.csv").write_text("\n".join(["image,caption", *rows]), encoding="utf-8")
    return tmp_path / "pairs.csv"


def config_for(table: Path, output: str = "run", **sections: Any) -> Config:
    """Return settings of a run of four steps of 8 pairs by plain SGD."""
    usual = {
        "data": DataConfig(train=[str(table)], val_fraction=0.25, workers=0),
        "optim": OptimConfig(name="sgd", lr=0.1, options={"momentum": 0.0}, weight_decay=0, grad_clip=None, warmup=0),
    }
    return short_config(table.parent / output, "", small_model(table.parent), 4, **{**usual, **sections})


def weights_of(config: Config) -> dict[str, torch.Tensor]:
    return load_file(Path(config.output_dir) / "export" / "open_clip_model.safetensors")


def test_a_run_on_a_stream_is_shown_by_what_it_was_measured_on(table: Path) -> None:
    """As `accel-clip plot` does; the stream, whose server is gone, is not needed."""
    data = DataConfig(train=["http://127.0.0.1:9/{0..9}.tar"], val=[str(table)], workers=0)
    assert evaluate_run(config_for(table, data=data)).picture_grid() is not None


def test_accumulation_averages_contrastive_batches(table: Path) -> None:
    """Two batches of one step: the gradient is the mean of both gradients at the same weights."""
    both = config_for(table, train=TrainConfig(batch_size=8, steps=1, accumulate=2, threads=1))
    both = replace(both, optim=replace(both.optim, schedule="constant"))
    train(both)
    single, exact = (build_reference(both, dtype) for dtype in (torch.float32, torch.float64))
    weights = weights_of(both)
    assert_equal_to_rounding({name: weights[name] for name in exact}, single, exact)
    assert [point["samples"] for point in points_of(both) if "loss" in point] == [16]


def test_a_run_leaves_the_process_as_it_found_it(table: Path) -> None:
    """As a notebook wants it: threads and TF32 are set for the process, and given back also where a run fails."""
    matmul, threads = torch.backends.cuda.matmul, torch.get_num_threads()
    torch.set_num_threads(threads + 2)
    running = set(threading.enumerate())
    try:
        train(config_for(table))
        with pytest.raises(ConfigError, match="fewer than one batch"):
            train(config_for(table, "none", train=TrainConfig(batch_size=1000, steps=1, threads=1)))
        found = torch.get_num_threads(), matmul.fp32_precision
    finally:
        torch.set_num_threads(threads)
    assert found == (threads + 2, "none")
    assert not [each.name for each in threading.enumerate() if each not in running and "checkpoint" in each.name]


def build_reference(config: Config, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return the weights after one SGD step on the mean of the losses of the first two batches, by plain autograd."""
    from accel_clip.data.pairs import open_training
    from accel_clip.randomness import derive_seed

    torch.manual_seed(derive_seed(config.seed, "weights"))
    model = build_model(config.model)
    model.clip.to(dtype)
    pairs = open_training(config.data).source
    order = Order(len(pairs), config.train.batch_size, config.seed)
    data = TrainingPairs(pairs, order, preparation_for(model, config))
    mean = torch.tensor(model.preprocess_config["mean"]).view(1, 3, 1, 1)
    std = torch.tensor(model.preprocess_config["std"]).view(1, 3, 1, 1)
    loss = torch.zeros((), dtype=dtype)
    for batch in iterate(data, BatchPlaces(order, range(2), 0, 1), config.data, 0, pin_memory=False):
        out = model.clip(image=(batch.image.to(dtype) / 255 - mean) / std, text=batch.tokens)
        logits = out["logit_scale"] * out["image_features"] @ out["text_features"].T
        labels = torch.arange(len(logits))
        for direction in (logits, logits.T):
            loss = loss + torch.nn.functional.cross_entropy(direction, labels) / 4
    loss.backward()
    return {
        name: (each - config.optim.lr * each.grad).detach() if each.grad is not None else each.detach()
        for name, each in model.clip.named_parameters()
    }


def test_a_run_does_not_depend_on_loader_workers(table: Path) -> None:
    results = []
    for workers in (0, 1, 3):
        config = config_for(table, f"workers{workers}")
        config = replace(config, data=replace(config.data, workers=workers), optim=OptimConfig())
        train(config)
        results.append(weights_of(config))
    for other in results[1:]:
        assert all(torch.equal(value, other[name]) for name, value in results[0].items())


def test_two_runs_are_equal_and_seeds_differ(table: Path) -> None:
    model = ModelConfig(small_model(table.parent), options={"force_patch_dropout": 0.5})
    runs = [config_for(table, f"run{i}", model=model, seed=seed) for i, seed in enumerate((0, 0, 1))]
    first, second, third = (train(config) and weights_of(config) for config in runs)
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert not torch.equal(first["visual.proj"], third["visual.proj"])


def test_tensorboard_reads_the_curves_and_the_picture_grid(table: Path) -> None:
    config = config_for(table, track=TrackConfig(to=["tensorboard"], every=2))
    train(config)
    events = EventAccumulator(str(Path(config.output_dir) / "tensorboard"))
    events.Reload()
    points = [(point["step"], point["loss"]) for point in points_of(config) if "loss" in point]
    read = [(event.step, event.value) for event in events.Scalars("loss")]
    assert [step for step, _ in read] == [2, 4]
    assert read == [(step, pytest.approx(value, rel=EPSILON)) for step, value in points]
    assert {"lr", "logit_scale", "val/text_to_image_R@10", "samples_per_second"} <= set(events.Tags()["scalars"])
    assert [image.step for image in events.Images("retrieval")] == [0, 4]
    assert events.Images("retrieval")[0].width > 500


def test_learning_rate_grad_norm_and_logit_scale_are_what_the_settings_say(table: Path) -> None:
    optim = OptimConfig(name="sgd", lr=1.0, weight_decay=0, warmup=2, schedule="linear", grad_clip=1e-3)
    config = config_for(table, optim=replace(optim, lr_by_name={"logit_scale": 1e5}))
    config = replace(config, train=replace(config.train, max_logit_scale=20.0))
    train(config)
    training = [point for point in points_of(config) if "loss" in point]
    assert [point["lr"] for point in training] == pytest.approx([0.5, 1.0, 1.0, 0.5])
    assert all(point["grad_norm"] > 1e-3 for point in training)  # as it was before clipping
    assert all(1 - rounding(1) <= point["logit_scale"] <= 20 * (1 + rounding(1)) for point in training)


def test_a_metric_stops_the_run_and_the_best_weights_are_exported(table: Path) -> None:
    stop = StopConfig(metric="val/loss", patience=2)
    optim = OptimConfig(lr=0.5, warmup=0, schedule="constant")  # so high that the model soon gets no better
    config = config_for(table, stop=stop, eval=EvalConfig(every=1), optim=optim)
    config = replace(config, train=replace(config.train, steps=40))
    result = train(config)
    evaluations = [point for point in points_of(config) if "val/loss" in point]
    best = min(evaluations, key=lambda point: point["val/loss"])
    assert 0 < best["step"] < 38 and result.num_steps == evaluations[-1]["step"] == best["step"] + 2
    assert result.metrics["val/loss"] == best["val/loss"]
    shorter = replace(config, output_dir=config.output_dir + "2", stop=StopConfig())
    shorter = replace(shorter, train=replace(config.train, steps=best["step"]))
    train(shorter)
    assert all(torch.equal(value, weights_of(shorter)[name]) for name, value in weights_of(config).items())


def test_a_metric_that_is_not_logged_is_refused(table: Path) -> None:
    with pytest.raises(ConfigError, match=r"stop\.metric: 'val/los' .* did you mean 'val/loss'"):
        train(config_for(table, stop=StopConfig(metric="val/los")))
    assert not (table.parent / "run").exists()


def test_a_loss_that_is_not_a_number_stops_the_run(table: Path, own_entries: None) -> None:
    @LOSSES.register("test_nan")
    def broken(image_features: torch.Tensor, text_features: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"nan_loss": (image_features * text_features).sum() * float("nan")}

    config = config_for(table, loss=LossConfig("test_nan"))
    with pytest.raises(NonFiniteError, match="step 1 is not finite: loss nan"):
        train(config)
    status = json.loads((Path(config.output_dir) / "STATUS.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 4)
    assert not (Path(config.output_dir) / "export").exists()


def without_captions(table: Path, rows: tuple[int, ...]) -> None:
    lines = table.read_text(encoding="utf-8").splitlines()
    table.write_text("\n".join(f"{i - 1}.png," if i - 1 in rows else line for i, line in enumerate(lines)))


def test_samples_without_a_caption_are_replaced_counted_and_listed_once(table: Path) -> None:
    without_captions(table, (3, 17, 30))
    config = config_for(table)
    data = replace(config.data, val_fraction=0.0, max_bad_fraction=0.1)
    config = replace(config, data=data, train=replace(config.train, steps=None, epochs=2))
    train(config)
    lines = (Path(config.output_dir) / "bad_samples.jsonl").read_text().splitlines()
    listed = [json.loads(line) for line in lines]
    assert sorted(each["sample"] for each in listed) == [3, 17, 30]
    assert all(each["reason"] == "no_caption" and each["epoch"] == 0 for each in listed)
    refused = replace(config, output_dir=config.output_dir + "2", data=replace(data, max_bad_fraction=0.05))
    with pytest.raises(
        DataError, match=r"3 of 48 samples are unusable \(no_caption 3\).*data\.max_bad_fraction = 0\.05"
    ):
        train(refused)


def test_replacements_never_put_a_sample_twice_into_a_batch(table: Path) -> None:
    without_captions(table, (1, 2, 3, 4, 5, 20, 21, 40))
    source = open_source(str(table), DataConfig())
    model = build_model(ModelConfig(small_model(table.parent)))
    order = Order(NUM_PAIRS, 10, seed=5)
    pairs = TrainingPairs(source, order, Preparation(model.tokenizer, (32, 32), 1e6, 5))
    for batch in iterate(pairs, BatchPlaces(order, range(8), 0, 1), DataConfig(), 0, pin_memory=False):
        assert len(set(batch.sample.tolist())) == 10
        assert not set(batch.sample.tolist()) & {1, 2, 3, 4, 5, 20, 21, 40}


@pytest.mark.parametrize("workers", [0, 1])
def test_broken_and_missing_pictures_are_replaced_in_training_and_left_out_of_evaluation(
    table: Path, workers: int, capsys: pytest.CaptureFixture[str]
) -> None:
    (table.parent / "7.png").write_bytes((table.parent / "7.png").read_bytes()[:60])
    (table.parent / "9.png").unlink()
    config = config_for(table)
    data = replace(config.data, val=[str(table)], max_bad_fraction=0.05, workers=workers)
    config = replace(config, data=data, train=replace(config.train, steps=None, epochs=1))
    train(config)
    lines = (Path(config.output_dir) / "bad_samples.jsonl").read_text().splitlines()
    listed = {each["sample"]: (each["reason"], Path(each["path"]).name) for each in map(json.loads, lines)}
    assert listed == {7: ("unreadable", "7.png"), 9: ("missing_file", "9.png")}
    said = capsys.readouterr().err
    assert "goes without 2 of 48 pictures: missing_file 1, unreadable 1; the first is" in said
    assert "missing_file 1, unreadable 1; each was replaced" in said


def test_a_wrong_image_root_is_asked_about(table: Path) -> None:
    (table.parent / "elsewhere").mkdir()
    config = config_for(table)
    data = replace(config.data, image_root=str(table.parent / "elsewhere"))
    with pytest.raises(DataError, match=r"missing_file.*is data\.image_root right"):
        train(replace(config, data=data))


def test_chinese_captions_from_gb18030_are_the_same_as_from_utf8(table: Path) -> None:
    other = table.with_name("gb.csv")
    other.write_bytes(table.read_text(encoding="utf-8").encode("gb18030"))
    first, second = (open_source(str(file), DataConfig(encoding=None)) for file in (table, other))
    assert first[45].captions == second[45].captions == ("第45张图",)


def test_labelled_pictures_are_classified(table: Path) -> None:
    for number in range(6):
        folder = table.parent / "classes" / ("red" if number % 2 else "dark_blue")
        folder.mkdir(parents=True, exist_ok=True)
        (table.parent / f"{number}.png").rename(folder / f"{number}.png")
    without_captions(table, ())
    lines = table.read_text(encoding="utf-8").splitlines()
    table.write_text("\n".join([lines[0], *lines[7:]]), encoding="utf-8")
    config = config_for(table, eval=EvalConfig(zero_shot=str(table.parent / "classes")))
    assert train(config).metrics["zero_shot/top1"] in [number / 6 for number in range(7)]


WANDB = """
import json, os

class Run:
    def log(self, values, step=None, **more): pass
    def finish(self): pass
    class config:
        update = staticmethod(lambda *values, **more: None)

config = Run.config

def init(**given):
    with open(os.environ["STARTS"], "a") as file:
        file.write(json.dumps(given) + "\\n")
    return Run()
"""


@pytest.mark.slow
def test_a_resumed_run_is_one_run_in_wandb_and_lies_in_its_folder(tmp_path: Path) -> None:
    (tmp_path / "packages" / "wandb-1.0.dist-info").mkdir(parents=True)
    described = "Metadata-Version: 2.1\nName: wandb\nVersion: 1.0\n"
    (tmp_path / "packages" / "wandb-1.0.dist-info" / "METADATA").write_text(described)
    (tmp_path / "packages" / "wandb.py").write_text(WANDB)
    path = os.pathsep.join([str(tmp_path / "packages"), os.environ.get("PYTHONPATH", "")])
    environment = {"PYTHONPATH": path, "STARTS": str(tmp_path / "starts.jsonl")}
    words = ["--model.name", small_model(tmp_path), "--train.steps", "4", "--train.batch_size", "8"]
    words += ["--track.to", "[wandb]", "--data.workers", "0", "--data.val_fraction", "0", "--checkpoint.every", "1"]
    for name, fault, code in (("a", "step:3", 9), ("a", "none", 0), ("b", "none", 0)):
        done = train_py(*words, "--output_dir", name, folder=tmp_path, ACCEL_CLIP_FAULT=fault, **environment)
        assert done.code == code, done.err
    starts = [json.loads(line) for line in (tmp_path / "starts.jsonl").read_text().splitlines()]
    assert len(starts) == 3 and starts[0]["id"] == starts[1]["id"] != starts[2]["id"]
    assert [start["dir"] for start in starts] == ["a", "a", "b"] and {start["resume"] for start in starts} == {"allow"}
