"""The model as it is trained: an open_clip model behind a normalisation of uint8 pictures on the device."""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Any

import torch
from accelerate.utils import broadcast
from torch import Tensor, nn

from accel_clip.models.build import ClipModel
from accel_clip.models.freezing import rest_frozen
from accel_clip.models.towers import encode_image, encode_text

JOINT_OUTPUTS = ("logits", "labels")  # of CoCa, whose decoder sees both towers


class TrainingModel(nn.Module):
    """Takes uint8 pictures and tokens, returns open_clip's outputs by name.

    The mean and standard deviation are not part of the weights; an export says them in its `preprocess_cfg`.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: ClipModel, separate: bool = True) -> None:
        super().__init__()
        self.clip, self.separate = model.clip, separate
        for name in ("mean", "std"):
            values = torch.tensor(model.preprocess_config[name]).view(1, 3, 1, 1)
            self.register_buffer(name, values, persistent=False)

    def forward(
        self,
        image: Tensor | None = None,
        text: Sequence[Tensor] = (),
        wanted: Container[str] | None = None,
    ) -> dict[str, Tensor]:
        """Return unit-norm features of what is given, the logit scale (after exp) and bias.

        image: uint8 [b, 3, H, W]; text: groups of captions, int [n, L], L as the anatomy allows; wanted: the outputs
        that are used, None for all. Towers that meet run apart where only their features are wanted.
        """
        pixels = None if image is None else self.normalised(image)
        if self.separate or (wanted is not None and not any(name in wanted for name in JOINT_OUTPUTS)):
            return self.apart(pixels, text)
        outputs = self.clip(image=pixels, text=torch.cat(list(text)))
        return {name: value for name, value in outputs.items() if value is not None}

    def apart(self, pixels: Tensor | None, text: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return the features that each tower alone gives, and the scalars."""
        outputs = {"logit_scale": self.clip.logit_scale.exp()}
        if self.clip.logit_bias is not None:
            outputs["logit_bias"] = self.clip.logit_bias
        if pixels is not None:
            outputs["image_features"] = encode_image(self.clip, pixels)
        if text:
            outputs["text_features"] = encode_text(self.clip, *text)
        return outputs

    def normalised(self, image: Tensor) -> Tensor:
        """Return uint8 pictures as the float ones that the model was made for."""
        return (image.to(self.mean.dtype) / 255 - self.mean) / self.std

    def train(self, mode: bool = True) -> TrainingModel:
        """Set the training mode; what is frozen stays as it is, see `rest_frozen`."""
        super().train(mode)
        rest_frozen(self.clip)
        return self


def clamp_logit_scale(clip: Any, largest: float) -> None:
    """Keep a logit scale that is trained (after exp) between 1 and `largest`, as open_clip's trainer does."""
    if not clip.logit_scale.requires_grad:
        return
    with torch.no_grad():
        clip.logit_scale.clamp_(0, torch.tensor(largest).log().item())


def share_running_statistics(clip: Any) -> None:
    """Give every process the first one's statistics of batch norm, which are those that are evaluated and exported."""
    for module in clip.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for buffer in module.buffers():
                buffer.copy_(broadcast(buffer.clone()))


def no_decay_names(clip: Any) -> set[str]:
    """Return the parameters that the model's authors keep free of weight decay."""
    names = clip.no_weight_decay() if hasattr(clip, "no_weight_decay") else set()
    return {str(name) for name in names}
