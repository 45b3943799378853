"""Models from open_clip, with everything an export needs to build them again."""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.factory import get_model_config
from torch import Tensor

from accel_clip.config import ModelConfig
from accel_clip.faults import ConfigError, DataError, nearest, one_line
from accel_clip.models.description import (
    ARCHITECTURE,
    Description,
    Options,
    Preprocessing,
    check_description,
    height_and_width,
    read_description,
)
from accel_clip.models.foreign_code import refuse_foreign_code, without_foreign_code
from accel_clip.models.preprocessing import with_expected
from accel_clip.models.size import require_room
from accel_clip.models.skeleton import shapes_of
from accel_clip.models.tower_files import is_folder, tower_config, usual_size
from accel_clip.models.weights import (
    BROKEN_WEIGHTS,
    MORE_THAN_TENSORS,
    TOWER_WEIGHTS,
    more_than_tensors,
    read_for,
    tensors_alone,
    weights_of_tower,
)
from accel_clip.process.network import go_offline_without_hub

TINY = Path(__file__).parent / "tiny.json"
OWN_DESCRIPTIONS = Path(open_clip.__file__).parent / "model_configs"
SIGLIP_LOGIT_SCALE, SIGLIP_LOGIT_BIAS = 10.0, -10.0  # Zhai et al. 2023, arXiv 2303.15343, section 3.2
NOT_ARCHITECTURE = {"model_name", "pretrained", "precision", "device", "jit", "output_dict", "weights_only"}


@dataclass(frozen=True)
class ClipModel:
    """An open_clip model, its tokenizer, and what its export says."""

    clip: Any
    """an open_clip model; nn.Module's types know none of its attributes"""
    tokenizer: Callable[[list[str]], Tensor]
    """from captions to tokens, int [n, L]"""
    model_config: dict[str, Any]
    """the `model_cfg` of `open_clip_config.json`"""
    preprocess_config: dict[str, Any]
    """the `preprocess_cfg` of `open_clip_config.json`"""
    towers: dict[str, Any] = field(default_factory=dict)
    """the `config.json` of its towers"""

    @property
    def picture_size(self) -> tuple[int, int]:
        """Return height and width of the pictures that it takes, in pixels."""
        return height_and_width(self.preprocess_config["size"])


def build_model(config: ModelConfig, needs_logit_bias: bool = False) -> ClipModel:
    """Return the model that the settings name, in float32 on the CPU.

    needs_logit_bias: the loss is a sigmoid loss; logit scale and bias start at SigLIP's where the weights bring none.
    Raises `ConfigError` for a wrong name or option and `DataError` where weights cannot be had.
    """
    name = registered_name(config.name)
    options = creation_options(config)
    if needs_hub(name, config.pretrained):
        go_offline_without_hub()
    check_pretrained(name, config)
    options = with_expected(name, config.pretrained, options, has_quick_gelu(name))
    model_config = resolved_config(name, options)
    refuse_foreign_code(name, model_config)
    if needs_logit_bias and "init_logit_bias" not in model_config:
        start = {"init_logit_bias": SIGLIP_LOGIT_BIAS}
        if not has_weights(config):
            start["init_logit_scale"] = math.log(SIGLIP_LOGIT_SCALE)
        options, model_config = {**start, **options}, {**start, **model_config}
    with tensors_alone(), without_foreign_code():
        clip = create(name, config, options, model_config)
    check_description(clip.visual.preprocess_cfg, Preprocessing, f"model.name: {config.name}: preprocess_cfg")
    if not has_weights(config):
        initialise_decoder(clip)
    if needs_logit_bias and has_weights(config):
        fill_missing_bias(clip, model_config)
    fit_picture_size(clip, config, model_config)
    towers = tower_config(clip, model_config)
    return ClipModel(clip, tokenizer_of(config), model_config, dict(clip.visual.preprocess_cfg), towers)


