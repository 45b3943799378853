"""Exports are proven to load before a run begins, and a run needs nothing but its checkpoint to go on."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from accel_clip.config import Config, ModelConfig
from accel_clip.faults import ConfigError
from accel_clip.models.build import ClipModel, build_model
from accel_clip.models.export import write_export
from accel_clip.models.tower_files import placed
from accel_clip.run.rebuilding import build_for_run, prove_export
from helpers.commands import accel_clip, losses_of, run, train_py
from helpers.models import SMALL_MODEL, export_of, small_coca, small_model

LOADED = """
import sys, json, torch, open_clip
clip, _, preprocess = open_clip.create_model_and_transforms(sys.argv[1], output_dict=True)
tokens = open_clip.get_tokenizer(sys.argv[1])(json.loads(sys.argv[3]))
pictures = torch.load(sys.argv[2])
with torch.no_grad():
    made = clip.eval()(image=pictures, text=tokens)
torch.save({"tokens": tokens, **{name: value for name, value in made.items() if value is not None}}, sys.argv[4])
"""
CAPTIONS = ["a frog on a leaf", "two birds"]
TEXT = {"context_length": 16, "hf_proj_type": "linear", "hf_pooler_type": "mean_pooler"}


def described(folder: Path, name: str, **changes: Any) -> str:
    """Write the description of a small model with other parts and return its path."""
    config = json.loads(SMALL_MODEL)
    for part, change in changes.items():
        config[part] = change
    (folder / f"{name}.json").write_text(json.dumps(config))
    return str(folder / f"{name}.json")


def text_folder(folder: Path) -> str:
    """Write a small text model of transformers with its tokenizer into a folder and return its path from here."""
    transformers = pytest.importorskip("transformers")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "frog", "on", "leaf", "two", "birds", "photo", "of"]
    (folder / "text").mkdir()
    (folder / "text" / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizerFast(vocab_file=str(folder / "text" / "vocab.txt")).save_pretrained(folder / "text")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.BertConfig(vocab_size=len(words), max_position_embeddings=32, **sizes)
    torch.manual_seed(3)
    transformers.BertModel(config, add_pooling_layer=False).save_pretrained(folder / "text")
    return "text"


TIMM = {"timm_model_name": "test_vit", "timm_pool": "token"}
SWIN = {"timm_model_name": "swin_tiny_patch4_window7_224", "timm_pool": "avg"}
ZERO_TO_ONE = {"mean": [0, 0, 0], "std": [1, 1, 1], "interpolation": "bilinear"}


def of_timm(folder: Path) -> ModelConfig:
    name = described(folder, "with_timm", vision_cfg={**TIMM, "image_size": 160})
    return ModelConfig(name, options={"force_image_size": [64, 96]})


def of_transformers(folder: Path, **others: Any) -> ModelConfig:
    text = text_folder(folder)
    towers = {"text_cfg": {"hf_model_name": text, "hf_tokenizer_name": text, **TEXT}, **others}
    return ModelConfig(described(folder, f"with_{len(towers)}_towers", **towers))


def of_folder(folder: Path) -> ModelConfig:
    write_export(folder / "before", export_of(build_model(of_timm(folder))))
    return ModelConfig(f"local-dir:{folder / 'before'}")


def of_file(folder: Path) -> ModelConfig:
    save_file(dict(build_model(ModelConfig(small_model(folder))).clip.state_dict()), folder / "weights.safetensors")
    options = {"force_preprocess_cfg": ZERO_TO_ONE}
    return ModelConfig(small_model(folder), pretrained=str(folder / "weights.safetensors"), options=options)


KINDS: dict[str, Callable[[Path], ModelConfig]] = {
    "own towers": lambda folder: ModelConfig("tiny"),
    "timm at another size": of_timm,
    "timm at a size of the description": lambda folder: ModelConfig(
        described(folder, "sized", vision_cfg={**TIMM, "image_size": 64})
    ),
    "Swin at another size": lambda folder: ModelConfig(
        described(folder, "swin", vision_cfg={**SWIN, "image_size": 112})
    ),
    "text tower from a folder": of_transformers,
    "both": lambda folder: of_transformers(folder, vision_cfg={**TIMM, "image_size": 64}),
    "CoCa": lambda folder: ModelConfig(small_coca(folder)),
    "SigLIP with a bias": lambda folder: ModelConfig(small_model(folder), options={"init_logit_bias": -10.0}),
    "JSON": lambda folder: ModelConfig(small_model(folder)),
    "local-dir": of_folder,
    "a file with another normalisation": of_file,
}
"""Settings of models whose files lie in a folder, which is the working directory."""


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_an_export_loads_in_open_clip_elsewhere_with_equal_features(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    config = KINDS[kind](tmp_path / "here")
    model = build_model(config, needs_logit_bias=kind == "SigLIP with a bias")
    prove_export(model, config)
    write_export(tmp_path / "export", export_of(model))
    monkeypatch.chdir(tmp_path)
    shutil.rmtree(tmp_path / "here")
    size = model.preprocess_config["size"]
    pictures = torch.randn(2, 3, *((size, size) if isinstance(size, int) else size))
    torch.save(pictures, tmp_path / "pictures.pt")
    words = (f"local-dir:{tmp_path / 'export'}", "pictures.pt", json.dumps(CAPTIONS), "made.pt")
    done = run(sys.executable, "-c", LOADED, *words, folder=tmp_path)
    assert done.code == 0, done.err
    made = torch.load(tmp_path / "made.pt")
    with torch.no_grad():
        ours = model.clip.eval()(image=pictures, text=model.tokenizer(CAPTIONS))
    assert torch.equal(made.pop("tokens"), model.tokenizer(CAPTIONS))
    assert made.keys() == {name for name, value in ours.items() if value is not None}
    for name, value in made.items():
        assert (value - ours[name]).abs().max() <= 1e-5, name
    with open(tmp_path / "export" / "open_clip_config.json") as file:
        assert json.load(file)["preprocess_cfg"]["mean"] == list(model.preprocess_config["mean"])


@pytest.mark.parametrize("kind", ["own towers", "timm at another size", "CoCa", "both"])
def test_the_proof_leaves_no_trace(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = KINDS[kind](tmp_path)
    model = build_model(config)
    model.clip.train()
    state = {name: tensor.clone() for name, tensor in model.clip.state_dict().items()}
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    trained = [parameter.requires_grad for parameter in model.clip.parameters()]
    prove_export(model, config)
    assert torch.equal(torch.get_rng_state(), before) and torch.get_num_threads() == threads
    assert model.clip.training and Path.cwd() == tmp_path
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.clip.state_dict().items())
    assert [parameter.requires_grad for parameter in model.clip.parameters()] == trained


def test_towers_are_found_where_the_export_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = build_model(KINDS["both"](tmp_path))
    on_hub = placed(model.model_config, model.towers, "me/mine", "hf-hub:")
    assert on_hub["vision_cfg"]["timm_model_name"] == "hf-hub:me/mine"
    assert on_hub["text_cfg"]["hf_model_name"] == on_hub["text_cfg"]["hf_tokenizer_name"] == "me/mine"
    plain = build_model(ModelConfig("tiny"))
    assert placed(plain.model_config, plain.towers, "me/mine", "hf-hub:") == plain.model_config


def changed(model: ClipModel, section: str, **values: object) -> ClipModel:
    config = json.loads(json.dumps(model.model_config))
    config[section].update(values)
    return replace(model, model_config=config)


def test_a_description_that_would_load_another_model_is_refused(tmp_path: Path) -> None:
    config = ModelConfig(small_model(tmp_path))
    model = build_model(config)
    with pytest.raises(ConfigError, match=r"could not be loaded again: it would have other shapes of visual\."):
        prove_export(changed(model, "vision_cfg", image_size=48), config)
    with pytest.raises(ConfigError, match=r"it would have other tensors: visual\.transformer\.resblocks\.1"):
        prove_export(changed(model, "vision_cfg", layers=1), config)
    with pytest.raises(ConfigError, match=r"it would have other text_features|image_features"):
        prove_export(replace(model, model_config={**model.model_config, "quick_gelu": True}), config)
    with pytest.raises(ConfigError, match="its tokenizer would cut captions otherwise"):
        prove_export(replace(model, tokenizer=lambda texts: model.tokenizer([text[1:] for text in texts])), config)


@pytest.mark.parametrize(("size", "said"), [(100, "take 96 x 96"), ([36, 32], "take 32 x 32"), (4, "take 8 x 8")])
def test_a_size_that_patches_do_not_divide_is_refused(size: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"not divided by patches of 8 x 8: {said}"):
        build_model(ModelConfig(small_model(tmp_path), options={"force_image_size": size}))
    timm = {"timm_model_name": "test_vit", "timm_pool": "token", "image_size": 100}
    with pytest.raises(ConfigError, match="not divided by patches of 16 x 16: take 96 x 96"):
        build_model(ModelConfig(described(tmp_path, "odd_timm", vision_cfg=timm)))


# --- a run whose first weights are gone

QUIET = ("--track.to", "[]", "--track.every", "1", "--data.workers", "0", "--data.val_fraction", "0")
SHORT = ("--train.batch_size", "8", "--checkpoint.every", "2", "--train.precision", "no", *QUIET)


@pytest.mark.slow
@pytest.mark.parametrize("gone", ["pretrained", "local-dir", "json"])
def test_a_run_goes_on_without_the_weights_it_began_with(gone: str, tmp_path: Path) -> None:
    model = small_model(tmp_path)
    torch.manual_seed(11)
    write_export(tmp_path / "first", export_of(build_model(ModelConfig(model))))
    weights = tmp_path / "first" / "open_clip_model.safetensors"
    words = {
        "pretrained": ("--model.name", model, "--model.pretrained", str(weights)),
        "local-dir": ("--model.name", f"local-dir:{tmp_path / 'first'}"),
        "json": ("--model.name", model),
    }[gone]
    begun = train_py(*words, *SHORT, "--train.steps", "2", "--output_dir", "half", folder=tmp_path)
    assert begun.code == 0, begun.err
    shutil.copytree(tmp_path / "half", tmp_path / "whole")
    whole = train_py(*words, *SHORT, "--train.steps", "4", "--output_dir", "whole", folder=tmp_path)
    assert whole.code == 0 and "the model in the run's checkpoint" not in whole.err, whole.err
    if gone == "json":
        Path(model).unlink()
    else:
        shutil.rmtree(tmp_path / "first")
    again = train_py(*words, *SHORT, "--train.steps", "4", "--output_dir", "half", folder=tmp_path)
    assert again.code == 0 and "going on with the model in the run's checkpoint" in again.err, again.err
    assert losses_of(tmp_path / "half") == losses_of(tmp_path / "whole")
    files = [tmp_path / name / "export" / "open_clip_model.safetensors" for name in ("whole", "half")]
    assert files[0].read_bytes() == files[1].read_bytes()
    moved = accel_clip("export", "half", "--to", "elsewhere", folder=tmp_path)
    assert moved.code == 0, moved.err
    new = train_py(*words, *SHORT, "--train.steps", "4", "--output_dir", "new", folder=tmp_path)
    assert new.code == 2 and "model." in new.err and not (tmp_path / "new").exists()


def test_without_a_checkpoint_missing_weights_are_told(tmp_path: Path) -> None:
    config = Config(str(tmp_path / "run"), model=ModelConfig(small_model(tmp_path), pretrained="gone.pt"))
    with pytest.raises(ConfigError, match=r"'gone\.pt' is no file"):
        build_for_run(config.model, None, needs_logit_bias=False)
