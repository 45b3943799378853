"""One batch of pairs of one process."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from accel_clip.data.bad_samples import BadSample
from accel_clip.data.lanes import LanePosition

TENSORS = ("image", "tokens", "sample", "caption_hash", "picture_hash")


@dataclass(frozen=True)
class Batch:
    """The pairs of one process in one contrastive batch; b = pairs, L = tokens of the context, H and W in pixels."""

    image: torch.Tensor
    """uint8 [b, 3, H, W], not normalised"""
    tokens: torch.Tensor
    """int [b, L]"""
    sample: torch.Tensor
    """int64 [b], the pair's index over all sources"""
    caption_hash: torch.Tensor
    """int64 [b], equal for equal captions"""
    picture_hash: torch.Tensor
    """int64 [b], equal for pairs of one picture"""
    extra: dict[str, torch.Tensor] = field(default_factory=dict)
    """columns that a loss asks for, by name, first dimension b"""
    bad_samples: tuple[BadSample, ...] = ()
    """those that were met, and replaced, on the way"""
    features: dict[str, torch.Tensor] = field(default_factory=dict)
    """those of frozen towers that are known already, `image_features` or `text_features`, float32 [b, D]"""
    lane_positions: tuple[LanePosition, ...] = ()
    """where the lanes of streams stand after it"""
    num_cut_captions: int = 0
    """how many captions have more tokens than L"""
    num_pairs: Mapping[str, int] = field(default_factory=dict)
    """how many of the b pairs come from each source, by its name"""

    def __len__(self) -> int:
        return len(self.sample)

    def columns(self) -> dict[str, torch.Tensor]:
        """Return what a loss may ask for beside the model's outputs, one row a pair."""
        return {"caption_hash": self.caption_hash, "picture_hash": self.picture_hash, **self.extra}

    def pin_memory(self) -> Batch:
        """Return the batch in page-locked memory (called by torch's DataLoader)."""
        pinned = {key: getattr(self, key).pin_memory() for key in TENSORS}
        extra, features = (
            {key: value.pin_memory() for key, value in named.items()} for named in (self.extra, self.features)
        )
        return replace(self, **pinned, extra=extra, features=features)


def joined_batch(parts: Sequence[Batch]) -> Batch:
    """Return parts of a batch as one, in their order."""
    first = parts[0]
    if len(parts) == 1:
        return first
    tensors = {key: torch.cat([getattr(part, key) for part in parts]) for key in TENSORS}
    extra = {key: torch.cat([part.extra[key] for part in parts]) for key in first.extra}
    features = {key: torch.cat([part.features[key] for part in parts]) for key in first.features}
    bad_samples = tuple(bad for part in parts for bad in part.bad_samples)
    lane_positions = tuple(position for part in parts for position in part.lane_positions)
    num_pairs: Counter[str] = Counter()
    for part in parts:
        num_pairs.update(part.num_pairs)
    return Batch(
        **tensors,
        extra=extra,
        features=features,
        bad_samples=bad_samples,
        lane_positions=lane_positions,
        num_cut_captions=sum(part.num_cut_captions for part in parts),
        num_pairs=num_pairs,
    )
