"""The pairwise sigmoid loss of SigLIP, tile by tile."""

from __future__ import annotations

from accelerate import Accelerator
from torch import Tensor

from accel_clip.losses.base import LOSSES
from accel_clip.losses.gradient import LossGradient, gradient_of_share
from accel_clip.losses.tiles import sigmoid_share, tiled_siglip_loss


@LOSSES.register("siglip", "SigLipLoss", "SigLIPLoss")
class SigLipLoss:
    """Every picture with every caption is a yes-or-no question (Zhai et al. 2023, arXiv 2303.15343, algorithm 1)."""

    def __call__(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor,
        output_dict: bool = True,
    ) -> dict[str, Tensor]:
        """Return the loss of a batch that is whole; features are unit-norm [B, D], logit_scale is after exp."""
        return {"contrastive_loss": tiled_siglip_loss(image_features, text_features, logit_scale, logit_bias)}

    def gradient(self, accelerator: Accelerator, outputs: dict[str, Tensor]) -> LossGradient:
        """Return the gradient of the global batch's loss; one gather."""
        share = sigmoid_share(
            accelerator,
            outputs["image_features"],
            outputs["text_features"],
            outputs["logit_scale"],
            outputs["logit_bias"],
        )
        return gradient_of_share(accelerator, share)
