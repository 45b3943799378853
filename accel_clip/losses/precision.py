"""In which precision a loss multiplies: float32 as IEEE says, or wider."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


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
