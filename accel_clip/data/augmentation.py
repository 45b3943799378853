"""What training does to a decoded picture: from PIL to uint8 pixels at the model's size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL.Image import Image
from torch import Tensor
from torchvision.transforms import Compose, Normalize, PILToTensor


def evaluation_pixels(preprocess_config: dict[str, Any]) -> Callable[[Image], Tensor]:
    """Return open_clip's evaluation transform up to 8-bit pixels: uint8 [3, H, W], the same for a picture every time.

    Normalised on the device they are what evaluation and an exported model see of the picture.
    """
    *geometry, _, normalize = image_transform_v2(PreprocessCfg(**preprocess_config), is_train=False).transforms
    assert isinstance(normalize, Normalize)
    return Compose([*geometry, PILToTensor()])
