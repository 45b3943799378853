"""One exact contrastive step: the gradient of the global batch's loss, for any registered loss."""

from __future__ import annotations

from accelerate import Accelerator
from torch import Tensor, nn

from accel_clip.data.batch import Batch
from accel_clip.losses.base import Loss
from accel_clip.losses.gradient import global_loss_gradient, surrogate


def contrastive_step(accelerator: Accelerator, model: nn.Module, loss: Loss, batch: Batch) -> dict[str, Tensor]:
    """Add the gradient of one contrastive batch to the parameters and return the terms of its global loss.

    The model is called once, through its wrapper, so that mixed precision and the reduction of gradients apply.
    """
    outputs = {key: value for key, value in model(image=batch.image, text=batch.tokens).items() if value is not None}
    gradient = global_loss_gradient(accelerator, loss, outputs)
    accelerator.backward(surrogate(accelerator, loss, outputs, gradient))
    return gradient.terms
