"""The step: its gradient is that of the whole batch, however the batch is cut, kept or recomputed."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from accel_clip.config import LossConfig, TrainConfig
from accel_clip.data.batch import Batch
from accel_clip.faults import ConfigError
from accel_clip.losses.base import Loss, build_loss, total
from accel_clip.models.anatomy import Anatomy, examine
from accel_clip.models.blocks import recompute_activations
from accel_clip.models.build import ClipModel
from accel_clip.models.data_parallel import DataParallel
from accel_clip.models.freezing import freeze
from accel_clip.models.training_model import TrainingModel
from accel_clip.step import plan
from accel_clip.step.chunks import Plan as SidedPlan
from accel_clip.step.chunks import cut_batch
from accel_clip.step.contrastive import ContrastiveStep
from accel_clip.step.plan import (
    ModelTrial,
    bytes_of_state,
    choose_plan,
    free_for_graphs,
    graph_bytes,
    try_chunk,
)
from helpers.comparison import assert_equal_to_rounding, in_float64
from helpers.steps import NUM_PAIRS, Plan, make_batch, make_model


def gradients(model: ClipModel, loss: Loss, batch: Batch, plan: Plan, seed: int = 5) -> dict[str, Tensor]:
    """Return the raw gradients that one step leaves, by parameter name."""
    accelerator = Accelerator(cpu=True)
    anatomy = examine(model.clip, model.tokenizer)
    wrapped = TrainingModel(model, anatomy.separate).to(model.clip.logit_scale.dtype).train()
    model.clip.zero_grad()
    torch.manual_seed(seed)
    ContrastiveStep(DataParallel(accelerator, wrapped), loss, anatomy, plan)(batch)
    return {name: each.grad.clone() for name, each in model.clip.named_parameters() if each.grad is not None}


def plain_gradients(model: ClipModel, loss: Loss, batch: Batch) -> dict[str, Tensor]:
    """Return what plain autograd over the whole batch and open_clip's own forward give."""
    mean, std = (torch.tensor(model.preprocess_config[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    model.clip.zero_grad()
    pixels = batch.image.to(model.clip.logit_scale.dtype) / 255
    outputs = model.clip(image=(pixels - mean) / std, text=batch.tokens)
    total(loss({key: value for key, value in outputs.items() if value is not None})).backward()
    return {name: each.grad.clone() for name, each in model.clip.named_parameters() if each.grad is not None}


@pytest.mark.parametrize("name", ["clip", "siglip"])
@pytest.mark.parametrize("rows", [1, 3, 4, 13, 50])
@pytest.mark.parametrize("num_kept", [0, 3, 99])
def test_any_cut_gives_the_gradient_of_the_whole_batch(tmp_path: Path, name: str, rows: int, num_kept: int) -> None:
    model = make_model(tmp_path, bias=name == "siglip")
    loss, batch = build_loss(LossConfig(name)), make_batch(model)
    single, exact = plain_gradients(model, loss, batch), plain_gradients(in_float64(model), loss, batch)
    assert "logit_scale" in exact and (name == "clip" or "logit_bias" in exact)
    assert_equal_to_rounding(gradients(model, loss, batch, Plan(rows, num_kept)), single, exact)


def test_a_loss_of_the_user_with_its_own_parameter(tmp_path: Path) -> None:
    class Weighted(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.tensor(1.5))

        def forward(self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> dict[str, Tensor]:
            logits = self.weight * logit_scale * image_features @ text_features.T
            return {"pull_loss": -logits.diagonal().mean(), "spread_loss": logits.logsumexp(1).mean()}

    model = make_model(tmp_path)
    batch = make_batch(model)

    def with_own(compute: Callable[..., dict[str, Tensor]], model: ClipModel, *plan: SidedPlan) -> dict[str, Tensor]:
        loss = Loss("weighted", Weighted().to(model.clip.logit_scale.dtype))
        made = compute(model, loss, batch, *plan)
        return {**made, "loss": loss.function.weight.grad}

    single, exact = with_own(plain_gradients, model), with_own(plain_gradients, in_float64(model))
    assert_equal_to_rounding(with_own(gradients, model, Plan(4, 2)), single, exact)


@pytest.mark.parametrize("rows", [3, 5])
def test_dropped_patches_are_the_same_in_both_passes(tmp_path: Path, rows: int) -> None:
    model = make_model(tmp_path, patch_dropout=0.5)
    loss, batch = build_loss(LossConfig("clip")), make_batch(model)
    kept, some, none = (gradients(model, loss, batch, Plan(rows, num)) for num in (98, 4, 0))
    exact = gradients(in_float64(model), loss, batch, Plan(rows, 98))
    assert_equal_to_rounding(some, kept, exact)
    assert_equal_to_rounding(none, kept, exact)
    other = gradients(model, loss, batch, Plan(rows, 99), seed=6)
    difference = (other["visual.proj"] - kept["visual.proj"]).norm()
    assert difference > 0.1 * kept["visual.proj"].norm(), "no patch was dropped"


def test_without_replayed_randomness_the_gradient_is_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(tmp_path, patch_dropout=0.5)
    loss, batch = build_loss(LossConfig("clip")), make_batch(model)
    right = gradients(model, loss, batch, Plan(3, 0))
    monkeypatch.setattr("accel_clip.randomness.RandomState.restore", lambda self: None)
    wrong = gradients(model, loss, batch, Plan(3, 0))
    assert (wrong["visual.proj"] - right["visual.proj"]).abs().max() > 1e-3 * right["visual.proj"].abs().max()


def test_plain_accumulation_is_another_objective(tmp_path: Path) -> None:
    model = make_model(tmp_path)
    loss, batch = build_loss(LossConfig("clip")), make_batch(model, 12)
    right = gradients(model, loss, batch, Plan(3, 0))
    parts = [Batch(batch.image[i : i + 3], batch.tokens[i : i + 3], *[batch.sample[:3]] * 3) for i in (0, 3, 6, 9)]
    sums = [gradients(model, loss, part, Plan(3, 0)) for part in parts]
    flat = torch.cat([sum(each[name] for each in sums).flatten() for name in right])
    whole = torch.cat([each.flatten() for each in right.values()])
    assert torch.nn.functional.cosine_similarity(flat, whole, dim=0) < 0.99


@pytest.mark.parametrize("patterns", [["image"], ["text"], ["image", "text"]])
def test_frozen_towers_run_once_and_get_nothing(tmp_path: Path, patterns: list[str]) -> None:
    model = make_model(tmp_path)
    for pattern in patterns:
        freeze(model.clip, pattern)
    loss, batch = build_loss(LossConfig("clip")), make_batch(model)
    calls = {"image": 0, "text": 0}
    model.clip.visual.register_forward_pre_hook(lambda *_: calls.update(image=calls["image"] + 1))
    model.clip.transformer.register_forward_pre_hook(lambda *_: calls.update(text=calls["text"] + 1))
    single, exact = plain_gradients(model, loss, batch), plain_gradients(in_float64(model), loss, batch)
    examine(model.clip, model.tokenizer)
    calls.update(image=0, text=0)
    anatomy = examine(model.clip, model.tokenizer)
    calls.update(image=0, text=0)
    wrapped = TrainingModel(model).train()
    model.clip.zero_grad()
    one_group = replace(Plan(5, 0), cost_of_a_group=10**6)
    ContrastiveStep(DataParallel(Accelerator(cpu=True), wrapped), loss, anatomy, one_group)(batch)
    given = {name: each.grad for name, each in model.clip.named_parameters() if each.grad is not None}
    assert_equal_to_rounding(given, single, exact)
    num_captions = len(torch.unique(batch.tokens, dim=0))
    chunks = {"image": 3, "text": -(-num_captions // 5)}
    for side in ("image", "text"):
        passes = 1 if side in patterns else 2
        extra = 1 if len(patterns) == 2 and side == "text" else 0  # the scale's gradient needs one graph
        assert calls[side] == passes * chunks[side] + extra


def test_batch_norm_counts_a_batch_once(tmp_path: Path) -> None:
    class Tower(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = torch.nn.BatchNorm1d(12)
            self.out = torch.nn.Linear(12, 32)

        def forward(self, pixels: Tensor) -> Tensor:
            return self.out(self.norm(pixels[:, :, :2, :2].flatten(1)))

    model = make_model(tmp_path)
    model.clip.visual = Tower()
    counts = []
    for num_kept in (99, 0):
        gradients(model, build_loss(LossConfig("clip")), make_batch(model, 12), Plan(4, num_kept))
        counts.append(int(model.clip.visual.norm.num_batches_tracked))
    assert counts == [3, 6]


def test_equal_captions_are_one_item_and_chunks_are_trimmed(tmp_path: Path) -> None:
    model = make_model(tmp_path)
    batch = make_batch(model)
    anatomy = examine(model.clip, model.tokenizer)
    assert anatomy.separate and anatomy.trims and anatomy.deduplicates
    cut = cut_batch(batch, anatomy, Plan(4, 0))
    texts = [chunk for chunk in cut.chunks if "text" in chunk.inputs]
    lengths = [group.shape[1] for chunk in texts for group in chunk.inputs["text"]]
    assert sum(len(chunk.rows) for chunk in texts) == len(torch.unique(batch.tokens, dim=0)) < NUM_PAIRS
    assert lengths == sorted(lengths) and lengths[0] < 10 and max(lengths) <= 32
    rows = torch.arange(float(len(torch.unique(batch.tokens, dim=0)))).view(-1, 1)
    pairs = cut.to_pairs("text_features", rows)
    same = (batch.tokens[:, None] == batch.tokens).all(-1)
    assert torch.equal(pairs == pairs.T, same) and same.sum() > NUM_PAIRS
    assert cut.to_items("text_features", torch.ones(NUM_PAIRS, 1)).sum() == NUM_PAIRS


def test_accumulation_and_clipping_see_one_gradient_a_batch(tmp_path: Path) -> None:
    """Inside `accumulate` two batches give the mean of their gradients."""
    model = make_model(tmp_path)
    loss, batch = build_loss(LossConfig("clip")), make_batch(model, 12)
    other = make_batch(model, 10)
    single, exact = (
        mean_of([gradients(version, loss, each, Plan(5, 1)) for each in (batch, other)])
        for version in (model, in_float64(model))
    )
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    accelerator.gradient_state.plugin_kwargs.update(num_steps=2)
    anatomy = examine(model.clip, model.tokenizer)
    step = ContrastiveStep(DataParallel(accelerator, TrainingModel(model).train()), loss, anatomy, Plan(5, 1))
    model.clip.zero_grad()
    for each in (batch, other):
        with step.parallel.accumulating():
            step(each)
    given = {name: each.grad for name, each in model.clip.named_parameters()}
    accelerator.gradient_state.plugin_kwargs.update(num_steps=1)
    assert_equal_to_rounding(given, single, exact)


def mean_of(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([part[name] for part in parts]).mean(0) for name in parts[0]}


def workplace(model: ClipModel) -> tuple[ModelTrial, Anatomy]:
    anatomy = examine(model.clip, model.tokenizer)
    optimizer = torch.optim.AdamW(model.clip.parameters())
    return ModelTrial(DataParallel(Accelerator(cpu=True), TrainingModel(model)), model, anatomy, optimizer), anatomy


def test_a_trial_that_runs_out_of_memory_holds_none_of_it(tmp_path: Path) -> None:
    model = make_model(tmp_path)
    place, _ = workplace(model)

    def full(module: object, given: object) -> None:
        raise torch.OutOfMemoryError

    def tensors_after_a_trial() -> int:
        with pytest.raises(torch.OutOfMemoryError):
            try_chunk(place, place.inputs(4)["image"])
        gc.collect()
        return sum(type(each) is Tensor for each in gc.get_objects())

    model.clip.visual.ln_post.register_forward_pre_hook(full)
    first = tensors_after_a_trial()
    assert tensors_after_a_trial() == first


def test_moments_that_are_there_already_are_not_planned_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(tmp_path)
    place, _ = workplace(model)
    monkeypatch.setattr(plan, "free_bytes", lambda device: 2**30)
    before = free_for_graphs(place)
    for each in model.clip.parameters():
        each.grad = torch.zeros_like(each)
    place.optimizer.step()
    moments = bytes_of_state(place.optimizer)
    assert moments >= 8 * sum(each.numel() for each in model.clip.parameters())
    monkeypatch.setattr(plan, "free_bytes", lambda device: 2**30 - moments)
    assert free_for_graphs(place) == before


def test_the_budget_decides_how_many_graphs_are_kept(tmp_path: Path) -> None:
    model = make_model(tmp_path)
    place, _ = workplace(model)
    image, text = graph_bytes(place, 4).values()

    def kept(activation_bytes: float) -> SidedPlan:
        config = TrainConfig(batch_size=16, micro_batch_size=4, activation_gib=activation_bytes / 2**30)
        return choose_plan(place, config)

    assert kept(0) == SidedPlan(4, 4, {"text": 0, "image": 0}, 32)
    assert kept(2.5 * text).kept["text"] == 2
    assert kept(4 * text + 1.5 * image) == SidedPlan(4, 16, {"text": 4, "image": 1}, 32)
    assert kept(1e12) == SidedPlan(4, 16, {"text": 4, "image": 4}, 32)
    assert choose_plan(place, TrainConfig(batch_size=16)) == SidedPlan(16, 16, {"text": 1, "image": 1}, 32)


def test_a_batch_that_does_not_fit_is_halved_until_it_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, _ = workplace(make_model(tmp_path))
    both = sum(graph_bytes(place, 16).values())
    monkeypatch.setattr("accel_clip.step.plan.STATE_BYTES", 0)
    monkeypatch.setattr("accel_clip.step.plan.free_bytes", lambda device: int(both * 2 / 3))
    assert choose_plan(place, TrainConfig(batch_size=16)).micro_batch_size == 4
    with pytest.raises(ConfigError, match=r"train\.micro_batch_size: 16 rows do not fit"):
        choose_plan(place, TrainConfig(batch_size=16, micro_batch_size=16))
    monkeypatch.setattr("accel_clip.step.plan.free_bytes", lambda device: 1)
    with pytest.raises(ConfigError, match="not even one row"):
        choose_plan(place, TrainConfig(batch_size=16))


def test_a_trial_leaves_no_trace(tmp_path: Path) -> None:
    model = make_model(tmp_path, patch_dropout=0.5)
    place, _ = workplace(model)
    torch.manual_seed(3)
    before, weights = torch.get_rng_state(), {k: v.clone() for k, v in model.clip.state_dict().items()}
    choose_plan(place, TrainConfig(batch_size=8))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in model.clip.parameters())
    assert all(torch.equal(value, weights[key]) for key, value in model.clip.state_dict().items())


@pytest.mark.parametrize("patterns", [["image"], ["text"], ["image", "text"]])
def test_a_plan_counts_what_is_trained(tmp_path: Path, patterns: list[str]) -> None:
    model = make_model(tmp_path)
    for pattern in patterns:
        freeze(model.clip, pattern)
    place, anatomy = workplace(model)
    plan = choose_plan(place, TrainConfig(batch_size=13, micro_batch_size=4))
    assert plan.kept == {side: 4 for side in ("text", "image") if side not in patterns}
    runs = []
    model.clip.visual.register_forward_pre_hook(lambda *_: runs.append(1))
    loss, batch = build_loss(LossConfig("clip")), make_batch(model)
    place.wrapped.train()
    ContrastiveStep(place.parallel, loss, anatomy, plan)(batch)
    assert len(runs) == 4  # nothing that fits runs twice


@pytest.mark.parametrize("num_kept", [0, 2, 98])
def test_recomputed_activations_change_memory_alone(tmp_path: Path, num_kept: int) -> None:
    model = make_model(tmp_path, patch_dropout=0.5, layers=4)
    loss, batch = build_loss(LossConfig("clip")), make_batch(model)
    single, exact = (gradients(each, loss, batch, Plan(4, num_kept)) for each in (model, in_float64(model)))
    place, _ = workplace(model)
    before = graph_bytes(place, 8)
    recompute_activations(model.clip)
    assert_equal_to_rounding(gradients(model, loss, batch, Plan(4, num_kept)), single, exact)
    assert all(graph_bytes(place, 8)[side] < before[side] / 2 for side in ("image", "text"))


@pytest.mark.parametrize("side", ["image", "text"])
def test_features_that_are_known_take_the_place_of_a_frozen_tower(tmp_path: Path, side: str) -> None:
    model = make_model(tmp_path)
    freeze(model.clip, side)
    loss, batch = build_loss(LossConfig("clip")), make_batch(model)
    single, exact = (gradients(each, loss, batch, Plan(4, 0)) for each in (model, in_float64(model)))
    with torch.no_grad():
        outputs = TrainingModel(model).eval()(image=batch.image, text=[batch.tokens])
    name = f"{side}_features"
    known = replace(
        batch, features={name: outputs[name]}, image=batch.image if side == "text" else batch.image[:, :, :0]
    )
    tower = model.clip.visual if side == "image" else model.clip.transformer
    runs = []
    anatomy = examine(model.clip, model.tokenizer)
    tower.register_forward_pre_hook(lambda *_: runs.append(1))
    model.clip.zero_grad()
    parallel = DataParallel(Accelerator(cpu=True), TrainingModel(model).train())
    ContrastiveStep(parallel, loss, anatomy, Plan(4, 0))(known)
    given = {key: each.grad for key, each in model.clip.named_parameters() if each.grad is not None}
    assert_equal_to_rounding(given, single, exact)
    assert not runs
