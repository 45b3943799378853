"""Features of a frozen tower on disk: computed once, then read in place of every later forward pass.

A cache folder (`cache_folder.py`) whose data is `features.npy`, float32 [n, D]; `places.npy`, int64 [n], says by key
which row is whose.
"""

from __future__ import annotations

from pathlib import Path

import numpy
import torch
from torch import Tensor

from accel_clip.data.caches.folder import CacheFolder, CacheWriter, load_array
from accel_clip.files.kinds import FEATURES

ROWS_AT_ONCE = 4096


class FeatureCache(CacheFolder):
    """Features by the hash of a caption or of a picture's key."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.features = load_array(folder / "features.npy", numpy.float32, 2)
        if self.places.min() < 0 or self.places.max() >= len(self.features):
            raise ValueError(f"places beyond {len(self.features)} rows")

    def __getitem__(self, key: int) -> Tensor:
        """Return the features of an item, float32 [D]; raises `UnusableSample` as its first decoding did."""
        return torch.from_numpy(numpy.array(self.features[self.places[self.row(key)]]))


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

    def append_from(self, old: FeatureCache, rows: numpy.ndarray) -> None:
        """Write the features of some keys of another cache, by their number, int64 [k]."""
        for start in range(0, len(rows), ROWS_AT_ONCE):
            self.write(old.features[old.places[rows[start : start + ROWS_AT_ONCE]]])
