"""What the training step may do with a model: facts about its towers, found once when it is built."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from open_clip import CLIP, CustomTextCLIP
from torch import Tensor

from accel_clip.models.freezing import rest_frozen
from accel_clip.models.names import matches
from accel_clip.models.towers import can_trim, end_token, is_deterministic

SIDES = ("image", "text")


@dataclass(frozen=True)
class Anatomy:
    """Facts about the towers of a model that is trained."""

    separate: bool
    """whether each tower can be run alone"""
    trims: bool
    """whether captions may be cut to the longest of a chunk"""
    end: int | None
    """the token that ends captions, None for the largest"""
    deduplicates: bool
    """whether equal captions may be encoded once"""
    stochastic: bool
    """whether a tower draws random numbers or uses statistics of its batch"""
    frozen: frozenset[str]
    """the sides that get no gradient"""


def examine(clip: Any, tokenizer: Callable[[list[str]], Tensor]) -> Anatomy:
    """Return the facts about a model in training mode, after its parameters were frozen as they will stay."""
    separate = isinstance(clip, (CLIP, CustomTextCLIP))
    clip.train()
    rest_frozen(clip)
    text_parts = [module for name, module in clip.named_children() if name != "visual"]
    return Anatomy(
        separate=separate,
        trims=separate and can_trim(clip, tokenizer),
        end=end_token(clip),
        deduplicates=separate and all(is_deterministic(part) for part in text_parts),
        stochastic=not is_deterministic(clip),
        frozen=frozenset(side for side in SIDES if separate and is_frozen(clip, side)),
    )


def is_frozen(clip: Any, side: str) -> bool:
    """Return whether no parameter of a tower is trained."""
    return not any(each.requires_grad for name, each in clip.named_parameters() if matches(side, name))
