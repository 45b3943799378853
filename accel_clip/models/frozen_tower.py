"""A tower that is not trained, run alone as the training step runs it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import Tensor

from accel_clip.faults import ConfigError
from accel_clip.models.anatomy import Anatomy
from accel_clip.models.build import ClipModel
from accel_clip.models.data_parallel import DataParallel
from accel_clip.models.names import matches
from accel_clip.models.towers import length_groups, text_chunks

COST_OF_A_GROUP = 256  # tokens: what a group of captions of one length costs beside its own


@dataclass(frozen=True)
class FrozenTower:
    """A tower that is not trained, and everything that its features depend on."""

    side: str
    """image or text"""
    parallel: DataParallel
    """the wrapped model, called as the step calls it"""
    model: ClipModel
    """the same model, with its tokenizer and what its export says"""
    anatomy: Anatomy
    """what may be done with its towers"""
    rows: int
    """the most that go through at once"""

    def __post_init__(self) -> None:
        if self.side not in self.anatomy.frozen:
            raise ConfigError(
                f"train.cache_features: the {self.side} tower of this model cannot be run alone: leave it away"
            )

    @property
    def accelerator(self) -> Accelerator:
        """Return the accelerator that has wrapped the model."""
        return self.parallel.accelerator

    def encode(self, inputs: Tensor) -> Tensor:
        """Return unit-norm features [b, D] of uint8 pictures [b, 3, H, W] or of tokens [b, L], as in training."""
        if self.side == "image":
            return self.forward(inputs)
        if not self.anatomy.trims:
            return self.forward([inputs])
        [rows] = text_chunks(inputs, len(inputs), self.anatomy.end)
        features = self.forward(length_groups(inputs[rows], COST_OF_A_GROUP, self.anatomy.end))
        return features[rows.argsort().to(features.device)]

    def forward(self, inputs: Tensor | list[Tensor]) -> Tensor:
        """Return the features that the wrapped model gives, without a graph and without waiting for other processes."""
        given = {self.side: send_to_device(inputs, self.accelerator.device, non_blocking=True)}
        with torch.no_grad():
            return self.parallel.forward(**given)[f"{self.side}_features"].float()

    def fingerprint(self) -> dict[str, str]:
        """Return what tells this tower from another one."""
        weights = hashlib.blake2b(digest_size=16)
        for name, value in sorted(self.model.clip.state_dict().items()):
            if matches(self.side, name):
                weights.update(name.encode())
                weights.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy())
        return {
            "weights": weights.hexdigest(),
            "architecture": json.dumps(self.model.model_config, sort_keys=True, default=str),
            "preprocessing": json.dumps(self.model.preprocess_config, sort_keys=True, default=str),
            "precision": str(self.accelerator.mixed_precision),
        }
