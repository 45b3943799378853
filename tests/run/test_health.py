"""A run that learns nothing, or whose features collapse, is told to its user once there is reason to."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import normalize

from accel_clip.config import Config, ModelConfig, OptimConfig
from accel_clip.evaluation.examples import mean_cosine
from accel_clip.run.health import ChanceWatch, WaitWatch, rate_warning, warn_of_collapse
from helpers.comparison import rounding


def test_a_loss_that_stays_at_chance_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    watch = ChanceWatch(64)
    watch.look(100, {"loss/contrastive_loss": math.log(64)})  # too early
    watch.look(300, {"loss/contrastive_loss": math.log(64) - 0.5})  # it learns
    watch.look(300, {"loss/margin_loss": 4.16})  # another loss starts elsewhere
    assert "warning" not in capsys.readouterr().err
    for step in (400, 500):
        watch.look(step, {"loss/contrastive_loss": math.log(64) + 0.01})
    said = capsys.readouterr().err
    assert said.count("warning") == 1 and "4.169" in said and "4.159" in said and "400 steps" in said


def test_a_step_that_keeps_waiting_for_data_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    watch = WaitWatch(num_workers=1, num_cores=8)
    slow, fast = {"data_time": 0.3, "step_time": 0.7}, {"data_time": 0.01, "step_time": 0.7}
    for step, point in enumerate([slow, slow, slow, fast, slow, slow]):
        watch.look(step, point)
    assert "warning" not in capsys.readouterr().err  # the first point does not count, and waits must follow each other
    for step in (70, 80, 90):
        watch.look(step, slow)
    said = capsys.readouterr().err
    assert said.count("warning") == 1 and "at step 70 30% of the time" in said and "now 1, 8 cores" in said


def test_features_that_collapse_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    varied, alike = (
        normalize(torch.randn(50, 8), dim=1),
        normalize(torch.randn(1, 8) + 0.01 * torch.randn(50, 8), dim=1),
    )
    exact = (varied.double() @ varied.double().T).mean().item()
    assert mean_cosine(varied) == pytest.approx(exact, abs=rounding(8 * 50))  # cosines are at most 1
    cosines = {"pictures": mean_cosine(alike), "captions": mean_cosine(varied)}
    warn_of_collapse(0, cosines)
    assert "warning" not in capsys.readouterr().err
    warn_of_collapse(250, cosines)
    said = capsys.readouterr().err
    assert "different pictures are nearly equal" in said and "captions" not in said


WITH_WEIGHTS = ModelConfig("ViT-B-32", pretrained="laion2b_s34b_b79k")


@pytest.mark.parametrize(
    ("model", "optim", "key"),
    [
        (WITH_WEIGHTS, OptimConfig(), "optim.lr"),  # the rate of a run from scratch
        (ModelConfig("hf-hub:org/name"), OptimConfig(lr=1e-4), "optim.lr"),
        (ModelConfig("local-dir:export"), OptimConfig(lr=6e-5), "optim.lr"),
        (WITH_WEIGHTS, OptimConfig(lr=1e-5, lr_by_name={"visual.*": 1e-3}), "optim.lr_by_name.visual.*"),
        (WITH_WEIGHTS, OptimConfig(lr=1e-5, lr_by_name={"logit_scale": 1e-2}), None),
        (WITH_WEIGHTS, OptimConfig(lr=5e-5), None),
        (ModelConfig("tiny"), OptimConfig(), None),
    ],
)
def test_a_rate_that_weights_do_not_bear_is_told_with_its_setting(
    model: ModelConfig, optim: OptimConfig, key: str | None
) -> None:
    said = rate_warning(Config(model=model, optim=optim))
    assert said is None if key is None else said is not None and said.startswith(f"{key}: ")
