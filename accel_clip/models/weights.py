"""Weights in the files that people have: what a file holds is seen, and named as the model names it.

1. A file is read as tensors alone, in dictionaries of dictionaries; every tensor gets a dotted name (`read_tensors`).
2. What compilers and wrappers put into names is taken out, and what trainers put before them is found by where most of
   the model's names follow (`fitted`).
3. A model must get all of its tensors, and what else the file holds must be no part of a model (`weights_of_model`); a
   tower takes those that fit, and at least one (`weights_of_tower`).
"""

from __future__ import annotations

import argparse
import os
import pickle
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import open_clip.factory
import torch
from open_clip.model import convert_to_custom_text_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from accel_clip.console import say
from accel_clip.faults import ConfigError, one_line, some_of
from accel_clip.models.names import matches
from accel_clip.models.torch_script import is_torch_script, read_torch_script

TOWER_WEIGHTS = {"pretrained_image_path": "image", "pretrained_text_path": "text"}
BROKEN_WEIGHTS = (
    *(RuntimeError, AttributeError, LookupError, ValueError, EOFError, StopIteration, RecursionError, SafetensorError),
    *(ArithmeticError, AssertionError, MemoryError),
)
"""What the readers of weights raise for files that hold none, or those of another model."""
WRAPPERS = ("_orig_mod", "module", "_fsdp_wrapped_module")  # put into names by torch.compile, DDP and FSDP
INNER = ("", "trunk.", "transformer.")  # where open_clip keeps the models of timm and transformers in a tower
SECOND_CHOICE = ("ema", "teacher", "momentum", "optim", "average")  # words in the names of other sets of weights
OPTIONAL = ("logit_bias", "text.transformer.embeddings.position_ids")  # which open_clip does without
OF_OTHER_FORMS = ("image_encoder.model.",)  # open_clip knows MobileCLIP's own names
HARMLESS: tuple[Any, ...] = (
    *(argparse.Namespace, numpy.dtype, *(type(numpy.dtype(kind)) for kind in ("f4", "f8", "i4", "i8", "?"))),
    *((numpy.float64(0).__reduce__()[0], f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
)
"""Classes beside tensors in what trainers save: settings and numbers, which run nothing when they are made."""
MORE_THAN_TENSORS = pickle.UnpicklingError
"""What torch's reader of tensors raises for a file that holds more; it runs nothing of it."""
Shapes = Mapping[str, torch.Size]


class WrongWeights(ValueError):
    """A file of weights that are not those of the model; the message says what it holds."""


@dataclass(frozen=True)
class MatchedWeights:
    """Tensors by the model's names."""

    tensors: dict[str, Tensor]
    """that are parts of the model"""
    prefix: str
    """what stood before the names"""
    num_fit: int
    """how many have a name of the model's"""
    rest: list[str]
    """names that are left out"""


@contextmanager
def read_for(shapes: Shapes, towers: Sequence[tuple[str, dict[str, Tensor]]]) -> Iterator[None]:
    """Let open_clip read weights files by the functions of this module.

    shapes: of the model's tensors by name; towers: files in the order in which open_clip reads them, after those of the
    whole model, and what the towers take from them.
    """
    original, left = open_clip.factory.load_state_dict, list(towers)

    def read(checkpoint_path: str, device: str = "cpu", weights_only: bool = True) -> dict[str, Tensor]:
        place = next((i for i, (file, _) in enumerate(left) if file == str(checkpoint_path)), None)
        return weights_of_model(Path(checkpoint_path), shapes) if place is None else left.pop(place)[1]

    open_clip.factory.load_state_dict = read
    try:
        yield
    finally:
        open_clip.factory.load_state_dict = original


def weights_of_model(file: Path, shapes: Shapes) -> dict[str, Tensor]:
    """Return the tensors of a file by the names of a model; raises `WrongWeights` unless they are all there."""
    found = read_tensors(file)
    if any(name.startswith(OF_OTHER_FORMS) for name in found):
        return found
    fit = fitted(found, shapes)
    missing = [name for name in shapes if name not in fit.tensors and name not in OPTIONAL]
    foreign = [name for name in fit.tensors if name not in shapes and name not in OPTIONAL]
    if missing or foreign:
        lacks = f"lacks {some_tensors(missing)}" if missing else f"has {some_tensors(foreign)} besides"
        raise WrongWeights(
            f"it holds {contents(found)}; {fit.num_fit} of the model's {len(shapes)} are among them, and it {lacks}"
        )
    if fit.prefix or fit.rest:
        beside = f", without {len(fit.rest)} others such as '{fit.rest[0]}'" if fit.rest else ""
        say(f"weights: {file} holds the model's {fit.num_fit} tensors under '{fit.prefix}'{beside}")
    return fit.tensors


def weights_of_tower(file: str, key: str, shapes: Shapes) -> dict[str, Tensor]:
    """Return the tensors of a file that fit a tower, by its names, and say how many do.

    key: of `model.options`; shapes: of the whole model. Raises `ConfigError` where the file cannot be read, or none
    fits: open_clip would go on with random weights.
    """
    what = f"model.options.{key}: '{file}'"
    try:
        found = read_tensors(Path(file))
    except MORE_THAN_TENSORS as error:
        raise more_than_tensors(what) from error
    except (*BROKEN_WEIGHTS, TypeError, OSError) as error:
        raise ConfigError(f"{what}: {one_line(error)}") from error
    wanted = tower_shapes(shapes, TOWER_WEIGHTS[key])
    choices = [(fitted(found, under(wanted, root)), root) for root in INNER]
    fit, root = max(choices, key=lambda choice: choice[0].num_fit)
    tensors = {root + name: tensor for name, tensor in fit.tensors.items()}
    suited = {name: tensor for name, tensor in tensors.items() if wanted.get(name) == tensor.shape}
    if not suited:
        raise ConfigError(
            f"{what}: none of its tensors fits the tower: it holds {contents(found)}, and the tower has "
            f"{some_tensors(wanted)}"
        )
    missing = [name for name in wanted if name not in suited]
    lacks = f"; random stay {some_tensors(missing)}" if missing else ""
    say(f"{what}: {len(suited)} of the tower's {len(wanted)} tensors{lacks}")
    return suited


def tower_shapes(shapes: Shapes, side: str) -> dict[str, torch.Size]:
    """Return the shapes of a tower's tensors by the names that they have in it."""
    prefix = "visual." if side == "image" else "text."
    inside = under(shapes, prefix)
    return inside or {name: shape for name, shape in shapes.items() if matches(side, name)}


def under(shapes: Shapes, prefix: str) -> dict[str, torch.Size]:
    """Return the entries whose names begin with a prefix, without it."""
    return {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}


def fitted(found: Mapping[str, Tensor], shapes: Shapes) -> MatchedWeights:
    """Return the tensors of a file whose names, behind the prefix that most have, are parts of a model."""
    tensors = {without_wrappers(name, shapes): tensor for name, tensor in found.items()}
    prefix = common_prefix(tensors, shapes)
    named = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    if any(name.startswith("text.") for name in shapes):
        named = convert_to_custom_text_state_dict(named)
    parts = {name.partition(".")[0] for name in shapes}
    kept = {name: tensor for name, tensor in named.items() if name.partition(".")[0] in parts}
    rest = [name for name in tensors if not name.startswith(prefix)] + [name for name in named if name not in kept]
    return MatchedWeights(kept, prefix, sum(name in shapes for name in kept), rest)


def without_wrappers(name: str, shapes: Shapes) -> str:
    """Return a name without the parts that wrappers of modules put into it."""
    return name if name in shapes else ".".join(part for part in name.split(".") if part not in WRAPPERS)


def common_prefix(names: Mapping[str, Tensor], shapes: Shapes) -> str:
    """Return what stands before most of the model's names; of equals one that is no average or teacher, the first."""
    counts: Counter[str] = Counter()
    for name in names:
        parts = name.split(".")
        for start in range(len(parts)):
            if ".".join(parts[start:]) in shapes:
                counts["".join(f"{part}." for part in parts[:start])] += 1
    if not counts:
        return ""
    return max(counts, key=lambda prefix: (counts[prefix], not any(word in prefix.lower() for word in SECOND_CHOICE)))


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Return every tensor in a file by its dotted name, on the CPU; nothing in the file is run.

    Raises `MORE_THAN_TENSORS` for a file that holds more, `WrongWeights` for one without tensors, and one of
    `BROKEN_WEIGHTS` or `OSError` for one that cannot be read.
    """
    if is_torch_script(file):
        return read_torch_script(file)
    if is_safetensors(file):
        return load_file(file)
    with torch.serialization.safe_globals(list(HARMLESS)):
        held = torch.load(file, map_location="cpu", weights_only=True)
    found = dict(named_tensors(held, ""))
    if not found:
        keys = f": its keys are {some_tensors(held)}" if isinstance(held, Mapping) else ""
        raise WrongWeights(f"it holds no tensors{keys}")
    return found


def is_safetensors(file: Path) -> bool:
    """Return whether a file is in the form of safetensors, by its name or its first bytes."""
    with file.open("rb") as opened:
        return file.suffix == ".safetensors" or opened.read(9)[8:] == b"{"


def named_tensors(held: Any, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors in nested dictionaries with their dotted names."""
    for key, value in held.items() if isinstance(held, Mapping) else ():
        if isinstance(value, Tensor):
            yield f"{prefix}{key}", value
        elif isinstance(value, Mapping):
            yield from named_tensors(value, f"{prefix}{key}.")


def contents(found: Mapping[str, Tensor]) -> str:
    """Return in a few words what a file holds."""
    return f"{len(found)} tensors ({some_tensors(found)})"


def some_tensors(names: Iterable[object]) -> str:
    """Return the names of a few tensors, and how many there are besides."""
    return some_of(names, most=3, longest=60)


def more_than_tensors(what: str) -> ConfigError:
    """Return the error for pickled weights that torch refuses to load."""
    return ConfigError(
        f"{what} holds more than tensors, which loading it would run: use a .safetensors file, or save its state dict "
        "alone"
    )


@contextmanager
def tensors_alone() -> Iterator[None]:
    """Keep `torch.load` to tensors, whichever library calls it and whatever the environment allows."""
    wanted = {"TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "0"}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
