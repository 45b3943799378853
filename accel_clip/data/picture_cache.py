"""Decoded pictures on disk, mapped into memory: what training needs of them before it draws a part, uint8 pixels.

A cache folder (`cache_folder.py`) whose data is `pixels.bin`, all values one after the other. `places.npy`, int64
[n, 4], says by key where a picture's values begin and what shape, three numbers, they have; an unusable one has none.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy
import torch
from torch import Tensor

from accel_clip.data.cache_folder import CacheFolder, CacheWriter, load_array
from accel_clip.run_folder import PICTURES

MOST_SIDE = 2**20  # of a picture's three, whose product then fits into 64 bits


class PictureCache(CacheFolder):
    """Pixels by the hash of a picture's key."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        file = folder / "pixels.bin"
        self.num_bytes = file.stat().st_size
        self.places = load_array(folder / "places.npy", numpy.int64, 2)
        if self.places.shape[1] != 4 or self.places.min(initial=0) < 0 or self.places[:, 1:].max(initial=0) > MOST_SIDE:
            raise ValueError("places.npy does not say where pictures stand")
        sizes = self.places[:, 1:].prod(1)
        if (self.places[:, 0] != numpy.cumsum(sizes) - sizes).any():
            raise ValueError("places.npy has gaps")
        if len(self.keys) != len(self.places) or self.num_bytes != sizes.sum():
            raise ValueError(f"{len(self.keys)} keys, {len(self.places)} places and {self.num_bytes} bytes")
        empty = numpy.empty(0, numpy.uint8)  # which cannot be mapped
        self.pixels = numpy.memmap(file, numpy.uint8, mode="r") if self.num_bytes else empty

    def __getitem__(self, key: int) -> Tensor:
        """Return a picture's pixels, uint8 of three dimensions; raises `UnusableSample` as its first decoding did."""
        begin, *shape = self.places[self.row(key)].tolist()
        return torch.from_numpy(numpy.array(self.pixels[begin : begin + math.prod(shape)]).reshape(shape))


class PictureWriter(CacheWriter):
    """Writes pictures in the order of their keys."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, "pixels.bin", PICTURES)
        self.num_bytes = 0
        self.places: list[tuple[int, ...]] = []

    def append(self, pixels: Tensor, shapes: list[tuple[int, ...]]) -> None:
        """Write the next pictures: the values of all, uint8 [m], and the shape of each, zeros for an unusable one."""
        for shape in shapes:
            self.places.append((self.num_bytes, *shape))
            self.num_bytes += math.prod(shape)
        self.write(pixels.numpy())

    def array_of_places(self) -> numpy.ndarray:
        """Return where all pictures stand, int64 [n, 4]."""
        return numpy.array(self.places, numpy.int64).reshape(-1, 4)
