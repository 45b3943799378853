"""The gradient of a loss over the global batch, with respect to what this process's model returned.

1. Gather the outputs of all processes (no gradient crosses processes here).
2. Compute the loss of the whole batch on every process.
3. Differentiate it by this process's own rows, by the scalars, and by the loss's own parameters.

Own rows get their full share of the gradient. Scalars (logit scale and bias) and loss parameters get the whole
gradient, the same on every process. Cost: every process computes all B × B logits, so memory grows with B².
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from accel_clip.losses.base import Loss, total

SCALARS = ("logit_scale", "logit_bias")


@dataclass(frozen=True)
class LossGradient:
    """The terms of the global loss, detached, and the gradient of their sum.

    by_output: for each output of the model, a tensor of its shape; by_parameter: for each of the loss's parameters.
    """

    terms: dict[str, Tensor]
    by_output: dict[str, Tensor]
    by_parameter: list[Tensor]


def global_loss_gradient(accelerator: Accelerator, loss: Loss, outputs: dict[str, Tensor]) -> LossGradient:
    """Return the loss of the batch of all processes and its gradient by `outputs` of this process.

    outputs: features [b, D] and other tensors whose first dimension is this process's pairs, and scalars. Every process
    must bring the same number of pairs.
    """
    own = {key: at_least_float32(value.detach()) for key, value in outputs.items()}
    leaves = {key: value.requires_grad_() for key, value in own.items() if value.is_floating_point()}
    with ieee_float32():
        terms = loss({key: value if key in SCALARS else spliced(accelerator, value) for key, value in own.items()})
        parameters = list(loss.parameters())
        inputs = [*leaves.values(), *parameters]
        gradients = torch.autograd.grad(total(terms), inputs, allow_unused=True, materialize_grads=True)
    return LossGradient(
        terms={key: value.detach() for key, value in terms.items()},
        by_output=dict(zip(leaves, gradients[: len(leaves)], strict=True)),
        by_parameter=list(gradients[len(leaves) :]),
    )


def surrogate(accelerator: Accelerator, loss: Loss, outputs: dict[str, Tensor], gradient: LossGradient) -> Tensor:
    """Return a scalar whose gradient, averaged over processes as DDP does, is that of the global loss.

    Rows carry a share of the gradient, so they are multiplied by the number of processes that DDP divides by; scalars
    and loss parameters carry all of it on every process already.
    """
    summands = []
    for key, slope in gradient.by_output.items():
        if outputs[key].requires_grad:
            factor = 1 if key in SCALARS else accelerator.num_processes
            summands.append(factor * (outputs[key].to(slope.dtype) * slope).sum())
    for parameter, slope in zip(loss.parameters(), gradient.by_parameter, strict=True):
        summands.append((parameter * slope).sum())
    return torch.stack(summands).sum()


def spliced(accelerator: Accelerator, rows: Tensor) -> Tensor:
    """Return the rows of all processes in the order of the processes, differentiable by this process's own."""
    if accelerator.num_processes == 1:
        return rows
    gathered = accelerator.gather(rows.detach())
    start = accelerator.process_index * len(rows)
    return torch.cat([gathered[:start], rows, gathered[start + len(rows) :]])


def at_least_float32(value: Tensor) -> Tensor:
    """Return a floating-point tensor in float32 or wider: logits of bf16 features are too coarse."""
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value


@contextmanager
def ieee_float32() -> Iterator[None]:
    """Multiply float32 exactly as IEEE says inside the block: TF32 keeps ten bits, which a logit scale of 100 shows."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
