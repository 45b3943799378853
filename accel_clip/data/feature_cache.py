"""Features of a frozen tower on disk: computed once, then read in place of every later forward pass.

A cache folder (`cache_folder.py`) whose data is `features.npy`, float32 [n, D].
"""

from __future__ import annotations

from pathlib import Path

import numpy
import torch
from torch import Tensor

from accel_clip.data.cache_folder import CacheFolder, CacheWriter, load_array
from accel_clip.run_folder import FEATURES


class FeatureCache(CacheFolder):
    """Features by the hash of a caption or of a picture's key."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.features = load_array(folder / "features.npy", numpy.float32, 2)
        if len(self.keys) != len(self.features):
            raise ValueError(f"{len(self.keys)} keys and {len(self.features)} rows")

    def __getitem__(self, key: int) -> Tensor:
        """Return the features of an item, float32 [D]; raises `UnusableSample` as its first decoding did."""
        return torch.from_numpy(numpy.array(self.features[self.row(key)]))


class FeatureWriter(CacheWriter):
    """Writes features row by row."""

    def __init__(self, folder: Path, num_rows: int, width: int) -> None:
        super().__init__(folder, "features.npy", FEATURES)
        header = {"descr": "<f4", "fortran_order": False, "shape": (num_rows, width)}
        with self.storage_errors():
            numpy.lib.format.write_array_header_1_0(self.file, header)

    def append(self, rows: Tensor) -> None:
        """Write the next rows, [m, D]."""
        self.write(rows.cpu().numpy().astype("<f4", copy=False))
