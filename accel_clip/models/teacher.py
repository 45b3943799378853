"""A teacher: a trained model that runs without gradient beside the one that is trained, on the same batches."""

from __future__ import annotations

from collections.abc import Callable

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import functional

from accel_clip.config import ModelConfig
from accel_clip.faults import AccelClipError, ConfigError
from accel_clip.models.build import ClipModel, build_model, has_weights
from accel_clip.models.towers import (
    can_trim,
    encode_image,
    encode_text,
    end_token,
    text_chunks,
    trimmed,
    unique_captions,
)
from accel_clip.process.transfer import to_device
from accel_clip.randomness import seeded

Tokenizer = Callable[[list[str]], Tensor]
SETTING = "loss.options.teachers"
MOST_ROWS = {"cpu": 64}  # that go through a tower at once: without a graph, more save no time there
MOST_ROWS_ON_A_DEVICE = 512  # fewer are done before the next ones have been started
PROBES = ("a", "A Photo, of 2 Birds!", "a photo of a bird on a branch", "一只青蛙", "été: №7")
"""Captions that tokenizers of different models cut differently, and that fit into a short context."""


class Teacher:
    """A frozen model with its own size, mean and standard deviation of pictures; features are unit-norm float32.

    logit_scale: what it was trained to, after exp.
    """

    def __init__(self, model: ClipModel, accelerator: Accelerator) -> None:
        self.model, self.autocast = model, accelerator.autocast
        self.clip = model.clip.requires_grad_(False).eval()
        self.trims = can_trim(self.clip, model.tokenizer)
        self.end = end_token(self.clip)
        self.clip.to(accelerator.device)
        self.most_rows = MOST_ROWS.get(accelerator.device.type, MOST_ROWS_ON_A_DEVICE)
        self.logit_scale = float(self.clip.logit_scale.exp().item())
        self.size = model.picture_size
        self.mean, self.std = (
            torch.tensor(model.preprocess_config[key], device=accelerator.device).view(1, 3, 1, 1)
            for key in ("mean", "std")
        )

    def reads_tokens_of(self, tokenizer: Tokenizer) -> bool:
        """Return whether captions may come as another tokenizer's tokens: the teacher's own, or the first of them.

        A tower that ignores what follows the end token does not miss the places that a shorter context lacks.
        """
        given, own = tokenizer(list(PROBES)), self.model.tokenizer(list(PROBES))
        num_places = given.shape[1]
        suits = num_places == own.shape[1] or (self.trims and num_places < own.shape[1])
        return suits and torch.equal(given, own[:, :num_places])

    @torch.no_grad()
    def image_features(self, image: Tensor, device: torch.device) -> Tensor:
        """Return features [b, D] on the device of pictures of any size, uint8 [b, 3, H, W]."""
        parts = []
        for rows in image.split(self.most_rows):
            pixels = self.pixels(to_device(rows, device))
            with self.autocast():
                parts.append(encode_image(self.clip, pixels).float())
        return torch.cat(parts)

    @torch.no_grad()
    def text_features(self, tokens: Tensor, device: torch.device) -> Tensor:
        """Return features [b, D] on the device of captions, int [b, L] on the CPU; equal captions are encoded once."""
        captions, caption_of_pair = unique_captions(tokens)
        chunks = list(torch.arange(len(captions)).split(self.most_rows))
        if self.trims:
            chunks = text_chunks(captions, self.most_rows, self.end)
        parts = []
        for rows in chunks:
            given = trimmed(captions[rows], self.end) if self.trims else captions[rows]
            with self.autocast():
                parts.append(encode_text(self.clip, to_device(given, device)).float())
        place = torch.cat(chunks).argsort()
        return torch.cat(parts)[to_device(place[caption_of_pair], device)]

    def pixels(self, image: Tensor) -> Tensor:
        """Return pictures at the teacher's size, with its mean and standard deviation, float32."""
        pixels = image.float()
        if pixels.shape[-2:] != self.size:
            resized = functional.interpolate(pixels, self.size, mode="bicubic", antialias=True)
            pixels = resized.clamp(0, 255)  # bicubic overshoots at edges
        return (pixels / 255 - self.mean) / self.std


def build_teacher(config: ModelConfig, tokenizer: Tokenizer, accelerator: Accelerator) -> Teacher:
    """Return a teacher on its device; `tokenizer` is the student's, whose tokens it will be given.

    Raises `ConfigError` for a model without weights, or one that was trained on other tokens.
    """
    if not has_weights(config):
        raise ConfigError(f"{SETTING}: '{config.name}' has random weights to teach from: name its 'pretrained'")
    try:
        with seeded(0):
            teacher = Teacher(build_model(config), accelerator)
    except AccelClipError as error:
        raise type(error)(f"{SETTING}: {error}") from error
    if not teacher.reads_tokens_of(tokenizer):
        raise ConfigError(
            f"{SETTING}: '{config.name}' has another tokenizer or a shorter context than the model that is trained: "
            "store its features with the data and name them by loss.options.image_columns and text_columns"
        )
    return teacher
