"""Weights in files: whatever stands around them they are found, counted, and used as they were trained to be used."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy
import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from accel_clip.config import ModelConfig
from accel_clip.faults import ConfigError
from accel_clip.models.build import build_model
from accel_clip.models.export import write_export
from accel_clip.models.torch_script import read_torch_script
from helpers.commands import train_py
from helpers.models import SMALL_MODEL, export_of, small_model

State = dict[str, Tensor]


class Archive(torch.nn.Module):
    """A model as OpenAI published its own: one TorchScript archive in half precision, with three numbers beside."""

    def __init__(self, clip: torch.nn.Module) -> None:
        super().__init__()
        self.visual, self.transformer, self.token_embedding = clip.visual, clip.transformer, clip.token_embedding
        self.ln_final, self.logit_scale = clip.ln_final, clip.logit_scale
        self.positional_embedding, self.text_projection = clip.positional_embedding, clip.text_projection
        for name, value in (("input_resolution", 32), ("context_length", 32), ("vocab_size", 49408)):
            self.register_buffer(name, torch.tensor(value))

    def forward(self, image: Tensor) -> Tensor:
        return self.visual(image)


def small(folder: Path, seed: int = 7) -> torch.nn.Module:
    """Return a model with weights that no other seed gives."""
    torch.manual_seed(seed)
    clip = build_model(ModelConfig(small_model(folder))).clip
    with torch.no_grad():
        for parameter in clip.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    return clip


def prefixed(state: State, prefix: str) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def inside(state: State, part: str, word: str) -> State:
    return {name.replace(f"{part}.", f"{part}.{word}.", 1): tensor for name, tensor in state.items()}


def other(state: State) -> State:
    return {name: tensor + 1 for name, tensor in state.items()}


ADAM = {"state": {0: {"exp_avg": torch.ones(3), "step": torch.tensor(4)}}, "param_groups": [{"lr": 0.1}]}
LIGHTNING = {"epoch": 3, "callbacks": {}, "hyper_parameters": {"lr": 0.1}, "optimizer_states": [ADAM]}
FORMS: dict[str, Callable[[State], object]] = {
    "torch.compile": lambda state: prefixed(state, "_orig_mod."),
    "DDP": lambda state: prefixed(state, "module."),
    "DDP around torch.compile": lambda state: {"state_dict": prefixed(state, "module._orig_mod.")},
    "a compiled tower": lambda state: inside(state, "visual", "_orig_mod"),
    "model_state_dict": lambda state: {"model_state_dict": state, "optimizer_state_dict": ADAM, "epoch": 3},
    "Lightning": lambda state: {"state_dict": prefixed(state, "model.") | {"loss.weight": torch.ones(2)}, **LIGHTNING},
    "a run of ours": lambda state: prefixed(state, "clip.") | {"loss.0": torch.ones(2)},
    "another attribute": lambda state: {"state_dict": prefixed(state, "net.clip.")},
    "an average beside it": lambda state: {"state_dict_ema": other(state), "state_dict": state},
    "a teacher beside it": lambda state: prefixed(other(state), "teacher.") | prefixed(state, "student."),
    "settings and numbers": lambda state: {"model": state, "args": argparse.Namespace(lr=1), "best": numpy.float64(2)},
}


def assert_holds(clip: torch.nn.Module, state: State) -> None:
    loaded = clip.state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize("form", FORMS)
def test_weights_are_found_in_what_trainers_save(form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = small(tmp_path).state_dict()
    torch.save(FORMS[form](state), tmp_path / "weights.pt")
    torch.manual_seed(1)
    model = build_model(ModelConfig(small_model(tmp_path), pretrained=str(tmp_path / "weights.pt")))
    assert_holds(model.clip, state)
    assert f"holds the model's {len(state)} tensors" in capsys.readouterr().err or form.endswith(
        ("compile", "DDP", "tower")
    )


@pytest.mark.slow
def test_weights_of_a_checkpoint_of_a_run_are_found(tmp_path: Path) -> None:
    words = (
        "--model.name",
        small_model(tmp_path),
        "--train.steps",
        "2",
        "--train.batch_size",
        "8",
        "--data.workers",
        "0",
    )
    assert train_py(*words, "--output_dir", "run", "--data.val_fraction", "0", folder=tmp_path).code == 0
    file = next((tmp_path / "run" / "checkpoints").glob("step-*/model.safetensors"))
    exported = tmp_path / "run" / "export" / "open_clip_model.safetensors"
    states = [build_model(ModelConfig(small_model(tmp_path), pretrained=str(each))).clip for each in (file, exported)]
    assert_holds(states[0], dict(states[1].state_dict()))


def test_an_archive_of_torch_script_is_read_and_its_programs_are_not_run(tmp_path: Path) -> None:
    clip = small(tmp_path).half().eval()
    archive = torch.jit.trace(Archive(clip), torch.zeros(1, 3, 32, 32).half(), check_trace=False)
    torch.jit.save(archive, tmp_path / "ViT.pt")
    model = build_model(ModelConfig(small_model(tmp_path), pretrained=str(tmp_path / "ViT.pt")))
    assert_holds(model.clip, {name: tensor.float() for name, tensor in clip.state_dict().items()})
    assert model.model_config["quick_gelu"] is True  # as all of OpenAI's


def test_an_archive_whose_program_runs_when_it_is_loaded_does_not(tmp_path: Path) -> None:
    class Loud(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.arange(3.0))

        def forward(self, value: Tensor) -> Tensor:
            return value * self.weight

        @torch.jit.export
        def __getstate__(self) -> dict[str, Tensor]:
            return {"weight": self.weight}

        @torch.jit.export
        def __setstate__(self, state: dict[str, Tensor]) -> None:
            raise RuntimeError("it ran")

    torch.jit.save(torch.jit.script(Loud()), tmp_path / "loud.pt")
    with pytest.raises(torch.jit.Error, match="it ran"):
        torch.jit.load(tmp_path / "loud.pt")
    assert torch.equal(read_torch_script(tmp_path / "loud.pt")["weight"], torch.arange(3.0))


def test_safetensors_by_another_name_and_old_names_in_a_new_form(tmp_path: Path) -> None:
    state = small(tmp_path).state_dict()
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "pytorch_model.bin")
    assert_holds(build_model(ModelConfig(small_model(tmp_path), str(tmp_path / "pytorch_model.bin"))).clip, state)
    torch.save({"model": prefixed(state, "module.")}, tmp_path / "old.pt")
    custom = build_model(ModelConfig(small_model(tmp_path), str(tmp_path / "old.pt"), {"force_custom_text": True}))
    assert torch.equal(custom.clip.text.text_projection, state["text_projection"])


@pytest.mark.parametrize(
    ("held", "words"),
    [
        ({"optimizer": ADAM, "epoch": 3}, ["2 tensors (optimizer.state.0.exp_avg", "0 of the model's"]),
        ({"epoch": 3, "steps": [1, 2]}, ["holds no tensors: its keys are epoch, steps"]),
        ({f"vision_model.layer{i}.w": torch.ones(1) for i in range(900)}, ["vision_model.layer0.w", "lacks"]),
        ({"x" * 5000: torch.ones(1)}, ["1 tensors (xxxx"]),
    ],
)
def test_a_file_of_something_else_is_told_by_what_it_holds(held: object, words: list[str], tmp_path: Path) -> None:
    torch.save(held, tmp_path / "weights.pt")
    with pytest.raises(ConfigError) as caught:
        build_model(ModelConfig(small_model(tmp_path), pretrained=str(tmp_path / "weights.pt")))
    message = str(caught.value)
    assert message.startswith("model.pretrained: '") and len(message.replace(str(tmp_path), "")) <= 450
    assert all(word in message for word in words), message


def test_a_larger_model_is_not_cut_to_the_size_of_a_smaller_one(tmp_path: Path) -> None:
    described = json.loads(SMALL_MODEL)
    described["text_cfg"]["layers"] = 3
    (tmp_path / "larger.json").write_text(json.dumps(described))
    torch.save(build_model(ModelConfig(str(tmp_path / "larger.json"))).clip.state_dict(), tmp_path / "larger.pt")
    with pytest.raises(ConfigError, match=r"it has transformer\.resblocks\.2\..* besides"):
        build_model(ModelConfig(small_model(tmp_path), pretrained=str(tmp_path / "larger.pt")))
    with pytest.raises(ConfigError, match=r"lacks transformer\.resblocks\.2\."):
        torch.save(small(tmp_path).state_dict(), tmp_path / "smaller.pt")
        build_model(ModelConfig(str(tmp_path / "larger.json"), pretrained=str(tmp_path / "smaller.pt")))


# --- towers


@pytest.mark.parametrize("prefix", ["", "visual.", "module.visual.", "encoder._orig_mod."])
def test_a_tower_takes_what_fits_and_says_how_much(
    prefix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    visual = small(tmp_path).visual.state_dict()
    file = tmp_path / "visual.pt"
    torch.save(prefixed(visual, prefix), file)
    options = {"pretrained_image_path": str(file)}
    assert_holds(build_model(ModelConfig(small_model(tmp_path), options=options)).clip.visual, visual)
    assert f"{len(visual)} of the tower's {len(visual)} tensors" in capsys.readouterr().err
    del visual["proj"]
    visual["positional_embedding"] = torch.ones(3, 3)
    torch.save(prefixed(visual, prefix), file)
    build_model(ModelConfig(small_model(tmp_path), options=options))
    said = capsys.readouterr().err
    assert f"{len(visual) - 1} of the tower's {len(visual) + 1} tensors; random stay" in said
    assert "proj" in said and "positional_embedding" in said


def test_both_towers_come_from_one_file(tmp_path: Path) -> None:
    state = small(tmp_path).state_dict()
    torch.save({"state_dict": prefixed(state, "module.")}, tmp_path / "both.pt")
    options = {f"pretrained_{side}_path": str(tmp_path / "both.pt") for side in ("image", "text")}
    loaded = build_model(ModelConfig(small_model(tmp_path), options=options)).clip.state_dict()
    same = {name for name, tensor in state.items() if torch.equal(loaded[name], tensor)}
    assert set(state) - same == {"logit_scale"}


@pytest.mark.parametrize("side", ["image", "text"])
def test_a_tower_that_nothing_fits_is_refused(side: str, tmp_path: Path) -> None:
    torch.save({"backbone.stem.weight": torch.ones(3), "backbone.head.bias": torch.ones(2)}, tmp_path / "tower.pt")
    options = {f"pretrained_{side}_path": str(tmp_path / "tower.pt")}
    with pytest.raises(ConfigError, match=r"none of its tensors fits the tower: it holds 2 tensors \(backbone\.stem"):
        build_model(ModelConfig(small_model(tmp_path), options=options))


def test_a_tower_of_timm_takes_timms_own_file(tmp_path: Path) -> None:
    import timm

    described = json.loads(SMALL_MODEL)
    described["vision_cfg"] = {"timm_model_name": "test_vit", "timm_pool": "token", "image_size": 160}
    (tmp_path / "with_timm.json").write_text(json.dumps(described))
    torch.manual_seed(5)
    theirs = timm.create_model("test_vit").state_dict()
    torch.save({"model": theirs}, tmp_path / "timm.pt")
    options = {"pretrained_image_path": str(tmp_path / "timm.pt")}
    trunk = build_model(ModelConfig(str(tmp_path / "with_timm.json"), options=options)).clip.visual.trunk.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in trunk.items())


# --- what weights expect of pictures

HALVES = {"mean": [0.5, 0.4, 0.3], "std": [0.1, 0.2, 0.3], "interpolation": "bilinear", "resize_mode": "squash"}


def test_preprocessing_comes_from_beside_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"force_preprocess_cfg": HALVES, "force_quick_gelu": True}
    model = build_model(ModelConfig(small_model(tmp_path), options=options))
    write_export(tmp_path / "export", export_of(model))
    file = tmp_path / "export" / "open_clip_model.safetensors"
    again = build_model(ModelConfig(small_model(tmp_path), pretrained=str(file)))
    assert {
        key: list(v) if isinstance(v, tuple) else v for key, v in again.preprocess_config.items()
    }.items() >= HALVES.items()
    assert again.model_config["quick_gelu"] is True
    said = capsys.readouterr().err
    assert "mean 0.5, 0.4, 0.3, deviation 0.1, 0.2, 0.3, bilinear, squash; QuickGELU: from " in said
    assert str(tmp_path / "export" / "open_clip_config.json") in said
    own = {"force_preprocess_cfg": {"mean": [0, 0, 0]}}
    chosen = build_model(ModelConfig(small_model(tmp_path), pretrained=str(file), options=own)).preprocess_config
    assert (chosen["mean"], list(chosen["std"])) == ([0, 0, 0], HALVES["std"])
    assert "model.options.force_preprocess_cfg (mean)" in capsys.readouterr().err


@pytest.fixture
def tags(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict]:
    """Return a table that stands in for open_clip's tags of the small model; weights are those of a file."""
    table: dict[str, dict] = {}
    named = {"list_pretrained_tags_by_model": lambda name: list(table)}
    monkeypatch.setattr(open_clip, "list_pretrained_tags_by_model", named["list_pretrained_tags_by_model"])
    monkeypatch.setattr("accel_clip.models.preprocessing.get_pretrained_cfg", lambda name, tag: table[tag])
    return table


