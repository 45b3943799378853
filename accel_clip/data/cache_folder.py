"""A folder with what is computed once for every different picture or caption, and what it was computed from.

It holds `keys.npy`, int64 [n], ascending: the hashes of pictures' keys or of captions, so equal ones stand there once;
`about.json` with the fingerprint of what all was computed from and the items that could not be used; and the data. It
is written beside its place and moved there when it is whole: one that was cut off is never read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import numpy

from accel_clip.data.bad_samples import UnusableSample
from accel_clip.faults import DataError, StorageError
from accel_clip.files.marked import Draft
from accel_clip.run_folder import write_json

if TYPE_CHECKING:
    from typing_extensions import Self

Fingerprint = dict[str, str | int | float]


class CacheFolder:
    """What is known by key, read from disk; a copy in another process maps the same memory.

    A broken folder raises OSError, ValueError, KeyError or TypeError.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
        self.fingerprint: Fingerprint = about["fingerprint"]
        self.unusable = {int(key): tuple(problem) for key, problem in about["unusable"].items()}
        self.keys = numpy.load(folder / "keys.npy", mmap_mode="r")

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
    def what_changed(cls, folder: Path, fingerprint: Fingerprint) -> list[str] | None:
        """Return what a folder was computed from that is different now: [] when it can be used, None if not whole."""
        try:
            stored = cls(folder).fingerprint
        except (OSError, ValueError, KeyError, TypeError):  # whatever a broken folder makes of the readers
            return None
        return [name for name in fingerprint if stored.get(name) != fingerprint[name]]


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
        """Add the keys, int64 [n], what the data is of and further arrays by name, and move all to its place."""
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
