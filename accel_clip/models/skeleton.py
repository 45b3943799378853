"""A model as its description has it, without weights: names and shapes in a moment, and room for others' weights."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from copy import deepcopy
from typing import Any

import torch
from accelerate import init_empty_weights
from open_clip import CLIP, CoCa, CustomTextCLIP

from accel_clip.randomness import seeded


def bare_model(model_config: Mapping[str, Any]) -> Any:
    """Return the model that `open_clip.create_model` builds of a description before it loads weights."""
    config = deepcopy(dict(model_config))
    own_text = not (config.pop("custom_text", False) or "hf_model_name" in config["text_cfg"])
    config["vision_cfg"]["timm_model_pretrained"] = config["text_cfg"]["hf_model_pretrained"] = False
    kind = CLIP if own_text else CoCa if "multimodal_cfg" in config else CustomTextCLIP
    model = kind(**config)
    model.output_dict = True
    return model


def skeleton(model_config: Mapping[str, Any]) -> Any:
    """Return a bare model whose parameters hold no numbers, where it can be built without; random states stay."""
    with seeded(0):
        with suppress(NotImplementedError, RuntimeError), init_empty_weights(include_buffers=False):
            model = bare_model(model_config)
            if not any(buffer.is_meta for buffer in model.buffers()):
                return model
        return bare_model(model_config)  # towers such as Swin's reckon with their parameters


def shapes_of(model_config: Mapping[str, Any]) -> dict[str, torch.Size]:
    """Return the shapes of the tensors of a model's state dict by name."""
    return {name: tensor.shape for name, tensor in skeleton(model_config).state_dict().items()}
