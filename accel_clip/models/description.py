"""A look at what describes a model before open_clip builds it: every number in its range."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from accel_clip.config import ModelConfig
from accel_clip.faults import ConfigError, one_line
from accel_clip.typed import Range, WrongValue, fit, require_ordinary_numbers
from accel_clip.typed_json import WrongContent, read_json

ARCHITECTURE = ("embed_dim", "vision_cfg", "text_cfg")
MOST_BYTES = 1 << 20  # of a description, which fills a few hundred

Layers = Annotated[int, Range(1, 256)]
Width = Annotated[int, Range(1, 10**6)]
Number = Annotated[int, Range(1, 10**5)]
Pixels = Annotated[int, Range(1, 10**5)]
Token = Annotated[int, Range(0, 10**9)]
Share = Annotated[float, Range(0, 1)]
Factor = Annotated[float, Range(0, 1000, is_open=True)]
Exponent = Annotated[float, Range(-100, 100)]


@dataclass(frozen=True)
class VisionTower:
    """The numbers of `vision_cfg` that decide what is built; what is left out has open_clip's default."""

    layers: Layers | tuple[Layers, Layers, Layers, Layers] | None = None
    """blocks; of a ResNet, in each of its four stages"""
    width: Width | None = None
    """numbers of a token, or channels"""
    head_width: Width | None = None
    """numbers of an attention head"""
    mlp_ratio: Factor | None = None
    """width of the hidden layer in that of a block"""
    patch_size: Pixels | None = None
    """edge, in pixels"""
    image_size: Pixels | tuple[Pixels, Pixels] | None = None
    """edge, or height and width, in pixels"""
    patch_dropout: Share | None = None
    """share of patches that training leaves out"""
    attn_pooler_queries: Number | None = None
    """tokens that the pooling attention gives"""
    attn_pooler_heads: Number | None = None
    """heads of the pooling attention"""
    timm_model_name: str | None = None
    """of the tower, where timm builds it"""
    timm_drop: Share | None = None
    """dropout of timm's classifier"""
    timm_drop_path: Share | None = None
    """share of blocks that timm's stochastic depth leaves out"""


@dataclass(frozen=True)
class TextTower:
    """The numbers of `text_cfg`, and the names of what comes from elsewhere."""

    layers: Layers | None = None
    """blocks"""
    width: Width | None = None
    """numbers of a token"""
    heads: Number | None = None
    """of attention"""
    mlp_ratio: Factor | None = None
    """width of the hidden layer in that of a block"""
    context_length: Annotated[int, Range(1, 10**6)] | None = None
    """tokens of a caption"""
    vocab_size: Annotated[int, Range(1, 10**9)] | None = None
    """different tokens"""
    pad_id: Token | None = None
    """token that fills a caption up"""
    eos_id: Token | None = None
    """token that ends a caption"""
    hf_model_name: str | None = None
    """of the tower, where transformers builds it"""
    hf_tokenizer_name: str | None = None
    """of the tokenizer on the Hub, or its folder"""
    tokenizer_kwargs: dict | None = None
    """what the tokenizer is built with"""


@dataclass(frozen=True)
class Decoder(TextTower):
    """The numbers of `multimodal_cfg`."""

    dim_head: Number | None = None
    """numbers of an attention head"""
    n_queries: Number | None = None
    """tokens of a picture that are attended to"""
    attn_pooler_heads: Number | None = None
    """heads of the pooling attention"""


@dataclass(frozen=True)
class Description:
    """A model in open_clip's form."""

    embed_dim: Width
    """width of the features"""
    vision_cfg: VisionTower
    """the image tower"""
    text_cfg: TextTower
    """the text tower"""
    multimodal_cfg: Decoder | None = None
    """the decoder of CoCa"""
    quick_gelu: bool | None = None
    """whether the activation is QuickGELU"""
    custom_text: bool | None = None
    """whether the text tower is a module of its own"""
    init_logit_scale: Exponent | None = None
    """logarithm of the logit scale at first"""
    init_logit_bias: Exponent | None = None
    """logit bias at first"""


@dataclass(frozen=True)
class Options:
    """The numbers among `model.options` that are no parts of a description."""

    force_image_size: Pixels | tuple[Pixels, Pixels] | None = None
    """edge, or height and width, in pixels"""
    force_context_length: Annotated[int, Range(1, 10**6)] | None = None
    """tokens of a caption"""
    force_patch_dropout: Share | None = None
    """share of patches that training leaves out"""


@dataclass(frozen=True)
class Preprocessing:
    """How a model wants its pictures; what is left out has open_clip's default."""

    size: Pixels | tuple[Pixels, Pixels]
    """edge, or height and width, in pixels"""
    mean: tuple[Exponent, Exponent, Exponent]
    """of each colour, taken off"""
    std: tuple[Factor, Factor, Factor]
    """of each colour, divided by"""
    interpolation: str
    """how sizes are changed"""
    resize_mode: str
    """what becomes of pictures of another shape: shortest, longest or squash"""
    fill_color: Annotated[int, Range(0, 255)]
    """of what a picture does not cover"""


def height_and_width(size: int | Sequence[int]) -> tuple[int, int]:
    """Return a size in pixels as a description writes it, the edge of a square or height and width, as these two."""
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def check_described(config: ModelConfig) -> None:
    """Raise `ConfigError` for numbers in a model's file or options; torch and open_clip are not imported for it."""
    check_description(config.options, Options, "model.options")
    if config.name.endswith(".json"):
        described = read_description(Path(config.name))
        if isinstance(described, dict) and all(key in described for key in ARCHITECTURE):
            check_description(described, Description, f"model.name: {config.name}")


def read_description(file: Path) -> Any:
    """Return what a JSON file holds, which is not larger than a description; raises `ConfigError`."""
    try:
        return read_json(file, Any, MOST_BYTES)
    except (OSError, WrongContent) as error:
        raise ConfigError(f"model.name: {file} cannot be read: {one_line(error)}") from error


def check_description(described: Any, kind: type, name: str) -> None:
    """Raise `ConfigError` for a number that is not in its range; name: the setting, and what it names."""
    try:
        fit(described, kind, "")
        require_ordinary_numbers(described, "")
    except WrongValue as error:
        raise ConfigError(f"{name}: {error}") from error
