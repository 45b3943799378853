"""The loss of CoCa: pictures and captions are told apart from others, and captions are written word by word."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import functional

from accel_clip.config import require
from accel_clip.data.batch import Batch
from accel_clip.losses.base import LOSSES
from accel_clip.losses.gradient import LossGradient, gradient_of_share
from accel_clip.losses.tiles import softmax_share, tiled_clip_loss
from accel_clip.typed import Range

LIMITS = Range(0, 1e6)  # of the weights


@LOSSES.register("coca", "CoCaLoss")
class CoCaLoss:
    """Contrastive and captioning loss of a CoCa model (Yu et al. 2022, arXiv 2205.01917, equation 4).

    caption_loss_weight, clip_loss_weight: open_clip_train's defaults; pad_id: the token that is no word of a caption.
    The caption term is the mean over all tokens of the global batch that are words.
    """

    def __init__(self, caption_loss_weight: float = 2.0, clip_loss_weight: float = 1.0, pad_id: int = 0) -> None:
        for name, weight in (("caption_loss_weight", caption_loss_weight), ("clip_loss_weight", clip_loss_weight)):
            require(LIMITS.holds(weight), f"loss.options.{name}", weight, f"it must be {LIMITS.words}")
        self.caption_weight, self.clip_weight, self.pad_id = caption_loss_weight, clip_loss_weight, pad_id

    def __call__(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logits: Tensor | None = None,
        labels: Tensor | None = None,
        output_dict: bool = True,
    ) -> dict[str, Tensor]:
        """Return the loss of a batch that is whole; without the decoder's logits [B, L, V] the contrastive term alone.

        features are unit-norm [B, D], logit_scale is after exp, labels int [B, L].
        """
        terms = {"contrastive_loss": self.clip_weight * tiled_clip_loss(image_features, text_features, logit_scale)}
        if logits is None or labels is None:
            return terms
        num_words = (labels != self.pad_id).sum().clamp_min(1)
        return terms | {name: each / num_words for name, each in self.pair_terms(logits, labels).items()}

    def gradient(self, accelerator: Accelerator, outputs: dict[str, Tensor]) -> LossGradient:
        """Return the gradient of the global batch's contrastive term; two gathers."""
        share = softmax_share(accelerator, outputs["image_features"], outputs["text_features"], outputs["logit_scale"])
        return gradient_of_share(accelerator, share).scaled(self.clip_weight)

    def pair_terms(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return the sum over all words of what each costs to write."""
        cost = functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=self.pad_id, reduction="sum"
        )
        return {"caption_loss": self.caption_weight * cost}

    def pair_count(self, batch: Batch) -> Tensor:
        """Return how many words the decoder has to write for this process's pairs; it is given the first token."""
        return torch.count_nonzero(batch.tokens[:, 1:] != self.pad_id)
