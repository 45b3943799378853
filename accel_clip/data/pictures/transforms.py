"""The user's own augmentations by name, from torchvision and timm: uint8 pixels [3, H, W] to the same."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import Enum
from functools import partial
from typing import Any, TypeAlias

import numpy
import torch
from PIL import Image
from timm.data.auto_augment import augment_and_mix_transform, auto_augment_transform, posterize, rand_augment_transform
from torch import Tensor
from torchvision.transforms import v2

from accel_clip.faults import ConfigError, nearest, one_line
from accel_clip.randomness import seeded_everywhere
from accel_clip.registry import name_of, options_of

Augmentation: TypeAlias = Callable[[Tensor], Tensor]
"""From uint8 [3, H, W] to uint8 [3, H, W]."""

SETTING = "data.transforms"
CONTAINERS = ("Compose", "RandomApply", "RandomChoice", "RandomOrder")
FOR_BATCHES = ("CutMix", "MixUp")
ENUMS: dict[str, type[Enum]] = {"interpolation": v2.InterpolationMode, "policy": v2.AutoAugmentPolicy}
AUTO_AUGMENT = dict.fromkeys(("original", "originalr", "v0", "v0r", "3a"), ("mstd",))
POLICIES = {"rand": ("m", "n", "p", "mstd", "mmax", "inc"), "augmix": ("m", "w", "d", "a", "b", "mstd"), **AUTO_AUGMENT}
"""What timm's policy strings begin with, and which numbers follow; it passes over what it does not know."""
RAND_CHOICES = ("tweights", "t3a", "t3aw")
NUM_TRIALS = 16  # of each; what changes the size every other time gets through once in 65,000 runs
LONGEST_REASON = 200  # characters
RULE = "it must keep 8-bit pixels [3, H, W] of the model's size; mean and std are applied afterwards"


class Transforms:
    """Augmentations one after the other; all their randomness comes from one seed."""

    def __init__(self, steps: Mapping[str, Augmentation]) -> None:
        self.steps = dict(steps)

    def __call__(self, pixels: Tensor, seed: int) -> Tensor:
        """Return pixels uint8 [3, H, W] augmented; raises `ConfigError` for a step that changes size or type."""
        with seeded_everywhere(seed):
            for name, step in self.steps.items():
                pixels = augmented(name, step, pixels)
        return pixels


def build_transforms(
    items: Sequence[str | Mapping[str, Any]], size: tuple[int, int], mean: Sequence[float]
) -> Transforms | None:
    """Return the augmentations of `data.transforms`, or None without any; `try_out` tells whether they keep the pixels.

    size: height and width of the model's pictures; mean: of its pictures, 3 numbers in [0, 1], the colour that
    timm's policies fill with. Raises `ConfigError` for an unknown name or option.
    """
    if not items:
        return None
    build = partial(built, hints=policy_hints(min(size), mean))
    names = [f"{SETTING}: number {place}, {name_of(item, SETTING)}" for place, item in enumerate(items, 1)]
    return Transforms(dict(zip(names, map(build, items), strict=True)))


