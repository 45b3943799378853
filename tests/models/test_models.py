"""Models: built as open_clip builds them, frozen where asked, and exported so that open_clip gives equal features."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy
import open_clip
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from safetensors.torch import load_file

from accel_clip.config import LossConfig, ModelConfig
from accel_clip.faults import ConfigError
from accel_clip.losses.base import build_loss
from accel_clip.models.build import ClipModel, build_model
from accel_clip.models.export import write_export
from accel_clip.models.freezing import freeze, freeze_unused, require_trained
from accel_clip.models.training_model import TrainingModel, clamp_logit_scale
from helpers.comparison import assert_equal_to_rounding, in_float64, rounding
from helpers.models import export_of, small_model

CASES = {
    "json": {},
    "image size": {"force_image_size": 48},
    "context": {"force_context_length": 24},
    "bias": {"init_logit_bias": -3.0},
    "several": {"force_image_size": [48, 64], "force_quick_gelu": True, "init_logit_scale": 1.0},
    "own text class": {"force_custom_text": True},
    "patch dropout": {"force_patch_dropout": 0.5},
}


def features(clip: torch.nn.Module, tokenizer: object, size: int | list[int]) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    height, width = (size, size) if isinstance(size, int) else size
    text = tokenizer(["a frog", "one white peahen on grass"])
    with torch.no_grad():
        pixels = torch.randn(2, 3, height, width).to(clip.logit_scale.dtype)
        made = clip.eval()(image=pixels, text=text)
    return {key: value for key, value in made.items() if value is not None}


@pytest.mark.parametrize("case", CASES)
def test_the_export_gives_equal_features_in_open_clip(tmp_path: Path, case: str) -> None:
    torch.manual_seed(1)
    model = build_model(ModelConfig(small_model(tmp_path), options=CASES[case]))
    with torch.no_grad():
        for parameter in model.clip.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    folder = tmp_path / "export"
    write_export(folder, export_of(model, {"val/loss": 1.5}))
    name = f"local-dir:{folder}"
    clip, _, preprocess = open_clip.create_model_and_transforms(name, output_dict=True)
    size = model.preprocess_config["size"]
    expected, exact = (features(each, model.tokenizer, size) for each in (model.clip, in_float64(model).clip))
    assert_equal_to_rounding(features(clip, open_clip.get_tokenizer(name), size), expected, exact)
    picture = Image.fromarray(numpy.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=numpy.uint8))
    ours = image_transform_v2(PreprocessCfg(**model.preprocess_config), is_train=False)
    assert torch.equal(preprocess(picture), ours(picture))
    assert "val/loss" in (folder / "README.md").read_text()


def test_equal_weights_are_equal_bytes(tmp_path: Path) -> None:
    model = build_model(ModelConfig("tiny"))
    for name, metrics in (("a", {}), ("b", {"val/loss": 1.0})):
        exported = export_of(model, metrics)
        shuffled = dict(sorted(exported.weights.items(), reverse=name == "b"))
        write_export(tmp_path / name, replace(exported, weights=shuffled))
    files = [(tmp_path / name / "open_clip_model.safetensors").read_bytes() for name in ("a", "b")]
    assert files[0] == files[1]


def test_the_model_is_open_clips(tmp_path: Path) -> None:
    torch.manual_seed(3)
    ours = build_model(ModelConfig("tiny"))
    torch.manual_seed(3)
    theirs = open_clip.create_model("tiny")
    assert all(torch.equal(a, b) for a, b in zip(ours.clip.parameters(), theirs.parameters(), strict=True))


def test_uint8_pictures_are_normalised_as_open_clip_does(tmp_path: Path) -> None:
    model = build_model(ModelConfig(small_model(tmp_path)))
    pixels = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    picture = [Image.fromarray(each.permute(1, 2, 0).numpy()) for each in pixels]
    transform = image_transform_v2(PreprocessCfg(**model.preprocess_config), is_train=False)
    mean, std = (torch.tensor(model.preprocess_config[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        reference = model.clip(image=torch.stack([transform(each) for each in picture]))
        exact = in_float64(model).clip(image=(pixels.double() / 255 - mean) / std)
        ours = TrainingModel(model)(image=pixels)
    assert_equal_to_rounding(*({"features": each["image_features"]} for each in (ours, reference, exact)))
    assert not any(key.startswith(("mean", "std")) for key in TrainingModel(model).state_dict())


@pytest.mark.parametrize(
    ("patterns", "frozen", "trained"),
    [
        (["image"], "visual.proj", "text_projection"),
        (["text"], "token_embedding.weight", "visual.proj"),
        (["visual.*", "logit_scale"], "logit_scale", "text_projection"),
        (["*.bias"], "ln_final.bias", "ln_final.weight"),
    ],
)
def test_freezing_by_tower_and_pattern(tmp_path: Path, patterns: list[str], frozen: str, trained: str) -> None:
    clip = build_model(ModelConfig(small_model(tmp_path))).clip
    for pattern in patterns:
        freeze(clip, pattern)
    by_name = dict(clip.named_parameters())
    assert not by_name[frozen].requires_grad and by_name[trained].requires_grad


def test_a_wholly_frozen_tower_stays_in_evaluation_mode(tmp_path: Path) -> None:
    model = build_model(ModelConfig(small_model(tmp_path)))
    freeze(model.clip, "image")
    wrapped = TrainingModel(model).train()
    assert not wrapped.clip.visual.training and wrapped.clip.transformer.training


def batch_norms(folder: Path) -> ClipModel:
    """Return a model whose image tower has batch norms and dropout, in training mode."""
    described = json.loads(Path(small_model(folder)).read_text())
    resnet = {"timm_model_name": "test_resnet", "timm_pool": "avg", "timm_drop": 0.5, "image_size": 32}
    (folder / "with_norms.json").write_text(json.dumps({**described, "vision_cfg": resnet}))
    return build_model(ModelConfig(str(folder / "with_norms.json")))


def statistics(clip: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: buffer.clone() for name, buffer in clip.named_buffers() if "running" in name or "tracked" in name}


@pytest.mark.parametrize(
    ("patterns", "still"),
    [
        (["visual.trunk.conv1.*", "visual.trunk.layer1.*"], ("visual.trunk.conv1.", "visual.trunk.layer1.")),
        (["visual.trunk.*"], ("visual.trunk.",)),
        (["visual.*.bn*"], ("visual.trunk.bn1",)),
        (["image"], ("visual.",)),
        (["visual.*.bias"], ()),
    ],
)
def test_statistics_of_what_is_frozen_stay(patterns: list[str], still: tuple[str, ...], tmp_path: Path) -> None:
    model = batch_norms(tmp_path)
    for pattern in patterns:
        freeze(model.clip, pattern)
    wrapped = TrainingModel(model).train()
    before = statistics(model.clip)
    assert before
    for _ in range(2):
        wrapped(image=torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8))
    moved = {name for name, value in statistics(model.clip).items() if not torch.equal(value, before[name])}
    norms = dict(model.clip.named_modules())
    for name in before:
        parameters = list(norms[name.rpartition(".")[0]].parameters())
        rests = not any(parameter.requires_grad for parameter in parameters)
        assert (name in moved) != rests, name
        assert rests or not name.startswith(still or ("none",)), name


def test_dropout_is_off_in_frozen_blocks_and_on_in_others(tmp_path: Path) -> None:
    described = json.loads(Path(small_model(tmp_path)).read_text())
    vit = {"timm_model_name": "test_vit", "timm_pool": "token", "timm_drop_path": 0.5, "image_size": 160}
    (tmp_path / "dropping.json").write_text(json.dumps({**described, "vision_cfg": vit}))
    model = build_model(ModelConfig(str(tmp_path / "dropping.json")))
    freeze(model.clip, "visual.trunk.blocks.0.*")
    blocks = TrainingModel(model).train().clip.visual.trunk.blocks
    assert not any(part.training for part in blocks[0].modules())
    assert all(part.training for part in blocks[1].modules())


def test_freezing_nothing_or_everything_is_refused(tmp_path: Path) -> None:
    clip = build_model(ModelConfig(small_model(tmp_path))).clip
    with pytest.raises(ConfigError, match=r"'visul\.\*' matches no parameter"):
        freeze(clip, "visul.*")
    freeze(clip, "*")
    with pytest.raises(ConfigError, match="nothing to train"):
        require_trained(clip, ["*"])


def test_what_the_loss_does_not_use_is_frozen_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = build_model(ModelConfig(small_model(tmp_path), options={"init_logit_bias": -1.0}))
    state = {key: value.clone() for key, value in model.clip.state_dict().items()}
    random_state = torch.get_rng_state()
    freeze_unused(model, build_loss(LossConfig("clip")))
    trained = {name for name, parameter in model.clip.named_parameters() if parameter.requires_grad}
    assert "logit_bias" not in trained and {"logit_scale", "visual.proj", "token_embedding.weight"} <= trained
    assert "'clip' does not use logit_bias: frozen" in capsys.readouterr().err
    assert torch.equal(torch.get_rng_state(), random_state) and model.clip.training
    assert all(torch.equal(value, state[key]) for key, value in model.clip.state_dict().items())


def test_siglip_starts_at_its_scale_and_bias_where_the_weights_bring_none(tmp_path: Path) -> None:
    name = small_model(tmp_path)

    def scale_and_bias(model: ClipModel) -> tuple[float, float]:
        return model.clip.logit_scale.exp().item(), model.clip.logit_bias.item()

    assert scale_and_bias(build_model(ModelConfig(name), needs_logit_bias=True)) == pytest.approx(
        (10, -10), rel=rounding(1)
    )
    own = ModelConfig(name, options={"init_logit_bias": -2.0})
    assert scale_and_bias(build_model(own, needs_logit_bias=True))[1] == pytest.approx(-2)
    plain = build_model(ModelConfig(name))
    write_export(tmp_path / "plain", export_of(plain))
    from_weights = build_model(ModelConfig(f"local-dir:{tmp_path / 'plain'}"), needs_logit_bias=True)
    assert scale_and_bias(from_weights) == pytest.approx((1 / 0.07, -10), rel=rounding(1))
    write_export(tmp_path / "biased", export_of(from_weights))
    again = build_model(ModelConfig(f"local-dir:{tmp_path / 'biased'}"), needs_logit_bias=True)
    assert scale_and_bias(again) == scale_and_bias(from_weights)
    described = json.loads((tmp_path / "biased" / "open_clip_config.json").read_text())
    assert described["model_cfg"]["init_logit_bias"] == -10


def test_weights_come_from_a_file(tmp_path: Path) -> None:
    name = small_model(tmp_path)
    model = build_model(ModelConfig(name))
    write_export(tmp_path / "export", export_of(model))
    file = tmp_path / "export" / "open_clip_model.safetensors"
    loaded = build_model(ModelConfig(name, pretrained=str(file))).clip.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in load_file(file).items())


def test_a_json_file_cannot_take_another_models_name(tmp_path: Path) -> None:
    file = tmp_path / "ViT-B-32.json"
    file.write_text(Path(small_model(tmp_path)).read_text())
    with pytest.raises(ConfigError, match="rename the file"):
        build_model(ModelConfig(str(file)))


def test_a_json_file_that_was_edited_or_replaced_by_another_is_read_anew(tmp_path: Path) -> None:
    """As in a notebook, where one process trains again and again."""
    file, other = Path(small_model(tmp_path)), tmp_path / "other" / "small.json"
    described = json.loads(file.read_text())
    other.parent.mkdir()
    other.write_text(json.dumps({**described, "embed_dim": 8}))
    assert build_model(ModelConfig(str(file))).clip.text_projection.shape == (32, 32)
    assert build_model(ModelConfig(str(other))).clip.text_projection.shape == (32, 8)
    assert build_model(ModelConfig(str(file))).clip.text_projection.shape == (32, 32)
    file.write_text(json.dumps({**described, "embed_dim": 16}))
    assert build_model(ModelConfig(str(file))).clip.text_projection.shape == (32, 16)


def test_the_logit_scale_is_clamped(tmp_path: Path) -> None:
    clip = build_model(ModelConfig(small_model(tmp_path))).clip
    for value, expected in ((9.0, 50.0), (-1.0, 1.0), (2.0, 7.389056)):
        with torch.no_grad():
            clip.logit_scale.fill_(value)
        clamp_logit_scale(clip, 50.0)
        assert clip.logit_scale.exp().item() == pytest.approx(expected, rel=rounding(1))
    with torch.no_grad():
        clip.logit_scale.requires_grad_(False).fill_(9.0)
    clamp_logit_scale(clip, 50.0)
    assert clip.logit_scale.item() == 9.0  # frozen is frozen
