"""The pairwise sigmoid loss of SigLIP."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from accel_clip.losses.base import LOSSES


@LOSSES.register("siglip", "SigLipLoss", "SigLIPLoss")
def siglip_loss(
    image_features: Tensor, text_features: Tensor, logit_scale: Tensor, logit_bias: Tensor, output_dict: bool = True
) -> dict[str, Tensor]:
    """Every picture with every caption is a yes-or-no question (Zhai et al. 2023, arXiv 2303.15343, algorithm 1).

    image_features, text_features: unit-norm [B, D]; logit_scale: after exp; logit_bias: added to every logit.
    """
    logits = logit_scale * image_features @ text_features.T + logit_bias
    signs = 2 * torch.eye(len(logits), device=logits.device, dtype=logits.dtype) - 1
    return {"contrastive_loss": -F.logsigmoid(signs * logits).sum() / len(logits)}
