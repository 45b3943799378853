"""The room that a model's weights need, known before any of them is made."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import psutil
import torch
from open_clip import CoCa, CustomTextCLIP

from accel_clip.config import GIB
from accel_clip.faults import ConfigError
from accel_clip.process.accelerator import num_local_processes


def require_room(model_config: Mapping[str, Any], what: str) -> None:
    """Raise `ConfigError` for a model whose weights do not fit into the memory that this process has.

    what: the setting, and what it names. Raises what open_clip does for a description that it cannot build.
    """
    num_parameters, num_bytes = size_of(model_config)
    room = memory_of_a_process()
    if num_bytes > room:
        raise ConfigError(
            f"{what} has {num_parameters:,} parameters, which need {num_bytes / GIB:,.1f} GiB in float32, and "
            f"{room / GIB:,.1f} GiB of memory are there for them: choose a smaller model"
        )


def size_of(model_config: Mapping[str, Any]) -> tuple[int, int]:
    """Return how many parameters a model has, and the bytes of all that it holds.

    It is built on torch's meta device, which knows shapes and holds no numbers: a few hundred layers take a
    second. Random states stay as they are.
    """
    config = deepcopy(dict(model_config))
    config.pop("custom_text", None)
    config["vision_cfg"]["timm_model_pretrained"] = config["text_cfg"]["hf_model_pretrained"] = False
    with torch.device("meta"):
        model = (CoCa if "multimodal_cfg" in config else CustomTextCLIP)(**config)
    tensors = [*model.parameters(), *model.buffers()]
    return sum(each.numel() for each in model.parameters()), sum(each.nbytes for each in tensors)


def memory_of_a_process() -> int:
    """Return the bytes of this machine's memory that are free, at most one of its processes' share of all."""
    memory = psutil.virtual_memory()
    return min(int(memory.available), int(memory.total) // num_local_processes())
