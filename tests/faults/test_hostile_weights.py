"""Hostile weights and descriptions of models: nothing that is loaded runs, and what is broken names itself."""

from __future__ import annotations

import json
import os
import struct
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from accel_clip import cli
from accel_clip.config import ModelConfig
from accel_clip.faults import AccelClipError, ConfigError
from accel_clip.models.build import build_model, tensors_alone
from accel_clip.models.export import write_export
from helpers.models import export_of, small_model
from helpers.patience import within
from helpers.stand_ins import Payload

Train = Callable[..., tuple[int, str]]


# --- weights


class Stumble:
    """What torch's careful unpickler fails on with a TypeError, and pickle itself takes."""

    def __reduce__(self) -> tuple:
        return OrderedDict, (), (None, {})


@pytest.mark.parametrize("first", [None, Stumble()], ids=["plain", "stumbling"])
@pytest.mark.parametrize("environment", [{}, {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}], ids=["default", "unsafe"])
@pytest.mark.parametrize("way", ["pretrained", "folder", "image tower", "text tower"])
def test_pickled_weights_are_never_run(
    way: str, environment: dict[str, str], first: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    canary, name, options, pretrained = tmp_path / "canary", small_model(tmp_path), {}, None
    file = tmp_path / "bad.pt"
    if way == "folder":
        file = tmp_path / "model" / "open_clip_pytorch_model.bin"
        file.parent.mkdir()
        (file.parent / "open_clip_config.json").write_text(f'{{"model_cfg": {Path(name).read_text()}}}')
        name = f"local-dir:{file.parent}"
    elif way == "pretrained":
        pretrained = str(file)
    else:
        options = {f"pretrained_{way.partition(' ')[0]}_path": str(file)}
    torch.save({"first": first, "state_dict": Payload(canary)}, file)
    with pytest.raises(ConfigError, match=r"^model\.(name|pretrained|options)"):
        build_model(ModelConfig(name, pretrained=pretrained, options=options))
    assert not canary.exists()
    assert {key: os.environ.get(key) for key in environment} == environment
    if environment:  # the file does what it is feared for
        torch.load(file)
        assert canary.exists()


def test_no_library_loads_more_than_tensors_while_a_model_is_built(tmp_path: Path) -> None:
    torch.save(Payload(tmp_path / "canary"), tmp_path / "bad.pt")
    with tensors_alone(), pytest.raises(Exception, match=r"[Ww]eights.only"):
        torch.load(tmp_path / "bad.pt", weights_only=False)
    assert not (tmp_path / "canary").exists() and "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


def test_tensors_in_a_pt_file_still_load(tmp_path: Path) -> None:
    name = small_model(tmp_path)
    state = build_model(ModelConfig(name)).clip.state_dict()
    changed = {key: value + 1 if value.is_floating_point() else value for key, value in state.items()}
    torch.save({"epoch": 3, "state_dict": changed}, tmp_path / "good.pt")
    loaded = build_model(ModelConfig(name, pretrained=str(tmp_path / "good.pt"))).clip.state_dict()
    assert all(torch.equal(loaded[key], changed[key]) for key in changed)
    visual = {key.removeprefix("visual."): value for key, value in changed.items() if key.startswith("visual.")}
    torch.save(visual, tmp_path / "visual.pt")
    options = {"pretrained_image_path": str(tmp_path / "visual.pt")}
    loaded = build_model(ModelConfig(name, options=options)).clip.visual.state_dict()
    assert all(torch.equal(loaded[key], visual[key]) for key in visual)


BROKEN = {
    "huge header.safetensors": struct.pack("<Q", 2**60) + b"{}",
    "header past the end.safetensors": struct.pack("<Q", 2**20) + b"{}",
    "deep header.safetensors": struct.pack("<Q", 100_000) + b'{"a":' + b"[" * 99_995,
    "no header.safetensors": struct.pack("<Q", 4) + b"nope",
    "empty.safetensors": b"",
    "empty.pt": b"",
    "text.pt": b"no weights",
    "zip.pt": b"PK\3\4" + b"\0" * 100,
    "empty.npz": b"",
}


@pytest.mark.parametrize("file", BROKEN)
def test_broken_weights_name_themselves_in_one_line(file: str, train: Train, tmp_path: Path) -> None:
    (tmp_path / file).write_bytes(BROKEN[file])
    with within(10):
        code, said = train("--model.name", small_model(tmp_path), "--model.pretrained", file)
    lines = [line for line in said.splitlines() if "error" in line]
    assert code == 2 and len(lines) == 1 and "model.pretrained" in lines[0] and file in lines[0], said
    assert "Traceback" not in said and not (tmp_path / "run").exists()


def test_an_export_with_a_huge_header_is_refused(tmp_path: Path) -> None:
    model = build_model(ModelConfig(small_model(tmp_path)))
    folder = tmp_path / "run" / "export"
    folder.parent.mkdir()
    write_export(folder, export_of(model))
    (folder / "open_clip_model.safetensors").write_bytes(BROKEN["huge header.safetensors"])
    with pytest.raises(ConfigError, match="export"):
        cli.export_command([str(tmp_path / "run")])


def test_a_model_folder_without_weights_is_not_filled_with_random_ones(tmp_path: Path) -> None:
    described = Path(small_model(tmp_path)).read_text()
    (tmp_path / "open_clip_config.json").write_text(f'{{"model_cfg": {described}}}')
    with pytest.raises(ConfigError, match=r"model\.name: 'local-dir:"):
        build_model(ModelConfig(f"local-dir:{tmp_path}"))


# --- descriptions of models, and code that comes with them


ODD = ("[" * 100_000, "[]", "7", "null", '{"embed_dim": 8, "vision_cfg": [], "text_cfg": {}}')


@pytest.mark.parametrize("text", ODD, ids=lambda text: text[:9])
@pytest.mark.parametrize("form", ["json", "folder"])
def test_descriptions_that_are_none_are_refused(form: str, text: str, tmp_path: Path) -> None:
    (tmp_path / "odd.json").write_text(text)
    (tmp_path / "open_clip_config.json").write_text(f'{{"model_cfg": {text}}}')
    name = str(tmp_path / "odd.json") if form == "json" else f"local-dir:{tmp_path}"
    with pytest.raises(AccelClipError, match=r"^model\.name"):
        build_model(ModelConfig(name))


@pytest.mark.parametrize("way", ["json", "folder", "option", "option of the text tower"])
def test_trust_remote_code_cannot_be_set(way: str, tmp_path: Path) -> None:
    plain = json.loads(Path(small_model(tmp_path)).read_text())
    trusting = {**plain, "text_cfg": {**plain["text_cfg"], "tokenizer_kwargs": {"trust_remote_code": True}}}
    (tmp_path / "trusting.json").write_text(json.dumps(trusting))
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": trusting}))
    configs = {
        "json": ModelConfig(str(tmp_path / "trusting.json")),
        "folder": ModelConfig(f"local-dir:{tmp_path}"),
        "option": ModelConfig("tiny", options={"trust_remote_code": True}),
        "option of the text tower": ModelConfig("tiny", options={"text_cfg": trusting["text_cfg"]}),
    }
    with pytest.raises(ConfigError, match="trust_remote_code"):
        build_model(configs[way])


def test_code_that_comes_with_a_tokenizer_is_not_run_and_not_asked_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    canary = tmp_path / "canary"
    plain = build_model(ModelConfig(small_model(tmp_path)))
    folder = tmp_path / "model"
    write_export(folder, export_of(plain))
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = "org/name"
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    code = {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["code.Mine", "code.Mine"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(code))
    (folder / "config.json").write_text(json.dumps({"model_type": "mine", "auto_map": {"AutoConfig": "code.Mine"}}))
    (folder / "code.py").write_text(f"open({str(canary)!r}, 'w')\nclass Mine: pass\n")
    monkeypatch.setattr("builtins.input", lambda *words: "y")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError, match="not run"):
        build_model(ModelConfig(f"local-dir:{folder}"))
    assert not canary.exists()
