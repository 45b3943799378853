"""CoCa: the captioning term over chunks and processes is the mean over all words of the global batch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from open_clip.loss import CoCaLoss
from torch import Tensor

from accel_clip.config import LossConfig, ModelConfig
from accel_clip.data.batch import Batch
from accel_clip.faults import ConfigError
from accel_clip.losses.base import Loss, build_loss, total
from accel_clip.models.anatomy import examine
from accel_clip.models.build import ClipModel, build_model
from accel_clip.models.data_parallel import DataParallel
from accel_clip.models.freezing import freeze_unused
from accel_clip.models.training_model import TrainingModel
from accel_clip.step.chunks import Plan
from accel_clip.step.contrastive import ContrastiveStep
from helpers.comparison import assert_equal_to_rounding, in_float64

CAPTIONS = ["a frog", "a very long caption of a red bird on a branch", "two cats", "a frog", "one white peahen"]
COCA = {
    "embed_dim": 32,
    "custom_text": True,
    "vision_cfg": {
        **{"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
        **{"attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True},
    },
    "text_cfg": {
        **{"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
        **{"embed_cls": True, "output_tokens": True},
    },
    "multimodal_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


def make_model(folder: Path, **vision: float) -> ClipModel:
    file = folder / f"coca_{len(vision)}.json"
    file.write_text(json.dumps({**COCA, "vision_cfg": {**COCA["vision_cfg"], **vision}}))
    torch.manual_seed(1)
    return build_model(ModelConfig(str(file)))


def make_batch(model: ClipModel, num_pairs: int = 7) -> Batch:
    torch.manual_seed(7)
    image = torch.randint(0, 256, (num_pairs, 3, 32, 32), dtype=torch.uint8)
    numbers = torch.arange(num_pairs)
    return Batch(image, model.tokenizer([CAPTIONS[i % 5] for i in range(num_pairs)]), numbers, numbers, numbers)


def step_on(model: ClipModel, loss: Loss, batch: Batch, plan: Plan) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the terms and the gradients of one step."""
    anatomy = examine(model.clip, model.tokenizer)
    assert not anatomy.separate
    model.clip.zero_grad()
    torch.manual_seed(5)
    wrapped = TrainingModel(model, separate=False).to(model.clip.logit_scale.dtype).train()
    step = ContrastiveStep(DataParallel(Accelerator(cpu=True), wrapped), loss, anatomy, plan)
    return step(batch), {
        name: each.grad.clone() for name, each in model.clip.named_parameters() if each.grad is not None
    }


def open_clips(model: ClipModel, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the terms and the gradients of open_clip's own loss of the whole batch."""
    mean, std = (torch.tensor(model.preprocess_config[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    pixels = batch.image.to(model.clip.logit_scale.dtype) / 255
    outputs = model.clip(image=(pixels - mean) / std, text=batch.tokens)
    theirs = CoCaLoss(caption_loss_weight=2.0, clip_loss_weight=1.0)
    terms = theirs(**{key: outputs[key] for key in outputs if key != "logit_bias"}, output_dict=True)
    model.clip.zero_grad()
    total(terms).backward()
    made = {name: each.grad.clone() for name, each in model.clip.named_parameters() if each.grad is not None}
    return {name: each.detach() for name, each in terms.items()}, made


@pytest.mark.parametrize(("rows", "num_kept"), [(7, 1), (3, 0), (3, 2), (2, 4), (1, 3)])
def test_any_cut_gives_open_clips_loss_and_gradient_of_the_whole_batch(
    tmp_path: Path, rows: int, num_kept: int
) -> None:
    model = make_model(tmp_path)
    batch = make_batch(model)
    (terms_32, single), (terms_64, exact) = open_clips(model, batch), open_clips(in_float64(model), batch)
    assert any(name.startswith("text_decoder") for name in exact)
    terms, given = step_on(model, build_loss(LossConfig("coca")), batch, Plan(rows, rows, {"image": num_kept}, 32))
    assert_equal_to_rounding({**terms, **given}, {**terms_32, **single}, {**terms_64, **exact})


def test_a_mean_of_chunk_means_is_another_objective(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(tmp_path)
    loss, batch = build_loss(LossConfig("coca")), make_batch(model)
    _, right = step_on(model, loss, batch, Plan(3, 3, {"image": 0}, 32))

    def mean_of_a_chunk(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        costs = torch.nn.functional.cross_entropy(logits.mT, labels, ignore_index=0)
        return {"caption_loss": 2 * costs * torch.count_nonzero(batch.tokens[:, 1:]) / 3}

    monkeypatch.setattr(loss.function, "pair_terms", mean_of_a_chunk)
    _, wrong = step_on(model, loss, batch, Plan(3, 3, {"image": 0}, 32))
    name = "text_decoder.text_projection"
    assert (wrong[name] - right[name]).abs().max() > 1e-2 * right[name].abs().max()


def test_dropped_patches_are_the_same_in_both_passes(tmp_path: Path) -> None:
    model = make_model(tmp_path, patch_dropout=0.5)
    loss, batch = build_loss(LossConfig("coca")), make_batch(model)
    (_, kept), (_, none) = (step_on(model, loss, batch, Plan(3, 3, {"image": number}, 32)) for number in (3, 0))
    _, exact = step_on(in_float64(model), loss, batch, Plan(3, 3, {"image": 3}, 32))
    assert_equal_to_rounding(none, kept, exact)


def test_the_first_pass_and_a_plain_clip_loss_do_without_the_decoder(tmp_path: Path) -> None:
    model = make_model(tmp_path)
    runs = []
    model.clip.text_decoder.register_forward_pre_hook(lambda *_: runs.append(torch.is_grad_enabled()))
    step_on(model, build_loss(LossConfig("coca")), make_batch(model), Plan(3, 3, {"image": 1}, 32))
    assert runs == [True] * 3
    loss = build_loss(LossConfig("clip"))
    freeze_unused(model, loss)
    runs.clear()
    step_on(model, loss, make_batch(model), Plan(3, 3, {"image": 1}, 32))
    assert runs == []


def test_weights_must_not_be_negative() -> None:
    with pytest.raises(ConfigError, match=r"loss\.options\.caption_loss_weight: -1"):
        build_loss(LossConfig("coca", {"caption_loss_weight": -1}))


def test_a_new_model_has_weights_of_its_seed_alone(tmp_path: Path) -> None:
    first = make_model(tmp_path).clip.state_dict()
    rubbish = [torch.full((32, 49408), float("nan")) for _ in range(2)]
    del rubbish
    second = make_model(tmp_path).clip.state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert 0.1 < first["text_decoder.text_projection"].std() < 0.3