def fit_picture_size(clip: Any, config: ModelConfig, model_config: dict[str, Any]) -> None:
    """Give a tower of timm the size that its description asks for; open_clip does so for `force_image_size` alone.

    Raises `ConfigError` for a size that the user chose and the patches do not divide: the rest would not be seen.
    """
    visual = clip.visual
    trunk = getattr(visual, "trunk", None)
    (height, width), patch = height_and_width(visual.image_size), patch_size_of(visual)
    is_chosen = config.name.endswith(".json") or config.options.get("force_image_size") is not None
    if is_chosen and patch is not None and (height % patch[0] or width % patch[1]):
        rows, columns = max(1, height // patch[0]), max(1, width // patch[1])
        raise ConfigError(
            f"model.options.force_image_size: pictures of {height} x {width} are not divided by patches of "
            f"{patch[0]} x {patch[1]}: take {rows * patch[0]} x {columns * patch[1]}, or another multiple"
        )
    if hasattr(trunk, "set_input_size") and (height, width) != usual_size(trunk):
        visual.set_input_size((height, width))


def patch_size_of(visual: Any) -> tuple[int, int] | None:
    """Return height and width of the patches that a tower cuts pictures into, None where it cuts none."""
    cutting = getattr(getattr(visual, "trunk", None), "patch_embed", visual)
    size = getattr(cutting, "patch_size", None)
    return None if size is None else height_and_width(size)


def tokenizer_of(config: ModelConfig) -> Callable[[list[str]], Tensor]:
    """Return the tokenizer of the model that the settings name, whose weights are not needed for it."""
    name = registered_name(config.name)
    if needs_hub(name, None):
        go_offline_without_hub()
    refuse_foreign_code(name, resolved_config(name, creation_options(config)))
    with without_foreign_code():
        return build_tokenizer(name, config.options.get("force_context_length"))


def needs_hub(name: str, pretrained: str | None) -> bool:
    """Return whether a model's parts may come from the Hugging Face Hub: weights, description or tokenizer."""
    if name.startswith("hf-hub:") or (pretrained is not None and not Path(pretrained).is_file()):
        return True
    text = read_config(name)["text_cfg"]
    named = (text.get("hf_tokenizer_name"), text.get("hf_model_name"))
    return not name.startswith("local-dir:") and any(each and not is_folder(each) for each in named)


def registered_name(name: str) -> str:
    """Return the name under which open_clip knows the model, after telling it of `tiny` or of a JSON file."""
    if name == "tiny":
        if name not in open_clip.list_models():
            open_clip.add_model_config(TINY)
        return name
    if name.endswith(".json"):
        return register_json(Path(name))
    if name.startswith("local-dir:"):
        folder = Path(name.removeprefix("local-dir:"))
        if not (folder / "open_clip_config.json").is_file():
            raise ConfigError(f"model.name: {folder} holds no open_clip_config.json: name a folder that was exported")
        read_description(folder / "open_clip_config.json")
    elif not name.startswith("hf-hub:") and name.replace("/", "-") not in open_clip.list_models():
        known = ["tiny", *open_clip.list_models()]
        raise ConfigError(
            f"model.name: unknown model '{name}'{nearest(name, known) or ';'} "
            "known: tiny, the names of 'accel-clip list models', a .json file, hf-hub:org/name, local-dir:folder"
        )
    return name


def register_json(file: Path) -> str:
    """Return the name of a model that is described in a JSON file of open_clip's form.

    A file is read anew each time: it may have been edited since, or another one have had its name.
    """
    described = read_description(file)
    require_architecture(described, str(file))
    known = get_model_config(file.stem)
    if known == described:
        return file.stem
    if (OWN_DESCRIPTIONS / f"{file.stem}.json").is_file() or file.stem == TINY.stem:
        raise ConfigError(f"model.name: {file} has the name of another model, '{file.stem}': rename the file")
    open_clip.add_model_config(file)
    return file.stem


def require_architecture(described: Any, name: str) -> None:
    """Raise `ConfigError` unless a model's description has its three parts, and loads no code."""
    if not isinstance(described, dict):
        raise ConfigError(f"model.name: {name} does not describe a model: it must be a JSON object")
    missing = [key for key in ARCHITECTURE if not isinstance(described.get(key), dict if "cfg" in key else int)]
    if missing:
        raise ConfigError(f"model.name: {name} lacks {', '.join(missing)}: open_clip needs all three to build a model")
    if trusts_remote_code(described):
        raise ConfigError(
            f"model.name: {name} asks for 'trust_remote_code', which would run programs that somebody else wrote: "
            "use a model whose code is in transformers"
        )
    check_description(described, Description, f"model.name: {name}")


def trusts_remote_code(value: Any) -> bool:
    """Return whether nested settings tell `transformers` to run code that comes with a model or tokenizer."""
    if isinstance(value, dict):
        return bool(value.get("trust_remote_code")) or any(trusts_remote_code(inner) for inner in value.values())
    return isinstance(value, (list, tuple)) and any(trusts_remote_code(inner) for inner in value)


def creation_options(config: ModelConfig) -> dict[str, Any]:
    """Return `model.options` after checking that they do not say what other settings say."""
    for key in config.options:
        if key in NOT_ARCHITECTURE:
            raise ConfigError(
                f"model.options: '{key}' is not a setting of the architecture: use model.name, model.pretrained and "
                "train.precision"
            )
    check_description(config.options, Options, "model.options")
    return dict(config.options)


def resolved_config(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Return the architecture with the options in it, so that it builds the same model without them.

    The rules are those of `open_clip.create_model` (open_clip/factory.py).
    """
    config = deepcopy(read_config(name))
    creation = inspect.signature(open_clip.create_model).parameters
    vision, text = config["vision_cfg"], config["text_cfg"]
    if options.get("force_quick_gelu"):
        config["quick_gelu"] = True
    if options.get("force_custom_text"):
        config["custom_text"] = True
    if options.get("force_patch_dropout") is not None:
        vision["patch_dropout"] = options["force_patch_dropout"]
    if options.get("force_image_size") is not None:
        vision["image_size"] = options["force_image_size"]
    if options.get("force_context_length") is not None:
        text["context_length"] = options["force_context_length"]
    config.update({key: value for key, value in options.items() if key not in creation})
    if trusts_remote_code(config):
        raise ConfigError(
            "model.options: 'trust_remote_code' would run programs that somebody else wrote: leave it out"
        )
    check_description(config, Description, "model.options")
    return config


def read_config(name: str) -> dict[str, Any]:
    """Return a model's configuration; raises `DataError` where the hub does not give it."""
    try:
        config = get_model_config(name.replace("/", "-") if ":" not in name else name)
    except Exception as error:  # the hub client raises errors of many libraries; all mean that it cannot be had
        raise DataError(f"model.name: {name}: {one_line(error)}") from error
    require_architecture(config, name)
    return config


def has_quick_gelu(name: str) -> bool:
    """Return whether a model's description asks for OpenAI's approximation of GELU."""
    return bool(read_config(name).get("quick_gelu"))


def has_weights(config: ModelConfig) -> bool:
    """Return whether the model starts from weights."""
    return config.pretrained is not None or config.name.startswith(("hf-hub:", "local-dir:"))


def check_pretrained(name: str, config: ModelConfig) -> None:
    """Raise `ConfigError` for weights that are neither a file nor a tag of the model."""
    tags, pretrained = open_clip.list_pretrained_tags_by_model(name), config.pretrained
    if pretrained is not None and ":" in name:
        raise ConfigError(f"model.pretrained: '{config.name}' brings its own weights: leave model.pretrained away")
    if pretrained is not None and pretrained not in tags and not Path(pretrained).is_file():
        known = ", ".join(tags) or "none for this model"
        raise ConfigError(
            f"model.pretrained: '{pretrained}' is no file and no tag of '{name}'{nearest(pretrained, tags) or ';'} "
            f"tags: {known}"
        )


def create(name: str, config: ModelConfig, options: dict[str, Any], model_config: dict[str, Any]) -> Any:
    """Return open_clip's model; its errors come back with the setting that caused them.

    model_config: the description with the options in it.
    """
    pretrained = config.pretrained
    what = f"model.pretrained: '{pretrained}'" if pretrained else f"model.name: '{config.name}'"
    logging.getLogger().addFilter(_is_not_random_notice)
    try:
        require_room(model_config, what)
        files = {key: str(options[key]) for key in TOWER_WEIGHTS if options.get(key) is not None}
        shapes = shapes_of(model_config) if has_weights(config) or files else {}
        towers = [(file, weights_of_tower(file, key, shapes)) for key, file in files.items()]
        with read_for(shapes, towers):
            return open_clip.create_model(
                name, pretrained, output_dict=True, **{"require_pretrained": has_weights(config), **options}
            )
    except TypeError as error:
        cause = f"model.options: {config.options} does not suit '{config.name}'" if config.options else what
        raise ConfigError(f"{cause}: {one_line(error)}") from error
    except MORE_THAN_TENSORS as error:
        raise more_than_tensors(what) from error
    except BROKEN_WEIGHTS as error:
        is_download = pretrained in open_clip.list_pretrained_tags_by_model(name) or name.startswith("hf-hub:")
        raise (DataError if is_download else ConfigError)(f"{what}: {one_line(error)}") from error
    except OSError as error:
        raise DataError(f"model.name: '{config.name}' cannot be downloaded or read: {one_line(error)}") from error
    finally:
        logging.getLogger().removeFilter(_is_not_random_notice)


def build_tokenizer(name: str, context_length: int | None) -> Callable[[list[str]], Tensor]:
    """Return the tokenizer of a model; one that brings code of its own is refused, without a question.

    Raises `DataError` where it cannot be downloaded or read.
    """
    own = {"trust_remote_code": False} if read_config(name)["text_cfg"].get("hf_tokenizer_name") else {}
    try:
        tokenizer: Callable[[list[str]], Tensor] = open_clip.get_tokenizer(name, context_length=context_length, **own)
    except (OSError, RuntimeError, ValueError, TypeError, LookupError, ImportError) as error:
        raise DataError(f"model.name: the tokenizer of '{name}' cannot be had: {one_line(error)}") from error
    return tokenizer


def _is_not_random_notice(record: logging.LogRecord) -> bool:
    return "Model initialized randomly" not in record.getMessage()


def fill_missing_bias(clip: Any, model_config: dict[str, Any]) -> None:
    """Start the logit bias at its initial value where the weights brought none (open_clip loads a zero then)."""
    with torch.no_grad():
        if clip.logit_bias is not None and not clip.logit_bias.any():
            clip.logit_bias.fill_(model_config["init_logit_bias"])


def initialise_decoder(clip: Any) -> None:
    """Draw the projection of CoCa's decoder, which open_clip 3.3.0 leaves as it finds the memory (transformer.py)."""
    decoder = getattr(clip, "text_decoder", None)
    if decoder is not None:
        torch.nn.init.normal_(decoder.text_projection, std=len(decoder.text_projection) ** -0.5)
