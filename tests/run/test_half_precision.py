"""Runs in fp16 with a real scaler, on a CPU: overflows, and steps that are not finite under every policy."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor

from accel_clip import LOSSES
from accel_clip.config import LossConfig, OptimConfig, TrainConfig
from accel_clip.faults import NonFiniteError
from accel_clip.process.accelerator import build_accelerator, forget_previous_accelerator, process_as_found
from accel_clip.run import parts
from accel_clip.run.folder import RunFolder
from accel_clip.run.preconditions import prepare
from accel_clip.trainer import Trainer
from helpers.models import small_model
from helpers.runs import points_of, short_config

pytestmark = pytest.mark.usefixtures("own_entries")
NUM_STEPS, NAN_CALL = 8, 5  # the first call is that of a trial
FIRST_SCALE = 2.0**40


@pytest.fixture(autouse=True)
def scaled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let runs scale their gradients as fp16 does, which Accelerate does on a GPU alone."""

    def with_scaler(config: TrainConfig) -> Accelerator:
        accelerator = build_accelerator(config)
        accelerator.native_amp, accelerator.scaler = True, torch.amp.GradScaler("cpu", init_scale=FIRST_SCALE)
        AcceleratorState._shared_state["_mixed_precision"] = "fp16"
        return accelerator

    monkeypatch.setattr(parts, "build_accelerator", with_scaler)
    yield
    forget_previous_accelerator()


def trainer_of(folder: Path, policy: str, loss: str = "clip") -> Trainer:
    config = short_config(
        folder / "run",
        "demo:pairs",
        small_model(folder),
        steps=NUM_STEPS,
        train=TrainConfig(batch_size=8, steps=NUM_STEPS, threads=1, non_finite=policy),
        loss=LossConfig(loss),
        optim=OptimConfig(lr=1e-3),
    )
    return Trainer(prepare(config), RunFolder(config.output_dir))


def not_a_number_once() -> None:
    calls: list[int] = []

    @LOSSES.register("not_a_number_once")
    def function(image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> dict[str, Tensor]:
        """A loss that is NaN in one step."""
        calls.extend([1] * image_features.requires_grad)  # an evaluation does not count
        value = -(image_features * text_features).sum(1).mean() * logit_scale
        return {"contrastive_loss": value * (float("nan") if len(calls) == NAN_CALL else 1)}


@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_a_step_that_is_not_finite_is_left_out_and_the_run_goes_on(tmp_path: Path, policy: str) -> None:
    not_a_number_once()
    with process_as_found():
        trainer = trainer_of(tmp_path, policy, "not_a_number_once")
        assert trainer.run().num_steps == NUM_STEPS
    assert all(torch.isfinite(each).all() for each in trainer.learner.model.clip.parameters())


def test_a_loss_that_is_not_finite_stops_a_run_that_was_told_nothing_else(tmp_path: Path) -> None:
    not_a_number_once()
    with process_as_found(), pytest.raises(NonFiniteError, match="step 4"):
        trainer_of(tmp_path, "stop", "not_a_number_once").run()


def test_the_scale_of_the_gradients_is_told_and_falls_until_they_fit(tmp_path: Path) -> None:
    with process_as_found():
        trainer = trainer_of(tmp_path, "stop")
        trainer.run()
    scales = [point["loss_scale"] for point in points_of(trainer.config) if "loss_scale" in point]
    assert len(scales) == NUM_STEPS and scales[-1] < FIRST_SCALE
