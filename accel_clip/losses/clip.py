"""The softmax contrastive loss of CLIP, tile by tile, with equal pairs as negatives, as positives or left out."""

from __future__ import annotations

from accelerate import Accelerator
from torch import Tensor

from accel_clip.config import require
from accel_clip.losses.base import LOSSES
from accel_clip.losses.gradient import LossGradient, gradient_of_share
from accel_clip.losses.tiles import (
    OWN_PAIR,
    EqualPairs,
    MaskedEqualPairs,
    OwnPair,
    softmax_share,
    tiled_clip_loss,
)

DUPLICATES = {"negatives": None, "positives": EqualPairs, "masked": MaskedEqualPairs}


@LOSSES.register("clip", "CLIPLoss", "ClipLoss")
class ClipLoss:
    """Softmax over all captions and over all pictures of the batch (Radford et al. 2021, arXiv 2103.00020, figure 3).

    duplicates: what pairs with the same caption (or, with `same: picture`, the same picture) are to each other:
    `negatives` as in the paper, `positives` in equal parts, or `masked`, neither.
    """

    def __init__(self, duplicates: str = "negatives", same: str = "caption") -> None:
        require(duplicates in DUPLICATES, "loss.options.duplicates", duplicates, f"one of {', '.join(DUPLICATES)}")
        require(same in ("caption", "picture"), "loss.options.same", same, "it must be caption or picture")
        self.make_positives, self.same = DUPLICATES[duplicates], same

    def __call__(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        caption_hash: Tensor | None = None,
        picture_hash: Tensor | None = None,
        output_dict: bool = True,
    ) -> dict[str, Tensor]:
        """Return the loss of a batch that is whole; features are unit-norm [B, D], logit_scale is after exp."""
        hashes = {"caption": caption_hash, "picture": picture_hash}[self.same]
        loss = tiled_clip_loss(image_features, text_features, logit_scale, self.positives(hashes))
        return {"contrastive_loss": loss}

    def gradient(self, accelerator: Accelerator, outputs: dict[str, Tensor]) -> LossGradient:
        """Return the gradient of the global batch's loss; two gathers, three where duplicates are not negatives."""
        share = softmax_share(
            accelerator,
            outputs["image_features"],
            outputs["text_features"],
            outputs["logit_scale"],
            self.positives(outputs.get(f"{self.same}_hash")),
        )
        return gradient_of_share(accelerator, share)

    def positives(self, hashes: Tensor | None) -> OwnPair:
        """Return what equal pairs are to each other; where nothing says which are equal, each is alone."""
        return OWN_PAIR if self.make_positives is None or hashes is None else self.make_positives(hashes)