def test_a_file_takes_what_all_tags_of_the_model_share(
    tags: dict[str, dict], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(small(tmp_path).state_dict(), tmp_path / "a.pt")
    given = ModelConfig(small_model(tmp_path), pretrained=str(tmp_path / "a.pt"))
    tags |= {"first": {**HALVES, "quick_gelu": True}, "second": {**HALVES, "quick_gelu": True, "url": "elsewhere"}}
    model = build_model(given)
    assert model.preprocess_config["mean"] == HALVES["mean"] and model.model_config["quick_gelu"]
    assert "all of open_clip's weights for small: a.pt does not say" in capsys.readouterr().err
    tags["third"] = {**HALVES, "mean": [0, 0, 0]}
    model = build_model(given)
    assert model.preprocess_config["mean"] == open_clip.OPENAI_DATASET_MEAN and "quick_gelu" not in model.model_config
    assert "open_clip's default: a.pt does not say" in capsys.readouterr().err


def test_quick_gelu_follows_the_tag(monkeypatch: pytest.MonkeyPatch) -> None:
    from accel_clip.models.preprocessing import expected_by, with_expected

    assert with_expected("ViT-B-32", "openai", {}, quick_gelu=False)["force_quick_gelu"] is True
    assert "force_quick_gelu" not in with_expected("ViT-B-32", "laion2b_s34b_b79k", {}, quick_gelu=False)
    kept = with_expected("ViT-B-32", "openai", {"force_quick_gelu": False}, quick_gelu=False)
    assert kept["force_quick_gelu"] is False
    roberta = with_expected("roberta-ViT-B-32", "laion2b_s12b_b32k", {}, quick_gelu=True)  # its tag does not say
    assert not {"quick_gelu", "force_quick_gelu"} & set(roberta)
    ours = expected_by("MobileCLIP2-S0", "mobileclip2_s0.pt")
    assert (list(ours.pictures["mean"]), list(ours.pictures["std"])) == ([0, 0, 0], [1, 1, 1])
    assert ours.origin.startswith("all of open_clip's weights for MobileCLIP2-S0")
