"""A folder with what is computed once for every different picture or caption, and what it was computed from.

It holds `keys.npy`, int64 [n], ascending: the hashes of pictures' keys or of captions, so equal ones stand there once;
`stamps.npy`, uint64 [n]: what each was computed from beside its key; `places.npy`: where its part of the data begins;
`about.json` with the fingerprint of how all was computed and the items that could not be used; and the data, in any
order. It is written beside its place and moved there when it is whole: one that was cut off is never read.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import numpy

from accel_clip.data.bad_samples import REASONS, UnusableSample
from accel_clip.faults import DataError, StorageError
from accel_clip.files.json import write_json
from accel_clip.files.marked import Draft
from accel_clip.typed_json import WrongContent, read_json

if TYPE_CHECKING:
    from typing_extensions import Self

Fingerprint = dict[str, str | int | float]


@dataclass(frozen=True)
class CacheDescription:
    """What a folder was computed from, and the items that could not be used."""

    fingerprint: Fingerprint
    """of how all was computed"""
    unusable: dict[str, tuple[str, str, str | None]]
    """reason, detail and path by key"""


class CacheFolder:
    """What is known by key, read from disk; a copy in another process maps the same memory.

    A broken folder raises OSError, ValueError or `WrongContent`.
    """

    dimensions_of_places = 1
    """of `places.npy`: one number for each key, or several"""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        about: CacheDescription = read_json(folder / "about.json", CacheDescription)
        self.fingerprint = about.fingerprint
        self.unusable = {int(key): problem for key, problem in about.unusable.items()}
        if not {reason for reason, _, _ in self.unusable.values()} <= set(REASONS):
            raise ValueError("about.json gives a reason that there is not")
        self.keys = load_array(folder / "keys.npy", numpy.int64, 1)
        if (numpy.diff(self.keys) <= 0).any():
            raise ValueError("keys are not in ascending order")
        self.stamps = load_array(folder / "stamps.npy", numpy.uint64, 1)
        self.places = load_array(folder / "places.npy", numpy.int64, self.dimensions_of_places)
        if not 0 < len(self.keys) == len(self.stamps) == len(self.places):
            raise ValueError(f"{len(self.keys)} keys, {len(self.stamps)} stamps and {len(self.places)} places")

    def __len__(self) -> int:
        return len(self.keys)

    def __reduce__(self) -> tuple[type[Self], tuple[Path]]:
        return type(self), (self.folder,)  # arrays would be copied

    def row(self, key: int) -> int:
        """Return where an item stands among the keys; raises `UnusableSample` as its first decoding did."""
        if key in self.unusable:
            raise UnusableSample(*self.unusable[key])
        row = int(numpy.searchsorted(self.keys, key))
        if row == len(self.keys) or self.keys[row] != key:
            raise DataError(
                f"{self.folder} lacks a picture or caption of data.train, which has changed since: remove this folder"
            )
        return row

    @classmethod
    def if_whole(cls, folder: Path) -> Self | None:
        """Return what a folder holds, None where that is not whole."""
        try:
            return cls(folder)
        except (OSError, ValueError, WrongContent):  # whatever a broken folder makes of the readers
            return None

    def what_changed(self, fingerprint: Fingerprint) -> list[str]:
        """Return what the data was computed with that is different now."""
        return [name for name in fingerprint if self.fingerprint.get(name) != fingerprint[name]]

    def rows(self, keys: numpy.ndarray, stamps: numpy.ndarray) -> numpy.ndarray:
        """Return where items that are as they were stand, int64 [m]; -1 for new, changed and unusable ones."""
        rows = numpy.searchsorted(self.keys, keys).clip(max=len(self.keys) - 1)
        are_same = (self.keys[rows] == keys) & (self.stamps[rows] == stamps)
        return numpy.where(are_same & ~numpy.isin(keys, list(self.unusable)), rows, -1)


def load_array(file: Path, kind: type[numpy.generic], num_dimensions: int) -> numpy.ndarray:
    """Return an array that is mapped into memory; raises OSError, and ValueError for another kind or shape."""
    array: numpy.ndarray = numpy.load(file, mmap_mode="r")
    if array.dtype != kind or array.ndim != num_dimensions:
        raise ValueError(f"{file.name} holds {array.dtype} in {array.ndim} dimensions")
    return array


class CacheWriter:
    """Writes a folder, its data piece by piece; nothing stands in its place before `finish`. Raises `StorageError`.

    file_name: that of the data; kind: what the folder is, for its mark and for errors. As a context it removes what was
    not finished.
    """

    def __init__(self, folder: Path, file_name: str, kind: str) -> None:
        self.folder, self.kind = folder, kind
        with self.storage_errors():
            self.draft = Draft(folder, kind)
            self.file = (self.draft.path / file_name).open("wb")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with suppress(OSError):  # what it could not write any more is thrown away
            self.file.close()
        self.draft.discard()

    def write(self, values: numpy.ndarray) -> None:
        """Write the next values of the data."""
        with self.storage_errors():
            self.file.write(values.tobytes())

    def finish(
        self,
        keys: numpy.ndarray,
        fingerprint: Fingerprint,
        unusable: Mapping[int, UnusableSample],
        **arrays: numpy.ndarray,
    ) -> None:
        """Add the keys, int64 [n], what the data is of and the other arrays by name, and move all to its place."""
        about = {"fingerprint": fingerprint, "unusable": {str(key): each.args for key, each in unusable.items()}}
        with self.storage_errors():
            self.file.flush()
            os.fsync(self.file.fileno())
            self.file.close()
            for name, array in {"keys": keys, **arrays}.items():
                numpy.save(self.draft.path / f"{name}.npy", array)
            write_json(self.draft.path / "about.json", about)
            self.draft.publish()

    @contextmanager
    def storage_errors(self) -> Iterator[None]:
        """Turn errors of the file system into `StorageError`."""
        try:
            yield
        except OSError as error:
            raise StorageError(f"{self.folder}: {self.kind} cannot be written: {error}") from error
