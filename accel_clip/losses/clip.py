"""The softmax contrastive loss of CLIP."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from accel_clip.losses.base import LOSSES


@LOSSES.register("clip", "CLIPLoss", "ClipLoss")
def clip_loss(
    image_features: Tensor, text_features: Tensor, logit_scale: Tensor, output_dict: bool = True
) -> dict[str, Tensor]:
    """Softmax over all captions and over all pictures of the batch (Radford et al. 2021, arXiv 2103.00020, figure 3).

    image_features, text_features: unit-norm [B, D]; logit_scale: after exp.
    """
    logits = logit_scale * image_features @ text_features.T
    labels = torch.arange(len(logits), device=logits.device)
    return {"contrastive_loss": (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2}
