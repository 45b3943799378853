"""What learns: one optimizer step is that of plain SGD on the whole batch's gradient, and a step left out is none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch.nn import functional

from accel_clip.config import Config, LossConfig, ModelConfig, OptimConfig, TrainConfig
from accel_clip.data.batch import Batch
from accel_clip.losses.base import build_loss
from accel_clip.meters import MeterGroup
from accel_clip.models.build import ClipModel, build_model
from accel_clip.optim.schedules import build_schedule
from accel_clip.step.assembly import assemble
from accel_clip.step.learner import Learner
from helpers.comparison import assert_equal_to_rounding, in_float64
from helpers.models import small_model

NUM_PAIRS, RATE, STEP = 10, 0.5, 3
OPTIM = OptimConfig(name="sgd", lr=RATE, weight_decay=0.0, schedule="linear", warmup=0, grad_clip=None)


def learner_for(tmp_path: Path, accumulate: int = 1, optim: OptimConfig = OPTIM) -> Learner:
    config = Config(optim=optim, train=TrainConfig(batch_size=NUM_PAIRS, micro_batch_size=3, accumulate=accumulate))
    torch.manual_seed(0)
    model = build_model(ModelConfig(small_model(tmp_path)))
    loss = build_loss(LossConfig())
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    assembly = assemble(config, accelerator, loss, model)
    return Learner(config, model, loss, assembly, build_schedule(optim, 10), stage=0, saved_plan=None)


def batches_for(model: ClipModel, number: int) -> list[Batch]:
    batches = []
    for seed in range(number):
        generator = torch.Generator().manual_seed(seed)
        captions = [f"caption {pair} of batch {seed}" for pair in range(NUM_PAIRS)]
        batches.append(
            Batch(
                image=torch.randint(0, 256, (NUM_PAIRS, 3, 32, 32), dtype=torch.uint8, generator=generator),
                tokens=model.tokenizer(captions),
                sample=torch.arange(NUM_PAIRS),
                caption_hash=torch.arange(NUM_PAIRS),
                picture_hash=torch.arange(NUM_PAIRS),
            )
        )
    return batches


def weights_of(model: ClipModel) -> dict[str, torch.Tensor]:
    return {name: each.detach().clone() for name, each in model.clip.named_parameters()}


def trained_by_hand(model: ClipModel, batches: list[Batch], rate: float, limit: float) -> dict[str, torch.Tensor]:
    """Return the weights after one step of SGD on the mean gradient of the batches, each formed in one piece."""
    clip = model.clip.train()
    dtype = clip.logit_scale.dtype
    mean, std = (torch.tensor(model.preprocess_config[key], dtype=dtype).view(3, 1, 1) for key in ("mean", "std"))
    for batch in batches:
        outputs = clip((batch.image.to(dtype) / 255 - mean) / std, batch.tokens)
        logits = outputs["logit_scale"] * outputs["image_features"] @ outputs["text_features"].T
        labels = torch.arange(NUM_PAIRS)
        loss = (functional.cross_entropy(logits, labels) + functional.cross_entropy(logits.T, labels)) / 2
        (loss / len(batches)).backward()
    parameters = [each for each in clip.parameters() if each.grad is not None]
    torch.nn.utils.clip_grad_norm_(parameters, limit)
    with torch.no_grad():
        for each in parameters:
            each.sub_(rate * each.grad)
    return {name: each.detach() for name, each in clip.named_parameters()}


@pytest.mark.parametrize(("accumulate", "largest_norm"), [(1, None), (1, 0.01), (3, None)])
def test_a_step_is_that_of_sgd_on_the_whole_batches(
    accumulate: int, largest_norm: float | None, tmp_path: Path
) -> None:
    learner = learner_for(tmp_path, accumulate, replace(OPTIM, grad_clip=largest_norm))
    batches, report = batches_for(learner.model, accumulate), MeterGroup()
    exact, single = in_float64(learner.model), build_model(ModelConfig(small_model(tmp_path)))
    single.clip.load_state_dict(learner.model.clip.state_dict())
    rate = learner.add_gradients(STEP, batches, report)
    learner.take_step()
    assert rate == pytest.approx(RATE * (1 - STEP / 10))
    limit = largest_norm or float("inf")
    by_hand = [trained_by_hand(each, batches, rate, limit) for each in (single, exact)]
    assert_equal_to_rounding(weights_of(learner.model), *by_hand)
    assert {"loss", "loss/contrastive_loss", "grad_norm"} == set(report.last())


def test_a_step_that_is_left_out_changes_no_weight_and_leaves_no_gradient(tmp_path: Path) -> None:
    learner = learner_for(tmp_path)
    before = weights_of(learner.model)
    learner.add_gradients(STEP, batches_for(learner.model, 1), MeterGroup())
    learner.leave_step_out()
    after = weights_of(learner.model)
    assert all(torch.equal(after[name], before[name]) for name in before)
    learner.take_step()
    assert all(torch.equal(each, before[name]) for name, each in weights_of(learner.model).items())


def test_a_plan_is_kept_within_its_stage_and_made_anew_for_the_next(tmp_path: Path) -> None:
    learner = learner_for(tmp_path)
    plan = learner.contrastive_step.plan
    learner.begin_stage(0, replace(learner.config, micro_batch_size=5), None)
    assert learner.contrastive_step.plan is plan
    learner.begin_stage(1, replace(learner.config, micro_batch_size=5), None)
    assert learner.contrastive_step.plan.micro_batch_size == 5
    assert learner.state_dict()["plan"]["stage"] == 1


def test_what_is_exported_is_a_copy_of_what_is_trained(tmp_path: Path) -> None:
    learner = learner_for(tmp_path)
    exported = learner.exported_weights()
    with torch.no_grad():
        learner.model.clip.logit_scale += 1
    assert exported["logit_scale"] != learner.model.clip.logit_scale
    with learner.evaluated():
        assert torch.equal(learner.exported_weights()["logit_scale"], learner.model.clip.logit_scale)
