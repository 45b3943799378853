"""A folder that open_clip loads by `local-dir:`: weights, configuration, tokenizer and a model card."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from accel_clip.config import ModelConfig
from accel_clip.faults import ConfigError, DataError, StorageError
from accel_clip.models.build import ClipModel, build_model

WEIGHTS = "open_clip_model.safetensors"
CONFIG = "open_clip_config.json"
METRICS = "metrics.json"


def export_model(folder: Path, model: ClipModel, weights: Mapping[str, Tensor], metrics: Mapping[str, float]) -> None:
    """Write the folder; equal weights give equal bytes of `open_clip_model.safetensors`.

    metrics: what the model card says of the model. A folder that is there is replaced once the new one is whole. Raises
    `StorageError` when it cannot be written.
    """
    new, old = folder.with_name(folder.name + ".tmp"), folder.with_name(folder.name + ".old")
    try:
        for leftover in (new, old):
            shutil.rmtree(leftover, ignore_errors=True)
        new.mkdir(parents=True)
        save_file(plain_tensors(weights), new / WEIGHTS)
        config = {"model_cfg": model.model_config, "preprocess_cfg": model.preprocess_config}
        (new / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (new / METRICS).write_text(json.dumps(dict(metrics), indent=2) + "\n", encoding="utf-8")
        if hasattr(model.tokenizer, "save_pretrained"):  # tokenizers from the hub; open_clip's own needs no files
            model.tokenizer.save_pretrained(str(new))
        model_card(folder.parent.name, metrics).save(new / "README.md")
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise StorageError(f"{folder}: the export could not be written: {error}") from error


def export_run(run: Path, folder: Path | None) -> Path:
    """Write a run's exported model again, by default in place, with the metrics that were measured of it.

    Raises `ConfigError` for a folder that holds no finished run.
    """
    source = run / "export"
    if not (source / WEIGHTS).is_file():
        raise ConfigError(f"{run} holds no exported model ({source / WEIGHTS} is missing): name the folder of a run")
    model = build_model(ModelConfig(name=f"local-dir:{source}"))
    target = folder or source
    export_model(target, model, copy_of_weights(model), read_metrics(source))
    return target


def read_metrics(folder: Path) -> dict[str, float]:
    """Return what was measured of an exported model."""
    return dict(json.loads((folder / METRICS).read_text(encoding="utf-8")))


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
    return ModelCard(f"---\n{data.to_yaml()}\n---\n" + CARD.format(name=name, rows=rows))


CARD = """
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


def push_to_hub(folder: Path, repository: str) -> str:
    """Upload an export to the hub and return its address; the token is the one `hf auth login` stored."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        interface = HfApi()
        interface.create_repo(repository, exist_ok=True)
        return str(interface.upload_folder(repo_id=repository, folder_path=folder))
    except (HfHubHTTPError, OSError) as error:
        raise DataError(f"--push {repository}: {error}") from error
