"""The gradient of a loss over the global batch, with respect to what this process's model returned.

Losses that know their gradient bring it themselves (`tiles.py`). For any other loss:

1. Gather the outputs of all processes (no gradient crosses processes here).
2. Compute the loss of the whole batch on every process.
3. Differentiate it by this process's own rows, by the scalars, and by the loss's own parameters.

Cost: every process computes all B × B logits, so memory grows with B².
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from accel_clip.console import say
from accel_clip.losses.base import Loss, total
from accel_clip.losses.precision import at_least_float32, ieee_float32
from accel_clip.losses.tiles import Share

SCALARS = ("logit_scale", "logit_bias")
LOGITS_HELD = 4  # matrices of float32, as open_clip's ClipLoss with its gradient
MUCH_MEMORY = 2**30  # bytes


@dataclass(frozen=True)
class LossGradient:
    """The terms of the global loss, and the gradient of their sum.

    The mean over processes of `terms`, `by_scalar` and `by_parameter` is that of the global loss; rows belong to one
    process, which holds all of their gradient.
    """

    terms: dict[str, Tensor]
    """by name, detached"""
    by_row: dict[str, Tensor]
    """for each output with one row a pair, a tensor of its shape"""
    by_scalar: dict[str, Tensor]
    """for the logit scale and bias"""
    by_parameter: list[Tensor]
    """for each of the loss's own parameters"""

    def scaled(self, weight: float) -> LossGradient:
        """Return the gradient of `weight` times the loss."""
        terms, by_row, by_scalar = (
            {name: weight * each for name, each in part.items()} for part in (self.terms, self.by_row, self.by_scalar)
        )
        return LossGradient(terms, by_row, by_scalar, [weight * each for each in self.by_parameter])


def global_loss_gradient(accelerator: Accelerator, loss: Loss, outputs: dict[str, Tensor]) -> LossGradient:
    """Return the loss of the batch of all processes and its gradient by `outputs` of this process.

    outputs: features [b, D] and other tensors with one row for each of this process's pairs, and scalars. Every process
    must bring the same number of pairs. A loss with a method `gradient(accelerator, outputs)` computes it itself.
    """
    if hasattr(loss.function, "gradient"):
        return loss.function.gradient(accelerator, outputs)
    wanted = loss.wanted()
    own = {key: at_least_float32(each.detach()) for key, each in outputs.items() if wanted is None or key in wanted}
    leaves = {key: value.requires_grad_() for key, value in own.items() if value.is_floating_point()}
    with ieee_float32():
        terms = loss({key: value if key in SCALARS else spliced(accelerator, value) for key, value in own.items()})
        inputs = [*leaves.values(), *loss.parameters()]
        gradients = torch.autograd.grad(total(terms), inputs, allow_unused=True, materialize_grads=True)
    by_output = dict(zip(leaves, gradients, strict=False))
    return LossGradient(
        terms={key: value.detach() for key, value in terms.items()},
        by_row={key: slope for key, slope in by_output.items() if key not in SCALARS},
        by_scalar={key: slope for key, slope in by_output.items() if key in SCALARS},
        by_parameter=list(gradients[len(leaves) :]),
    )


def warn_of_dense_logits(loss: Loss, num_pairs: int, width: int) -> None:
    """Say what a loss that takes the generic path will cost with `num_pairs` pairs of features [D = width], if much."""
    held = LOGITS_HELD * 4 * num_pairs**2
    if hasattr(loss.function, "gradient") or held < MUCH_MEMORY:
        return
    say(
        f"warning: the loss '{loss.name}' holds all {num_pairs} x {num_pairs} logits on every process: about "
        f"{held / 2**30:.1f} GiB and {12 * num_pairs**2 * width:.1e} operations a step, however many processes there "
        "are; give it a method gradient(accelerator, outputs), as clip and siglip have"
    )


def gradient_of_share(accelerator: Accelerator, share: Share) -> LossGradient:
    """Return a process's share of a contrastive loss as a gradient: what adds up over processes becomes an average."""
    number = accelerator.num_processes
    return LossGradient(
        terms={"contrastive_loss": number * share.loss},
        by_row={"image_features": share.by_image_features, "text_features": share.by_text_features},
        by_scalar={"logit_scale": number * share.by_logit_scale, "logit_bias": number * share.by_logit_bias},
        by_parameter=[],
    )


def rows_surrogate(num_processes: int, rows: Tensor, outputs: dict[str, Tensor], slopes: dict[str, Tensor]) -> Tensor:
    """Return a scalar whose gradient, averaged over processes as DDP does, is that of the loss by these outputs.

    outputs: what the model returned for `rows`, int64 [n]; slopes: the gradient by all rows of this process.
    No other process holds any of it, so it is multiplied by what the average divides by.
    """
    products = [
        (outputs[name].to(slope.dtype) * slope[rows]).sum() for name, slope in slopes.items() if name in outputs
    ]
    return num_processes * torch.stack(products).sum()


def scalars_surrogate(loss: Loss, outputs: dict[str, Tensor], gradient: LossGradient) -> Tensor:
    """Return a scalar with the gradient by the logit scale and bias and by the loss's own parameters.

    They already are what their average over processes is.
    """
    scalars = [(outputs[name] * slope).sum() for name, slope in gradient.by_scalar.items() if name in outputs]
    own = [(each * slope).sum() for each, slope in zip(loss.parameters(), gradient.by_parameter, strict=True)]
    nothing = next(iter(outputs.values())).new_zeros(())  # a loss may take features alone
    return torch.stack([nothing, *scalars, *own]).sum()


def spliced(accelerator: Accelerator, rows: Tensor) -> Tensor:
    """Return the rows of all processes in the order of the processes, differentiable by this process's own."""
    if accelerator.num_processes == 1:
        return rows
    gathered = accelerator.gather(rows.detach())
    start = accelerator.process_index * len(rows)
    return torch.cat([gathered[:start], rows, gathered[start + len(rows) :]])
