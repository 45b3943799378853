"""What training does to a picture: which part it sees, and from PIL to uint8 pixels at the model's size."""

from __future__ import annotations

import math
from collections.abc import Callable
from random import Random
from typing import Any

import numpy
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL.Image import Image
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms import Compose, Normalize, PILToTensor

from accel_clip.data.decode import Box

TRAINING_CROP_SCALE = (0.9, 1.0)  # share of the picture that is kept; open_clip's default (AugmentationCfg)
TRAINING_CROP_RATIO = (3 / 4, 4 / 3)  # width to height before it becomes a square


def evaluation_pixels(preprocess_config: dict[str, Any]) -> Callable[[Image], Tensor]:
    """Return open_clip's evaluation transform up to 8-bit pixels: uint8 [3, H, W], the same for a picture every time.

    Normalised on the device they are what evaluation and an exported model see of the picture.
    """
    *geometry, _, normalize = image_transform_v2(PreprocessCfg(**preprocess_config), is_train=False).transforms
    assert isinstance(normalize, Normalize)
    return Compose([*geometry, PILToTensor()])


def random_box(generator: Random, width: int, height: int) -> Box:
    """Return the part of a picture that training sees this time: 90 to 100 % of it, of a random shape.

    The distribution is that of torchvision's `RandomResizedCrop`, which needs ten times as long for its tensors of one
    number: shapes that do not fit are drawn again, and after ten attempts the middle is taken, as large as fits.
    """
    narrowest, widest = TRAINING_CROP_RATIO
    for _ in range(10):
        area = width * height * between(*TRAINING_CROP_SCALE, generator.random())
        ratio = math.exp(between(math.log(narrowest), math.log(widest), generator.random()))
        part_width, part_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < part_width <= width and 0 < part_height <= height:
            left = int(generator.random() * (width - part_width + 1))
            upper = int(generator.random() * (height - part_height + 1))
            return left, upper, left + part_width, upper + part_height
    part_width, part_height = min(width, round(height * widest)), min(height, round(width / narrowest))
    left, upper = (width - part_width) // 2, (height - part_height) // 2
    return left, upper, left + part_width, upper + part_height


def between(low: float, high: float, share: float) -> float:
    """Return the number that lies a share of the way from one to another."""
    return low + share * (high - low)


def resized(picture: Image, size: tuple[int, int]) -> Tensor:
    """Return a picture at `size` (width, height), uint8 [3, H, W]: bicubic with antialiasing, as Pillow resizes.

    torch's kernel takes half the time of Pillow's, and its result differs by rounding.
    """
    pixels = torch.from_numpy(numpy.array(picture)).permute(2, 0, 1)
    return interpolate(pixels[None], size[::-1], mode="bicubic", antialias=True, align_corners=False)[0]
