"""What weights expect of pictures and of their activation: their normalisation, resizing and QuickGELU.

A file of weights says nothing of them. They are taken, in this order, from `model.options`, from what stands beside the
file, from what open_clip's tag says, and from what all of open_clip's tags of the model have in common.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
from open_clip.pretrained import get_pretrained_cfg

from accel_clip.console import say
from accel_clip.models.torch_script import is_torch_script

KEYS = ("mean", "std", "interpolation", "resize_mode", "fill_color")


@dataclass(frozen=True)
class ExpectedPreprocessing:
    """What weights expect."""

    pictures: dict[str, Any]
    """entries of open_clip's `preprocess_cfg`"""
    quick_gelu: bool | None
    """None where nothing is known"""
    origin: str
    """who says so"""


def expected_by(name: str, pretrained: str) -> ExpectedPreprocessing:
    """Return what weights expect: those of a tag, or a file's.

    name: of the model, as open_clip takes it.
    """
    tags = {tag: get_pretrained_cfg(name, tag) for tag in open_clip.list_pretrained_tags_by_model(name)}
    if pretrained in tags:
        return ExpectedPreprocessing(
            chosen(tags[pretrained]), tags[pretrained].get("quick_gelu"), f"open_clip's tag '{pretrained}'"
        )
    file = Path(pretrained)
    beside = described_beside(file)
    if beside is not None:
        return beside
    settings = [chosen(tag) for tag in tags.values()]
    agree = bool(settings) and all(each == settings[0] for each in settings)
    all_quick = bool(tags) and all(tag.get("quick_gelu") for tag in tags.values())
    quick = True if all_quick or is_torch_script(file) else None
    if agree:
        return ExpectedPreprocessing(
            settings[0], quick, f"all of open_clip's weights for {name}: {file.name} does not say"
        )
    return ExpectedPreprocessing({}, quick, f"open_clip's default: {file.name} does not say")


def described_beside(file: Path) -> ExpectedPreprocessing | None:
    """Return what the export or the checkpoint that a file lies in says, None where it lies in neither."""
    for name, keys in (
        ("open_clip_config.json", ("preprocess_cfg", "model_cfg")),
        ("state.json", ("preprocess_config", "model_config")),
    ):
        with suppress(OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            described = json.loads((file.parent / name).read_text(encoding="utf-8"))
            described = described.get("model", described) if name == "state.json" else described
            pictures, model = (described[key] for key in keys)
            return ExpectedPreprocessing(chosen(pictures), bool(model.get("quick_gelu")), str(file.parent / name))
    return None


def chosen(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries that belong to weights, and not to a size."""
    return {key: settings[key] for key in KEYS if settings.get(key) is not None}


def with_expected(name: str, pretrained: str | None, options: Mapping[str, Any], quick_gelu: bool) -> dict[str, Any]:
    """Return the options of a model with what its weights expect, which is said.

    quick_gelu: whether the model's description has it. What `options` say wins.
    """
    if pretrained is None:
        return dict(options)
    expected = expected_by(name, pretrained)
    own = options.get("force_preprocess_cfg") or {}
    merged = {**options, "force_preprocess_cfg": {**expected.pictures, **own}}
    if expected.quick_gelu and "force_quick_gelu" not in options and "quick_gelu" not in options:
        merged["force_quick_gelu"] = True
    if expected.quick_gelu is False and quick_gelu:
        merged.setdefault("quick_gelu", False)
    is_quick = merged.get("quick_gelu", quick_gelu or bool(merged.get("force_quick_gelu")))
    say(f"{preparation_in_words(merged['force_preprocess_cfg'], is_quick)}: from {origin_of(own, expected)}")
    return merged


def origin_of(own: Mapping[str, Any], expected: ExpectedPreprocessing) -> str:
    """Return who says how pictures are prepared."""
    return f"model.options.force_preprocess_cfg ({', '.join(own)}) and {expected.origin}" if own else expected.origin


def preparation_in_words(pictures: Mapping[str, Any], quick_gelu: bool) -> str:
    """Return how pictures are prepared, and the activation, in a few words."""
    whole = {**vars(open_clip.transform.PreprocessCfg()), **pictures}
    mean, deviation = (", ".join(f"{float(value):.3g}" for value in whole[key]) for key in ("mean", "std"))
    activation = "QuickGELU" if quick_gelu else "GELU"
    return (
        f"pictures: mean {mean}, deviation {deviation}, {whole['interpolation']}, {whole['resize_mode']}; {activation}"
    )
