"""What stands in for a part of a run where a test wants it to fail, or to do harm."""

from __future__ import annotations

import math
from pathlib import Path

import torch


class NoNumberAtFifth:
    """A loss that is no number in its fifth training step; before the first it is called once, for a trial."""

    def __init__(self) -> None:
        self.number = -1

    def __call__(self, image_features: torch.Tensor, text_features: torch.Tensor) -> torch.Tensor:
        self.number += image_features.requires_grad
        loss = -(image_features * text_features).sum(dim=-1).mean()
        return loss * math.nan if self.number == 4 else loss


class Payload:
    """What writes a file when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple:
        return open, (str(self.canary), "w")
