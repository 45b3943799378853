"""What timm and transformers need to build a tower anywhere, where its name alone does not tell them.

A text tower that came from a folder has its configuration there, and a tower of timm at another size than its own has
none at all. Both go into one `config.json`, each library reads its own keys of it, and the description names the folder
that holds it.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

IN_FOLDER, ON_HUB = "local-dir:", "hf-hub:"  # what timm calls the two places
OF_TRANSFORMERS, OF_TIMM = "model_type", "architecture"  # keys that only its own configuration has


def tower_config(clip: Any, model_config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `config.json` must hold, nothing where open_clip and public names say it all."""
    config: dict[str, Any] = {}
    if is_folder(model_config["text_cfg"].get("hf_model_name")):
        config |= json.loads(clip.text.config.to_json_string())
        config.pop("_name_or_path", None)
    trunk = getattr(clip.visual, "trunk", None)
    from_folder = (model_config["vision_cfg"].get("timm_model_name") or "").startswith(IN_FOLDER)
    if from_folder or (hasattr(trunk, "set_input_size") and tuple(clip.visual.image_size) != usual_size(trunk)):
        config |= config_of_timm(trunk, clip.visual.image_size)
    return config


def usual_size(trunk: Any) -> tuple[int, int]:
    """Return height and width of the pictures that a model of timm is built for by its name or its configuration."""
    height, width = trunk.default_cfg["input_size"][1:]
    return height, width


def config_of_timm(trunk: Any, size: tuple[int, int]) -> dict[str, Any]:
    """Return timm's own description of one of its models as it is now."""
    from timm.models._hub import save_config_for_hf

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.json"
        save_config_for_hf(trunk, str(file), model_args={"img_size": list(size)})
        return dict(json.loads(file.read_text(encoding="utf-8")))


def placed(model_config: Mapping[str, Any], towers: Mapping[str, Any], place: str, of_timm: str) -> dict[str, Any]:
    """Return a description that finds its towers and its tokenizer in a folder, or in a repository of the hub.

    towers: what `config.json` holds there; of_timm: `IN_FOLDER` or `ON_HUB`.
    """
    config = deepcopy(dict(model_config))
    vision, text = config["vision_cfg"], config["text_cfg"]
    if OF_TRANSFORMERS in towers:
        text["hf_model_name"] = place
    if is_folder(text.get("hf_tokenizer_name")):
        text["hf_tokenizer_name"] = place
    if OF_TIMM in towers:
        vision["timm_model_name"] = of_timm + place
    return config


def is_folder(name: str | None) -> bool:
    """Return whether a name that transformers would look up is that of a folder."""
    return bool(name) and Path(str(name)).is_dir()
