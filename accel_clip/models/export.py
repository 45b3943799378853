"""A folder that open_clip loads by `local-dir:`: weights, configuration, tokenizer and a model card."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import open_clip
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from accel_clip.checkpoint.contents import read_state
from accel_clip.checkpoint.manifest import Checkpoint
from accel_clip.checkpoint.restore import load_weights
from accel_clip.checkpoint.saved_state import ModelState
from accel_clip.config import ModelConfig
from accel_clip.faults import ConfigError, StorageError, one_line
from accel_clip.files.kinds import EXPORT
from accel_clip.files.marked import Draft
from accel_clip.models.build import ClipModel, tokenizer_of
from accel_clip.models.tower_files import IN_FOLDER, placed
from accel_clip.typed_json import WrongContent, read_json

WEIGHTS = "open_clip_model.safetensors"
CONFIG = "open_clip_config.json"
TOWERS = "config.json"  # as timm and transformers call it
METRICS = "metrics.json"
CARD = "README.md"
OF_THE_MODEL = "clip."  # what a checkpoint puts before the names of the model's weights


class DescribedModel(Protocol):
    """What is needed to describe a model: an export has it, and a model that is trained."""

    @property
    def model_config(self) -> Mapping[str, Any]:
        """Return the architecture, as `open_clip_config.json` has it."""
        ...

    @property
    def preprocess_config(self) -> Mapping[str, Any]:
        """Return how pictures are prepared."""
        ...

    @property
    def towers(self) -> Mapping[str, Any]:
        """Return what timm and transformers need beside it."""
        ...

    @property
    def tokenizer(self) -> Any:
        """Return the tokenizer."""
        ...


@dataclass(frozen=True)
class ExportedModel:
    """What an export holds: weights, and everything that says how they are used."""

    weights: Mapping[str, Tensor]
    """by open_clip's names"""
    model_config: Mapping[str, Any]
    """the `model_cfg` of `open_clip_config.json`"""
    preprocess_config: Mapping[str, Any]
    """the `preprocess_cfg` of `open_clip_config.json`"""
    tokenizer: Any
    """of open_clip"""
    metrics: Mapping[str, float]
    """What the model card says of the model."""
    towers: Mapping[str, Any] = field(default_factory=dict)
    """What timm and transformers need beside it."""


def exported_model(model: ClipModel, weights: Mapping[str, Tensor], metrics: Mapping[str, float]) -> ExportedModel:
    """Return a model with given weights of its own as an export; see `copy_of_weights`."""
    described = (model.model_config, model.preprocess_config, model.tokenizer)
    return ExportedModel(weights, *described, metrics, model.towers)


def write_export(folder: Path, exported: ExportedModel) -> None:
    """Write the folder; equal weights give equal bytes of `open_clip_model.safetensors`.

    A folder that is there is replaced once the new one is whole. Raises `StorageError` when it cannot be written.
    """
    try:
        with Draft(folder, EXPORT) as draft:
            save_file(plain_tensors(exported.weights), draft.path / WEIGHTS)
            write_description(draft.path, exported, str(folder.resolve()), IN_FOLDER)
            (draft.path / METRICS).write_text(json.dumps(dict(exported.metrics), indent=2) + "\n", encoding="utf-8")
            model_card(folder.absolute().parent.name, exported.metrics).save(draft.path / CARD)
            draft.publish(editable=(CARD, CONFIG, METRICS))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise StorageError(f"{folder}: the export could not be written: {error}") from error


def write_description(folder: Path, exported: DescribedModel, place: str, of_timm: str) -> None:
    """Write all that open_clip needs beside the weights; `place` is where it will find them: see `placed`."""
    config = {
        "model_cfg": placed(exported.model_config, exported.towers, place, of_timm),
        "preprocess_cfg": exported.preprocess_config,
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if exported.towers:
        (folder / TOWERS).write_text(json.dumps(exported.towers, indent=2) + "\n", encoding="utf-8")
    if hasattr(exported.tokenizer, "save_pretrained"):  # those from the hub; open_clip's own needs no files
        exported.tokenizer.save_pretrained(str(folder))


def model_in(checkpoint: Checkpoint, is_best: bool) -> ExportedModel:
    """Return the model in a checkpoint, with what was measured of just these weights."""
    state = read_state(checkpoint)
    described, run = state.model, state.run
    measured = run.best_metrics if is_best else (run.metrics if run.evaluated_step == run.step else None)
    weights = {
        name.removeprefix(OF_THE_MODEL): tensor
        for name, tensor in load_weights(checkpoint).items()
        if name.startswith(OF_THE_MODEL)
    }
    tokenizer = tokenizer_described(described, ModelConfig(**asdict(state.config.model)))
    return as_exported(described, weights, tokenizer, measured or {})


def as_exported(
    described: ModelState, weights: Mapping[str, Tensor], tokenizer: Any, metrics: Mapping[str, float]
) -> ExportedModel:
    """Return the export of a model that a checkpoint describes."""
    parts = (described.model_config, described.preprocess_config, tokenizer)
    return ExportedModel(weights, *parts, metrics, described.towers)


def tokenizer_described(described: ModelState, config: ModelConfig) -> Any:
    """Return the tokenizer of a model that a checkpoint describes; one of transformers from where it came from."""
    if described.model_config["text_cfg"].get("hf_tokenizer_name"):
        return tokenizer_of(config)
    with tempfile.TemporaryDirectory() as folder:
        write_description(Path(folder), as_exported(described, {}, None, {}), folder, IN_FOLDER)
        return open_clip.get_tokenizer(f"{IN_FOLDER}{folder}")


def read_metrics(folder: Path) -> dict[str, float]:
    """Return what was measured of an exported model; raises `ConfigError` for a file that does not say it."""
    try:
        metrics: dict[str, float] = read_json(folder / METRICS, dict[str, float])
    except (OSError, WrongContent) as error:
        raise ConfigError(f"{folder}: {one_line(error)}: write the export again by accel-clip export") from error
    return metrics


def plain_tensors(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights as contiguous CPU tensors of their own, in the order of their names."""
    return {name: weights[name].detach().to("cpu", copy=True).contiguous() for name in sorted(weights)}


def copy_of_weights(model: ClipModel) -> dict[str, Tensor]:
    """Return the model's weights as they are now, on the CPU."""
    return plain_tensors(model.clip.state_dict())


def model_card(name: str, metrics: Mapping[str, float]) -> ModelCard:
    """Return a model card with the metrics and the code that loads the model."""
    results = [
        EvalResult(
            task_type="zero-shot-image-classification" if key.startswith("zero_shot/") else "image-text-retrieval",
            dataset_type="custom",
            dataset_name="held-out part",
            metric_type=key.split("/", 1)[-1],
            metric_value=value,
        )
        for key, value in metrics.items()
        if key.startswith(("val/", "zero_shot/"))
    ]
    data = ModelCardData(
        library_name="open_clip",
        pipeline_tag="zero-shot-image-classification",
        tags=["clip"],
        model_name=name,
        eval_results=results or None,
    )
    rows = "\n".join(f"| {key} | {value:.4f} |" for key, value in metrics.items())
    return ModelCard(f"---\n{data.to_yaml()}\n---\n" + CARD_TEXT.format(name=name, rows=rows))


CARD_TEXT = """
# {name}

A CLIP model trained with accel_clip.

```python
import open_clip

model, _, preprocess = open_clip.create_model_and_transforms("local-dir:path/to/this/folder")
tokenizer = open_clip.get_tokenizer("local-dir:path/to/this/folder")
```

| metric | value |
|---|---|
{rows}
"""
