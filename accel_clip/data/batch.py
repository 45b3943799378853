"""One batch of pairs of one process."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from accel_clip.data.bad_samples import BadSample


@dataclass(frozen=True)
class Batch:
    """The pairs of one process in one contrastive batch; b = pairs, L = tokens of the context, H and W in pixels.

    image: uint8 [b, 3, H, W], not normalised; tokens: int [b, L]; sample: int64 [b], the pair's index over all
    sources; caption_hash: int64 [b], equal for equal captions; extra: columns that a loss asks for, first dimension b;
    bad_samples: those that were met, and replaced, on the way.
    """

    image: torch.Tensor
    tokens: torch.Tensor
    sample: torch.Tensor
    caption_hash: torch.Tensor
    extra: dict[str, torch.Tensor] = field(default_factory=dict)
    bad_samples: tuple[BadSample, ...] = ()

    def __len__(self) -> int:
        return len(self.sample)

    def tensors(self) -> dict[str, Any]:
        """Return the fields that live on a device."""
        return {
            "image": self.image,
            "tokens": self.tokens,
            "sample": self.sample,
            "caption_hash": self.caption_hash,
            "extra": self.extra,
        }

    def to(self, device: torch.device) -> Batch:
        """Return the batch on another device; copies from pinned memory overlap with what runs there."""
        moved = {key: value.to(device, non_blocking=True) for key, value in self.tensors().items() if key != "extra"}
        extra = {key: value.to(device, non_blocking=True) for key, value in self.extra.items()}
        return replace(self, **moved, extra=extra)

    def pin_memory(self) -> Batch:
        """Return the batch in page-locked memory (called by torch's DataLoader)."""
        moved = {key: value.pin_memory() for key, value in self.tensors().items() if key != "extra"}
        return replace(self, **moved, extra={key: value.pin_memory() for key, value in self.extra.items()})
