"""One batch of pairs of one process."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from accel_clip.data.bad_samples import BadSample


@dataclass(frozen=True)
class Batch:
    """The pairs of one process in one contrastive batch; b = pairs, L = tokens of the context, H and W in pixels.

    image: uint8 [b, 3, H, W], not normalised; tokens: int [b, L]; sample: int64 [b], the pair's index over all sources;
    caption_hash, picture_hash: int64 [b], equal for equal captions and for pairs of one picture; extra: columns that a
    loss asks for, first dimension b; bad_samples: those that were met, and replaced, on the way; features: those of
    frozen towers that are known already, `image_features` or `text_features`, float32 [b, D].
    """

    image: torch.Tensor
    tokens: torch.Tensor
    sample: torch.Tensor
    caption_hash: torch.Tensor
    picture_hash: torch.Tensor
    extra: dict[str, torch.Tensor] = field(default_factory=dict)
    bad_samples: tuple[BadSample, ...] = ()
    features: dict[str, torch.Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.sample)

    def columns(self) -> dict[str, torch.Tensor]:
        """Return what a loss may ask for beside the model's outputs, one row a pair."""
        return {"caption_hash": self.caption_hash, "picture_hash": self.picture_hash, **self.extra}

    def pin_memory(self) -> Batch:
        """Return the batch in page-locked memory (called by torch's DataLoader)."""
        pinned = {
            key: getattr(self, key).pin_memory()
            for key in ("image", "tokens", "sample", "caption_hash", "picture_hash")
        }
        extra, features = (
            {key: value.pin_memory() for key, value in named.items()} for named in (self.extra, self.features)
        )
        return replace(self, **pinned, extra=extra, features=features)
