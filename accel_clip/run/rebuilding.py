"""A model built again from its description alone: proof that an export will load, and a way on without first weights.

The proof comes before training, in a folder of its own:

1. What the export will hold beside weights is written there, and the folder becomes the working directory.
2. open_clip's classes build the model of it without numbers, whose tensors must have the names and shapes of ours.
3. Our tensors are put in, not copied, and a caption and a picture must come out the same.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.model import set_model_preprocess_cfg
from torch import Tensor

from accel_clip.checkpoint.saved_state import ModelState
from accel_clip.checkpoint.storage import FULL
from accel_clip.config import ModelConfig
from accel_clip.console import say
from accel_clip.faults import AccelClipError, ConfigError, StorageError, one_line
from accel_clip.models.build import ClipModel, build_model
from accel_clip.models.description import Description, check_description
from accel_clip.models.export import DescribedModel, as_exported, tokenizer_described, write_description
from accel_clip.models.foreign_code import refuse_foreign_code, without_foreign_code
from accel_clip.models.freezing import blank_pictures
from accel_clip.models.size import require_room
from accel_clip.models.skeleton import bare_model, skeleton
from accel_clip.models.tower_files import IN_FOLDER, placed
from accel_clip.models.towers import evaluation_mode
from accel_clip.models.weights import some_tensors
from accel_clip.randomness import seeded

CAPTIONS = ("a photo of two birds", "Ein Frosch, 一只青蛙!")  # to cut into tokens; the first goes through the towers
LARGEST_DIFFERENCE = 1e-5
CHECKPOINT = "the model in the run's checkpoint"


def build_for_run(
    config: ModelConfig, described: ModelState | None, needs_logit_bias: bool
) -> tuple[ClipModel, AccelClipError | None]:
    """Return the model of a run, whose export is known to load, and the error that keeps its first weights from it.

    A run that goes on needs no more than its checkpoint holds, `described`: where the weights it began with are gone,
    its model is built from that, and the error is there for a run whose checkpoints are of no use either.
    """
    try:
        model, error = build_model(config, needs_logit_bias), None
    except AccelClipError as problem:
        if described is None:
            raise
        say(f"{problem}: going on with the model in the run's checkpoint")
        model, error = rebuilt(described, config), problem
    prove_export(model, config)
    return model, error


def rebuilt(described: ModelState, config: ModelConfig) -> ClipModel:
    """Return a model as a checkpoint describes it, with random weights."""
    parts = as_exported(described, {}, tokenizer_described(described, config), {})
    with tempfile.TemporaryDirectory() as folder:
        write_description(Path(folder), parts, folder, IN_FOLDER)
        clip = bare_model(examined(placed(parts.model_config, parts.towers, folder, IN_FOLDER)))
    set_model_preprocess_cfg(clip, dict(parts.preprocess_config))
    return ClipModel(clip, parts.tokenizer, dict(parts.model_config), dict(parts.preprocess_config), dict(parts.towers))


def examined(model_config: dict[str, Any]) -> dict[str, Any]:
    """Return the description of a model in a checkpoint; raises `ConfigError` for one that must not be built."""
    check_description(model_config, Description, CHECKPOINT)
    refuse_foreign_code(CHECKPOINT, model_config)
    require_room(model_config, CHECKPOINT)
    return model_config


def prove_export(model: ClipModel, config: ModelConfig) -> None:
    """Raise `ConfigError` unless open_clip would build the same model from what an export of it will hold.

    Leaves no trace in weights, modes or randomness.
    """
    try:
        with without_foreign_code(), description_elsewhere(model) as folder:
            tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(list(CAPTIONS))
            again = skeleton(placed(model.model_config, model.towers, folder, IN_FOLDER))
            require_equal_names(model.clip.state_dict(), again.state_dict())
            again.load_state_dict(model.clip.state_dict(), assign=True)
            require_equal_outputs(model, again, tokens)
    except (*CANNOT, ImportError) as error:
        if isinstance(error, OSError) and error.errno in FULL:
            raise StorageError(f"{tempfile.gettempdir()}: {error}: free some space, or set TMPDIR") from error
        raise ConfigError(
            f"model.name: an export of '{config.name}' with model.options {config.options} could not be loaded again: "
            f"{one_line(error, 200)}: choose another model, or one that is made for this size of pictures"
        ) from error


CANNOT = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError, OSError)
"""What open_clip, timm and transformers raise for a description that is not enough."""


@contextmanager
def description_elsewhere(model: DescribedModel) -> Iterator[str]:
    """Write a model's description into a folder that is the working directory for as long as the block runs."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        write_description(Path(folder), model, folder, IN_FOLDER)
        os.chdir(folder)
        try:
            yield folder
        finally:
            os.chdir(before)


def require_equal_names(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless two models have tensors of the same names and shapes."""
    names = [name for name in {**ours, **theirs} if name not in ours or name not in theirs]
    if names:
        raise ValueError(f"it would have other tensors: {some_tensors(names)}")
    shapes = [name for name, tensor in ours.items() if tensor.shape != theirs[name].shape]
    if shapes:
        raise ValueError(f"it would have other shapes of {some_tensors(shapes)}")


def require_equal_outputs(model: ClipModel, again: Any, tokens: Tensor) -> None:
    """Raise ValueError unless two models make the same of a picture and captions."""
    if not torch.equal(tokens, model.tokenizer(list(CAPTIONS))):
        raise ValueError("its tokenizer would cut captions otherwise")
    with seeded(0), torch.no_grad(), on_one_thread(), evaluation_mode(model.clip), evaluation_mode(again):
        pictures = torch.randn_like(blank_pictures(model)[:1])
        ours, theirs = (clip(image=pictures, text=tokens[:1]) for clip in (model.clip, again))
    for name, value in ours.items():
        if value is not None and not torch.allclose(value, theirs[name], atol=LARGEST_DIFFERENCE):
            raise ValueError(f"it would have other {name}")


@contextmanager
def on_one_thread() -> Iterator[None]:
    """Let torch reckon on one thread: single rows gain nothing from more, and lose much where other programs run."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
