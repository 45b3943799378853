"""Features of a frozen tower on disk: computed once, then read in place of every later forward pass.

A cache is a folder: `features.npy`, float32 [n, D]; `keys.npy`, int64 [n], ascending; and `about.json` with the
fingerprint of what the features were computed from and the items that could not be used. Pictures stand under the hash
of their key, captions under that of their text, so equal ones stand there once. It is written beside its place and
moved there when it is whole: one that was cut off is never read.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy
import torch
from torch import Tensor

from accel_clip.data.bad_samples import UnusableSample
from accel_clip.faults import DataError, StorageError
from accel_clip.run_folder import write_json

Fingerprint = dict[str, str | int | float]


class FeatureCache:
    """Features by key, read from disk; a copy in another process maps the same memory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
        self.fingerprint: Fingerprint = about["fingerprint"]
        self.unusable = {int(key): tuple(problem) for key, problem in about["unusable"].items()}
        self.keys = numpy.load(folder / "keys.npy", mmap_mode="r")
        self.features = numpy.load(folder / "features.npy", mmap_mode="r")
        if len(self.keys) != len(self.features):
            raise ValueError(f"{len(self.keys)} keys and {len(self.features)} rows")

    def __len__(self) -> int:
        return len(self.keys)

    def __reduce__(self) -> tuple[type[FeatureCache], tuple[Path]]:
        return FeatureCache, (self.folder,)  # arrays would be copied

    def __getitem__(self, key: int) -> Tensor:
        """Return the features of an item, float32 [D]; raises `UnusableSample` as its first decoding did."""
        if key in self.unusable:
            raise UnusableSample(*self.unusable[key])
        row = int(numpy.searchsorted(self.keys, key))
        if row == len(self.keys) or self.keys[row] != key:
            raise DataError(
                f"{self.folder} lacks a picture or caption of data.train, which has changed since: remove this folder"
            )
        return torch.from_numpy(numpy.array(self.features[row]))


class FeatureWriter:
    """Writes a cache row by row; nothing stands in its place before `finish`. Raises `StorageError`."""

    def __init__(self, folder: Path, num_rows: int, width: int) -> None:
        self.folder = folder
        self.partial = folder.with_name(folder.name + ".partial")
        with storage_errors(folder):
            shutil.rmtree(self.partial, ignore_errors=True)
            self.partial.mkdir(parents=True)
            self.file = (self.partial / "features.npy").open("wb")
            header = {"descr": "<f4", "fortran_order": False, "shape": (num_rows, width)}
            numpy.lib.format.write_array_header_1_0(self.file, header)

    def append(self, rows: Tensor) -> None:
        """Write the next rows, [m, D]."""
        with storage_errors(self.folder):
            self.file.write(rows.cpu().numpy().astype("<f4", copy=False).tobytes())

    def finish(self, keys: numpy.ndarray, fingerprint: Fingerprint, unusable: Mapping[int, UnusableSample]) -> None:
        """Add the keys, int64 [n], and what the features are of, and move the cache to its place."""
        about = {"fingerprint": fingerprint, "unusable": {str(key): each.args for key, each in unusable.items()}}
        with storage_errors(self.folder):
            self.file.flush()
            os.fsync(self.file.fileno())
            self.file.close()
            numpy.save(self.partial / "keys.npy", keys)
            write_json(self.partial / "about.json", about)
            shutil.rmtree(self.folder, ignore_errors=True)
            self.partial.rename(self.folder)


def what_changed(folder: Path, fingerprint: Fingerprint) -> list[str] | None:
    """Return what a cache was computed from that is different now: [] when it can be used, None without a whole one."""
    try:
        stored = FeatureCache(folder).fingerprint
    except (OSError, ValueError, KeyError, TypeError):  # whatever a broken folder makes of the readers
        return None
    return [name for name in fingerprint if stored.get(name) != fingerprint[name]]


@contextmanager
def storage_errors(folder: Path) -> Iterator[None]:
    """Turn errors of the file system into `StorageError`."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"{folder}: features cannot be written: {error}") from error
