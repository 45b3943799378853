"""A model as its description has it, without numbers: names and shapes in a moment, and room for others' weights."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from accelerate import init_empty_weights
from open_clip import CLIP, CoCa, CustomTextCLIP

from accel_clip.randomness import seeded


def shapes_of(model_config: Mapping[str, Any]) -> dict[str, torch.Size]:
    """Return the shapes of the tensors of a model's state dict by name; random states stay as they are."""
    config = deepcopy(dict(model_config))
    own_text = not (config.pop("custom_text", False) or "hf_model_name" in config["text_cfg"])
    config["vision_cfg"]["timm_model_pretrained"] = config["text_cfg"]["hf_model_pretrained"] = False
    kind = CLIP if own_text else CoCa if "multimodal_cfg" in config else CustomTextCLIP
    with seeded(0), init_empty_weights(include_buffers=False):
        return {name: tensor.shape for name, tensor in kind(**config).state_dict().items()}
