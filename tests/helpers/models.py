"""Models that train in milliseconds, as descriptions in files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from accel_clip.models.build import ClipModel
from accel_clip.models.export import ExportedModel, copy_of_weights, exported_model

SMALL_MODEL = """{"embed_dim": 32,
 "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
 "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}}"""


def small_model(folder: Path) -> str:
    """Write the description of a model that trains in milliseconds and return its path."""
    file = folder / "small.json"
    file.write_text(SMALL_MODEL)
    return str(file)


def model_that_drops_patches(folder: Path) -> str:
    """Write the description of such a model that leaves out half of the patches in training, and return its path."""
    described = json.loads(SMALL_MODEL)
    described["vision_cfg"]["patch_dropout"] = 0.5
    (folder / "drops_patches.json").write_text(json.dumps(described))
    return str(folder / "drops_patches.json")


def small_coca(folder: Path) -> str:
    """Write the description of a CoCa model that trains in milliseconds and return its path."""
    described = json.loads(Path(small_model(folder)).read_text())
    described["vision_cfg"].update(attentional_pool=True, attn_pooler_heads=2, output_tokens=True)
    described["text_cfg"].update(embed_cls=True, output_tokens=True, context_length=16)
    described.update(custom_text=True, multimodal_cfg={**described["text_cfg"], "layers": 1})
    for key in ("embed_cls", "output_tokens"):
        del described["multimodal_cfg"][key]
    (folder / "small_coca.json").write_text(json.dumps(described))
    return str(folder / "small_coca.json")


def export_of(model: ClipModel, metrics: Mapping[str, float] | None = None) -> ExportedModel:
    """Return a model as it is now as an export."""
    return exported_model(model, copy_of_weights(model), metrics or {})
