"""What tells whether a picture is still the one that it was, beside its key: the size and the time of its file."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy
import xxhash
from PIL.Image import Image

from accel_clip.data.bad_samples import UnusableSample
from accel_clip.data.sources.base import Source
from accel_clip.data.sources.combine import origin

NO_FILE = 0
"""the stamp of a picture that no file holds: its key tells it apart, or nothing is known of it"""


@runtime_checkable
class HasStamp(Protocol):
    """A source that knows how to tell whether a picture with one key has changed, without loading it."""

    def stamp(self, index: int) -> int:
        """Return a number below 2 ** 64 that changes when the picture does; raises `UnusableSample`."""
        ...


def stamps_of(source: Source, samples: Iterable[int]) -> numpy.ndarray:
    """Return the stamps of the pictures of some samples, uint64 [n]; 0 where nothing tells a change.

    A source without stamps is asked for its pairs, which is cheap where their pictures are paths or bytes; one that
    makes pictures is not asked again.
    """
    return numpy.fromiter(each_stamp(source, samples), numpy.uint64)


def each_stamp(source: Source, samples: Iterable[int]) -> Iterator[int]:
    """Yield the stamps of pictures one by one."""
    makes_pictures: set[int] = set()
    for sample in samples:
        part, index = origin(source, int(sample))
        try:
            if isinstance(part, HasStamp):
                yield part.stamp(index)
                continue
            image = None if id(part) in makes_pictures else part[index].image
        except UnusableSample:
            yield NO_FILE
            continue
        if isinstance(image, Image):
            makes_pictures.add(id(part))
        yield stamp_of(image)


def stamp_of(image: Image | bytes | Path | None) -> int:
    """Return the stamp of a picture as it is stored."""
    if isinstance(image, Path):
        return file_stamp(image)
    return xxhash.xxh3_64_intdigest(image) if isinstance(image, bytes) else NO_FILE


def file_stamp(file: str | Path) -> int:
    """Return a number that changes with the size and the time of a file; that of no file where there is none."""
    try:
        status = os.stat(file)
    except (OSError, ValueError):  # ValueError: a null character
        return NO_FILE
    return numbers_stamp(status.st_size, status.st_mtime_ns)


def numbers_stamp(*numbers: int) -> int:
    """Return one number below 2 ** 64 for several."""
    return xxhash.xxh3_64_intdigest(repr(numbers).encode())
