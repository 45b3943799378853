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

Box = tuple[int, int, int, int]
"""left, upper, right and lower edge of a part of a picture, in pixels"""

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
        area = width * height * between_numbers(*TRAINING_CROP_SCALE, generator.random())
        ratio = math.exp(between_numbers(math.log(narrowest), math.log(widest), generator.random()))
        part_width, part_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < part_width <= width and 0 < part_height <= height:
            left = int(generator.random() * (width - part_width + 1))
            upper = int(generator.random() * (height - part_height + 1))
            return left, upper, left + part_width, upper + part_height
    part_width, part_height = min(width, round(height * widest)), min(height, round(width / narrowest))
    left, upper = (width - part_width) // 2, (height - part_height) // 2
    return left, upper, left + part_width, upper + part_height


def smallest_box(width: int, height: int) -> tuple[int, int]:
    """Return the least width and the least height that a box of `random_box` can have, each for itself."""
    narrowest, widest = TRAINING_CROP_RATIO
    return least(width, height, narrowest, widest), least(height, width, 1 / widest, 1 / narrowest)


def least(side: int, other: int, narrowest: float, widest: float) -> int:
    """Return the least length of a box along one side of a picture; ratios are of this side to the other.

    A box that is drawn has at least the least area: times the narrowest ratio it is the square of the box's side, and
    divided by the picture's other side, which limits the box's, it is the box's side too. The box that is taken
    otherwise is as long as the picture or as its ratio to the other side allows.
    """
    area = side * other * TRAINING_CROP_SCALE[0]
    return min(side, round(other * widest), round(max(math.sqrt(area * narrowest), area / (other + 0.5))))


def training_scale(size: tuple[int, int], width: int, height: int, spare: float) -> int:
    """Return 8, 4, 2 or 1: the most by which a picture's sides can be divided with pixels left for every box.

    size: width and height that a box is resized to; spare: how many times as many it has at least, in each direction.
    """
    for scale in (8, 4, 2):
        box = smallest_box(math.ceil(width / scale), math.ceil(height / scale))
        if box[0] >= spare * size[0] and box[1] >= spare * size[1]:
            return scale
    return 1


def between_numbers(low: float, high: float, share: float) -> float:
    """Return the number that lies a share of the way from one to another."""
    return low + share * (high - low)


def pixels_of(picture: Image) -> Tensor:
    """Return a picture's pixels, uint8 [h, w, 3]."""
    return torch.from_numpy(numpy.array(picture))


def cropped(pixels: Tensor, box: Box) -> Tensor:
    """Return a part of a picture's pixels, [h, w, 3]."""
    left, upper, right, lower = box
    return pixels[upper:lower, left:right].contiguous()


def resized(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """Return pixels, uint8 [h, w, 3], at `size` (width, height) as uint8 [3, H, W]: as Pillow resizes by `BICUBIC`.

    torch's kernel takes half the time of Pillow's, and its result differs by rounding.
    """
    pixels = pixels.permute(2, 0, 1)[None]
    return interpolate(pixels, size[::-1], mode="bicubic", antialias=True, align_corners=False)[0]
