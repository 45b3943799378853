"""What a retrieval shows beside its numbers: the nearest pictures of a few captions, and how alike features are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy
from torch import Tensor

from accel_clip.data.pictures.decode import decode_picture
from accel_clip.evaluation.picture_grid import GridRow, retrieval_grid
from accel_clip.evaluation.retrieval import NearestPictures
from accel_clip.evaluation.validation import HeldOutPairs


@dataclass(frozen=True)
class RetrievalExamples:
    """What a retrieval found for a few captions."""

    pairs: HeldOutPairs
    """the usable ones, which `nearest` counts in"""
    nearest: list[NearestPictures]
    """a caption each, from top to bottom"""
    mean_cosines: dict[str, float]
    """mean cosine between the features of pictures, and between those of captions"""
    max_pixels: float
    """largest picture that is decoded, in pixels"""

    def picture_grid(self) -> numpy.ndarray:
        """Return the nearest pictures of the captions, uint8 [H, W, 3]; no collective: call it where it is shown."""
        return numpy.asarray(retrieval_grid([self.grid_row(each) for each in self.nearest]))

    def grid_row(self, example: NearestPictures) -> GridRow:
        """Return a caption with its nearest pictures, decoded again."""
        stored = [self.pairs.source[self.pairs.indices[image]].image for image in example.images]
        pictures = [decode_picture(image, self.max_pixels) for image in stored]
        return GridRow(self.pairs.captions[example.text], pictures, list(example.own))


def mean_cosine(features: Tensor) -> float:
    """Return the mean cosine between unit-norm features [N, D], each with itself included; near 1 all are alike."""
    return float(features.float().mean(0).square().sum())