def try_out(transforms: Transforms, size: tuple[int, int]) -> None:
    """Raise `ConfigError` for a step that does not keep size and type of pixels, or changes those that it is given."""
    example = torch.randint(256, (3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for name, step in transforms.steps.items():
        for seed in range(NUM_TRIALS):
            given = example.clone()
            Transforms({name: step})(given, seed)
            if not torch.equal(given, example):
                raise ConfigError(f"{name}: it changes a picture in place: leave the option 'inplace' out")


def augmented(name: str, step: Augmentation, pixels: Tensor) -> Tensor:
    """Return what a step makes of pixels; raises `ConfigError` where that is nothing that a batch can hold."""
    try:
        result: Any = step(pixels)
    except Exception as error:  # whatever a library, or an option that it did not look at, may raise
        raise ConfigError(
            f"{name}: it cannot be applied to a picture: {one_line(error, LONGEST_REASON)}; {RULE}"
        ) from error
    if type(result) is not Tensor or (result.dtype, result.shape) != (pixels.dtype, pixels.shape):
        raise ConfigError(f"{name}: it makes {pixels_in_words(result)} of {pixels_in_words(pixels)}: {RULE}")
    return result


def built(item: str | Mapping[str, Any], hints: Mapping[str, Any]) -> Augmentation:
    """Return the augmentation that an item names."""
    name, options = name_of(item, SETTING), options_of(item, SETTING)
    if name.partition("-")[0] in POLICIES:
        return PolicyStep(policy(name, options, hints))
    return torchvision_transform(name, options, hints)


def torchvision_transform(name: str, options: Mapping[str, Any], hints: Mapping[str, Any]) -> Augmentation:
    """Return a transform of torchvision by the name of its class, with its options; raises `ConfigError`."""
    known = torchvision_names()
    if name not in known:
        hint = nearest(name.partition("-")[0], [*known, *POLICIES]) or ";"
        raise ConfigError(
            f"{SETTING}: unknown transform '{name}'{hint} known: the classes of torchvision.transforms.v2 and "
            "timm's policies, such as RandomHorizontalFlip, {ColorJitter: {brightness: 0.4}} or rand-m9-mstd0.5-inc1"
        )
    if name in FOR_BATCHES:
        raise ConfigError(f"{SETTING}: {name} mixes pictures, and a caption belongs to one: leave it out")
    made = getattr(v2, name)
    require_options(name, options, inspect.signature(made).parameters)
    given = {option: value_of(name, option, value) for option, value in options.items()}
    if name in CONTAINERS and "transforms" in given:
        inner = given["transforms"]
        given["transforms"] = [built(item, hints) for item in (inner if isinstance(inner, list) else [inner])]
    try:
        transform: Augmentation = made(**given)
    except (TypeError, ValueError, LookupError) as error:
        raise ConfigError(f"{SETTING}: {name}: {one_line(error, LONGEST_REASON)}") from error
    return transform


def torchvision_names() -> list[str]:
    """Return the names of torchvision's transforms."""
    classes = {name: each for name, each in vars(v2).items() if inspect.isclass(each) and not name.startswith("_")}
    return [name for name, each in classes.items() if issubclass(each, v2.Transform) and each is not v2.Transform]


def require_options(name: str, options: Iterable[str], known: Iterable[str]) -> None:
    """Raise `ConfigError` for an option that a transform does not have, with the nearest one that it has."""
    for option in options:
        if option not in known:
            hint = nearest(str(option), known) or ";"
            has = ", ".join(known) or "none"
            raise ConfigError(f"{SETTING}: {name}: unknown option '{option}'{hint} it has: {has}")


def value_of(name: str, option: str, value: Any) -> Any:
    """Return an option's value, words as the constants that torchvision wants; raises `ConfigError`."""
    constants = ENUMS.get(option)
    if constants is None or not isinstance(value, str):
        return value
    known = [str(each.value) for each in constants]
    if value not in known:
        hint = nearest(value, known) or ";"
        raise ConfigError(f"{SETTING}: {name}: {option}: unknown '{value}'{hint} known: {', '.join(known)}")
    return constants(value)


class PolicyStep:
    """A policy of timm, which augments PIL pictures."""

    def __init__(self, policy: Callable[[Image.Image], Image.Image]) -> None:
        self.policy = policy
        ops: Any = getattr(policy, "ops", None) or [op for ops in getattr(policy, "policy", ()) for op in ops]
        for op in ops:
            if op.aug_fn is posterize:
                op.aug_fn = keep_a_bit

    def __call__(self, pixels: Tensor) -> Tensor:
        """Return pixels uint8 [3, H, W] augmented."""
        picture = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
        return torch.from_numpy(numpy.array(self.policy(picture))).permute(2, 0, 1).contiguous()


def keep_a_bit(picture: Image.Image, bits_to_keep: int, **options: Any) -> Image.Image:
    """Return a picture in fewer colours: timm asks for none at its highest magnitudes, which Pillow refuses."""
    fewer: Image.Image = posterize(picture, max(1, bits_to_keep), **options)
    return fewer


def policy(name: str, options: Mapping[str, Any], hints: Mapping[str, Any]) -> Callable[[Image.Image], Image.Image]:
    """Return a policy of timm by its string, such as rand-m9-mstd0.5-inc1; raises `ConfigError`."""
    kind, *sections = name.split("-")
    if options:
        raise ConfigError(f"{SETTING}: {name} takes no options: they stand in its name, such as rand-m9-n2")
    for section in sections:
        require_section(name, kind, section)
    try:
        if kind == "rand":
            return rand_augment_transform(name, dict(hints))
        if kind == "augmix":
            return augment_and_mix_transform(name, {**hints, "translate_pct": 0.3})
        return auto_augment_transform(name, dict(hints))
    except (AssertionError, ValueError, LookupError, TypeError) as error:
        raise ConfigError(
            f"{SETTING}: '{name}' is no policy that timm knows: {one_line(error, LONGEST_REASON)}"
        ) from error


def require_section(name: str, kind: str, section: str) -> None:
    """Raise `ConfigError` for a part of a policy's string that timm would pass over or not understand."""
    letters = re.fullmatch(r"([a-z]+)\d+(\.\d+)?", section)
    if (letters and letters[1] in POLICIES[kind]) or (kind == "rand" and section in RAND_CHOICES):
        return
    known = [f"{letter}NUMBER" for letter in POLICIES[kind]] + list(RAND_CHOICES if kind == "rand" else ())
    raise ConfigError(f"{SETTING}: '{name}': unknown part '{section}'; after {kind} come {', '.join(known)}")


def policy_hints(size: int, mean: Sequence[float]) -> dict[str, Any]:
    """Return what timm's own `create_transform` tells a policy (timm/data/transforms_factory.py)."""
    return {"translate_const": int(size * 0.45), "img_mean": tuple(min(255, round(255 * each)) for each in mean)}


def pixels_in_words(value: Any) -> str:
    """Return type and size of what a transform took or gave."""
    if type(value) is not Tensor:
        return type(value).__name__
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
