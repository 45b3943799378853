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

from accel_clip.data.caches.folder import CacheFolder, CacheWriter
from accel_clip.files.kinds import PICTURES

MOST_SIDE = 2**20  # of a picture's three, whose product then fits into 64 bits


class PictureCache(CacheFolder):
    """Pixels by the hash of a picture's key."""

    dimensions_of_places = 2

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        file = folder / "pixels.bin"
        self.num_bytes = file.stat().st_size
        if self.places.shape[1] != 4 or self.places.min(initial=0) < 0 or self.places[:, 1:].max(initial=0) > MOST_SIDE:
            raise ValueError("places.npy does not say where pictures stand")
        begins, sizes = self.places[:, 0], self.places[:, 1:].prod(1)
        in_order = numpy.lexsort((sizes, begins))
        if (begins[in_order] != numpy.cumsum(sizes[in_order]) - sizes[in_order]).any():
            raise ValueError("places.npy has gaps")
        if self.num_bytes != sizes.sum():
            raise ValueError(f"pictures of {sizes.sum()} bytes and {self.num_bytes} bytes")
        empty = numpy.empty(0, numpy.uint8)  # which cannot be mapped
        self.pixels = numpy.memmap(file, numpy.uint8, mode="r") if self.num_bytes else empty

    def bytes_of(self, rows: numpy.ndarray | slice) -> int:
        """Return how many bytes some pictures take, by their number."""
        return int(self.places[rows, 1:].prod(1).sum())

    def __getitem__(self, key: int) -> Tensor:
        """Return a picture's pixels, uint8 of three dimensions; raises `UnusableSample` as its first decoding did."""
        return self.picture(self.row(key))

    def picture(self, row: int) -> Tensor:
        """Return the pixels of a picture by its number."""
        begin, *shape = self.places[row].tolist()
        return torch.from_numpy(numpy.array(self.pixels[begin : begin + math.prod(shape)]).reshape(shape))


class PictureWriter(CacheWriter):
    """Writes pictures one after the other."""

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
        """Return where the pictures stand that were written, int64 [n, 4]."""
        return numpy.array(self.places, numpy.int64).reshape(-1, 4)
