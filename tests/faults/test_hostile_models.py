"""Hostile models: no code that comes with one runs or is asked about, and no description costs time or memory."""

from __future__ import annotations

import io
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import open_clip
import psutil
import pytest
import torch
from open_clip.factory import get_model_config

from accel_clip.config import ModelConfig
from accel_clip.faults import AccelClipError, ConfigError
from accel_clip.models.build import build_model, read_config, registered_name
from accel_clip.models.export import write_export
from accel_clip.models.foreign_code import without_foreign_code
from accel_clip.models.size import size_of
from helpers.commands import train_py
from helpers.models import export_of, small_model

BERT = {
    "model_type": "bert",
    "architectures": ["BertModel"],
    **{"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8, "vocab_size": 8},
    "max_position_embeddings": 8,
}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "blue"]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 20))


def tower(folder: Path, canary: Path, **files: dict[str, Any]) -> Path:
    """Write a text tower and tokenizer of transformers, with a module beside them that leaves a trace when it runs."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    tokenizer = {"tokenizer_class": "BertTokenizer", **files.get("tokenizer_config", {})}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (folder / "config.json").write_text(json.dumps({**BERT, **files.get("config", {})}))
    code = "class Mine:\n    def __new__(cls, *a, **k): open(PATH, 'w')\n    from_pretrained = from_config = __new__\n"
    (folder / "mine.py").write_text(f"PATH = {str(canary)!r}\nopen(PATH, 'w')\n{code}")
    return folder


def description(folder: Path, **text: Any) -> Path:
    """Write the description of a model whose text tower comes from transformers, or parts of it."""
    vision = {"image_size": 32, "layers": 1, "width": 16, "head_width": 8, "patch_size": 16}
    text_cfg = {"context_length": 8, "hf_proj_type": "mlp", "hf_model_pretrained": False, **text}
    file = folder / f"{folder.name}.json"  # open_clip remembers the names of models
    file.write_text(json.dumps({"embed_dim": 4, "vision_cfg": vision, "text_cfg": text_cfg}))
    return file


ALL = dict.fromkeys(("AutoConfig", "AutoModel"), "mine.Mine")
CODE = {
    "config": {"config": {"model_type": "mine", "auto_map": ALL}},
    "config of a known kind": {"config": {"auto_map": ALL}},
    "part of a config": {"config": {"model_type": "clip", "text_config": {"model_type": "x", "auto_map": ALL}}},
    "config from another folder": {"config": {"model_type": "mine", "auto_map": {"AutoConfig": "org/x--mine.Mine"}}},
    "tokenizer": {"tokenizer_config": {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine"] * 2}}},
    "tokenizer, old form": {"tokenizer_config": {"tokenizer_class": "Mine", "auto_map": ["mine.Mine", "mine.Mine"]}},
    "kernel": {"config": {"attn_implementation": "org/kernel"}},
    "trust": {"config": {"model_type": "mine", "auto_map": ALL, "trust_remote_code": True}},
}


@pytest.mark.parametrize("names", [("hf_model_name", "hf_tokenizer_name"), ("hf_tokenizer_name",)], ids=len)
@pytest.mark.parametrize("kind", CODE)
def test_code_in_a_folder_is_refused_and_never_asked_about(
    kind: str, names: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tower(tmp_path / "tower", tmp_path / "canary", **CODE[kind])
    text = {"width": 8, "heads": 1, "layers": 1, "vocab_size": 8, **dict.fromkeys(names, str(folder))}
    with pytest.raises(ConfigError, match=r"^model\.name: .*tower/\w*config\.json names programs .*not run"):
        build_model(ModelConfig(str(description(tmp_path, **text))))
    assert not (tmp_path / "canary").exists() and "y/N" not in capsys.readouterr().out
    assert sys.stdin.read() == "y\n" * 20


@pytest.mark.parametrize("kind", CODE)
def test_code_beside_a_folder_of_open_clip_is_refused(kind: str, tmp_path: Path) -> None:
    plain = build_model(ModelConfig(small_model(tmp_path)))
    folder = tmp_path / "model"
    write_export(folder, export_of(plain))
    tower(folder, tmp_path / "canary", **CODE[kind])
    described = json.loads((folder / "open_clip_config.json").read_text())
    described["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = "bert-base-uncased"
    (folder / "open_clip_config.json").write_text(json.dumps(described))
    with pytest.raises(ConfigError, match="not run"):
        build_model(ModelConfig(f"local-dir:{folder}"))
    assert not (tmp_path / "canary").exists()


def test_code_of_a_name_on_the_hub_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import PreTrainedConfig

    def of_the_hub(name: str, **more: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        assert name == "org/name"
        return {"model_type": "mine", "auto_map": ALL}, {}

    monkeypatch.setattr(PreTrainedConfig, "get_config_dict", of_the_hub)
    with pytest.raises(ConfigError, match=r"config\.json of org/name names programs"):
        build_model(ModelConfig(str(description(tmp_path, hf_model_name="org/name", hf_tokenizer_name="org/name"))))


def test_a_teacher_and_an_option_with_code_are_refused(tmp_path: Path) -> None:
    from accelerate import Accelerator

    from accel_clip.models.teacher import build_teacher

    folder = tower(tmp_path / "tower", tmp_path / "canary", **CODE["config"])
    file = description(tmp_path, hf_model_name=str(folder), hf_tokenizer_name=str(folder))
    torch.save({}, tmp_path / "weights.pt")
    teacher = ModelConfig(str(file), pretrained=str(tmp_path / "weights.pt"))
    with pytest.raises(ConfigError, match=r"teachers: .*not run"):
        build_teacher(teacher, len, Accelerator(cpu=True))
    text = json.loads(file.read_text())["text_cfg"]
    with pytest.raises(ConfigError, match="not run"):
        build_model(ModelConfig("tiny", options={"text_cfg": text, "force_custom_text": True}))
    assert not (tmp_path / "canary").exists()


def test_transformers_alone_would_ask_and_run_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_plugins: None
) -> None:
    """What the house keeps from happening does happen without it, so the tests above are not vacuous."""
    from transformers import AutoConfig

    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])  # which it lengthens
    folder = tower(tmp_path / "tower", tmp_path / "canary", **CODE["config"])
    with without_foreign_code(), pytest.raises(ValueError, match="custom code"):
        AutoConfig.from_pretrained(folder)
    with without_foreign_code(), pytest.raises(ValueError, match="not run"):
        AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert not (tmp_path / "canary").exists()
    with pytest.raises(Exception):  # noqa: B017  the stand-in is no configuration; it has run by then
        AutoConfig.from_pretrained(folder)
    assert (tmp_path / "canary").exists()


def test_a_plain_tower_of_transformers_is_built(tmp_path: Path) -> None:
    folder = tower(tmp_path / "tower", tmp_path / "canary")
    model = build_model(
        ModelConfig(
            str(description(tmp_path, hf_model_name=str(folder), hf_tokenizer_name=str(folder))),
            options={"pretrained_text": False},
        )
    )
    tokens = model.tokenizer(["a red"])
    assert tokens.shape == (1, 8) and model.clip.encode_text(tokens).shape == (1, 4)
    held = [*model.clip.parameters(), *model.clip.buffers()]
    config = {**model.model_config}
    assert size_of(config) == (sum(each.numel() for each in model.clip.parameters()), sum(each.nbytes for each in held))


@pytest.mark.slow
def test_nothing_is_asked_on_a_terminal(tmp_path: Path) -> None:
    folder = tower(tmp_path / "tower", tmp_path / "canary", **CODE["config"])
    file = description(tmp_path, hf_model_name=str(folder), hf_tokenizer_name=str(folder))
    done = train_py("--model.name", str(file), "--output_dir", "run", folder=tmp_path)
    assert done.code == 2 and "not run" in done.err and "y/N" not in done.err + done.out
    assert not (tmp_path / "canary").exists() and not (tmp_path / "run").exists()


def test_scripted_archives_are_refused(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "scripted.pt")
    with pytest.raises(ConfigError, match=r"^model\.pretrained"):
        build_model(ModelConfig(small_model(tmp_path), pretrained=str(tmp_path / "scripted.pt")))


# --- numbers


SMALL: dict[str, Any] = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
NUMBERS = [
    ("embed_dim",),
    *(("vision_cfg", key) for key in ("image_size", "layers", "width", "head_width", "patch_size", "mlp_ratio")),
    *(("text_cfg", key) for key in ("context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio")),
]
WRONG = [0, -1, 10**9 + 1, 10**400, 2**63, 1e308, float("inf"), float("nan"), True, "8", [], {}]


@pytest.mark.parametrize("place", NUMBERS, ids=".".join)
@pytest.mark.parametrize("way", ["json", "options", "folder"])
def test_numbers_of_a_description_are_in_their_ranges(place: tuple[str, ...], way: str, tmp_path: Path) -> None:
    start = time.process_time()
    for value in WRONG:
        described = json.loads(json.dumps(SMALL))
        (described if len(place) == 1 else described[place[0]])[place[-1]] = value
        (tmp_path / "wrong.json").write_text(json.dumps(described))
        (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": described}))
        config = {
            "json": lambda: ModelConfig(str(tmp_path / "wrong.json")),
            "folder": lambda: ModelConfig(f"local-dir:{tmp_path}"),
            "options": lambda described=described: ModelConfig("tiny", options={place[0]: described[place[0]]}),
        }
        with pytest.raises(ConfigError) as caught:
            build_model(config[way]())
        said = str(caught.value)
        assert "\n" not in said and len(said) < 1000 and place[-1] in said, said
        assert said.startswith("model.options" if way == "options" else "model.name"), said
    assert time.process_time() - start < 10


@pytest.mark.parametrize("value", [0, -1, 10**400, 2**63, float("inf"), float("nan"), True, "x", [1], [0, 5]])
@pytest.mark.parametrize("key", ["force_image_size", "force_context_length", "force_patch_dropout"])
def test_numbers_of_options_are_in_their_ranges(key: str, value: Any) -> None:
    if (key, value) == ("force_patch_dropout", 0):
        return
    with pytest.raises(ConfigError, match=rf"^model\.options\.?:? ?\.?{key}"):
        build_model(ModelConfig("tiny", options={key: value}))


@pytest.mark.parametrize(
    "described",
    [
        {**SMALL, "text_cfg": {**SMALL["text_cfg"], "heads": 3}},
        {**SMALL, "vision_cfg": {**SMALL["vision_cfg"], "head_width": 64}},
        {**SMALL, "vision_cfg": {**SMALL["vision_cfg"], "layers": [1, 1]}},
        {**SMALL, "text_cfg": {**SMALL["text_cfg"], "layerz": 3}},
        {**SMALL, "text_cfg": {**SMALL["text_cfg"], "norm_kwargs": {"eps": float("nan")}}},
        {**SMALL, "init_logit_scale": 1e300},
    ],
)
def test_numbers_that_do_not_go_together_are_told_in_one_line(described: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "odd.json").write_text(json.dumps(described))
    with pytest.raises(ConfigError, match=r"^model\.name: [^\n]*$"):
        build_model(ModelConfig(str(tmp_path / "odd.json")))


@pytest.mark.parametrize(
    "preprocessing",
    [{"mean": "x"}, {"std": [0, 1, 1]}, {"mean": [1]}, {"fill_color": -1}, {"interpolation": 3}],
)
def test_preprocessing_of_a_folder_is_looked_at(preprocessing: Any, tmp_path: Path) -> None:
    plain = build_model(ModelConfig(small_model(tmp_path)))
    write_export(tmp_path / "model", export_of(plain))
    file = tmp_path / "model" / "open_clip_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "preprocess_cfg": preprocessing}))
    with pytest.raises(ConfigError, match=r"^model\.name"):
        build_model(ModelConfig(f"local-dir:{tmp_path / 'model'}"))


# --- size


def test_models_that_do_not_fit_are_told_with_their_size(tmp_path: Path) -> None:
    wide = {**SMALL, "text_cfg": {**SMALL["text_cfg"], "width": 10**6, "layers": 256}}
    long = {**SMALL, "text_cfg": {**SMALL["text_cfg"], "context_length": 10**6}}
    for name, described in (("wide", wide), ("long", long)):
        file = tmp_path / f"{name}-{tmp_path.name}.json"
        file.write_text(json.dumps(described))
        start = time.process_time()
        with pytest.raises(ConfigError, match=r"\.json' has [\d,]+ parameters, which need [\d,.]+ GiB .*[\d.]+ GiB"):
            build_model(ModelConfig(str(file)))
        assert time.process_time() - start < 5
    with pytest.raises(ConfigError, match=r"parameters, which need"):
        build_model(ModelConfig("tiny", options={"embed_dim": 10**6, "text_cfg": {"width": 10**6, "heads": 8}}))


@pytest.mark.parametrize("processes", [1, 2])
def test_the_limit_is_the_memory_that_is_there(processes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, needed = size_of(SMALL)
    name, whole = small_model(tmp_path), needed * processes
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=needed, total=whole))
    build_model(ModelConfig(name))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=needed, total=whole - processes))
    with pytest.raises(ConfigError, match="parameters"):
        build_model(ModelConfig(name))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=needed - 1, total=whole))
    with pytest.raises(ConfigError, match="parameters"):
        build_model(ModelConfig(name))


@pytest.mark.parametrize("name", ["ViT-B-32", "RN50", "coca_ViT-B-32", "ViT-B-16-SigLIP", "MobileCLIP-S1"])
def test_sizes_are_those_of_the_models(name: str) -> None:
    state = torch.get_rng_state()
    parameters, num_bytes = size_of(get_model_config(name))
    assert torch.equal(torch.get_rng_state(), state)
    model = open_clip.create_model(name, load_weights=False)
    assert parameters == sum(each.numel() for each in model.parameters())
    assert num_bytes == sum(each.nbytes for each in (*model.parameters(), *model.buffers()))


def test_every_model_of_open_clip_is_in_the_ranges() -> None:
    for name in open_clip.list_models():
        assert read_config(registered_name(name))["embed_dim"] > 0


@pytest.mark.parametrize(
    "config", [{"num_hidden_layers": 10**9}, {"num_labels": 10**9}, {"num_hidden_layers": -1}, {"hidden_size": 10**9}]
)
def test_numbers_of_a_tower_from_elsewhere_cost_nothing(config: dict[str, Any], tmp_path: Path) -> None:
    folder = tower(tmp_path / "tower", tmp_path / "canary", config=config)
    file = description(tmp_path, hf_model_name=str(folder), hf_tokenizer_name=str(folder))
    start = time.process_time()
    with pytest.raises(AccelClipError, match=r"^model\.name"):
        build_model(ModelConfig(str(file)))
    assert time.process_time() - start < 10


def test_numbers_of_a_folder_of_timm_cost_nothing(tmp_path: Path) -> None:
    (tmp_path / "timm").mkdir()
    content = {"architecture": "vit_tiny_patch16_224", "model_args": {"depth": 10**9}, "pretrained_cfg": {}}
    (tmp_path / "timm" / "config.json").write_text(json.dumps(content))
    described = {**SMALL, "vision_cfg": {"timm_model_name": f"local-dir:{tmp_path / 'timm'}", "image_size": 224}}
    (tmp_path / "timm.json").write_text(json.dumps(described))
    with pytest.raises(ConfigError, match=r"depth: 1000000000 does not work"):
        build_model(ModelConfig(str(tmp_path / "timm.json")))
