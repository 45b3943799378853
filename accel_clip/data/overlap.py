"""How many held-out pairs show a picture that is trained on: what is measured on them says nothing about others.

1. Pictures with one identity are one: the same file, the same bytes in a table, the same member of a shard. It takes
   time to tell, so it is asked for where the last part of the key, which is quick to get, is that of a held-out one.
2. Copies of a file under another name have its size, and then its content. Sizes of a great many are not looked at.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from accel_clip.data.sources.base import Source
from accel_clip.data.sources.combine import HasIdentity, HasKeys, bases, origin
from accel_clip.files.whole import file_hash

MOST_FILES = 1 << 16  # their sizes take a second


def num_shown_in_training(training: Source, held_out: Source) -> int:
    """Return how many pairs of a held-out source show a picture that whole sources of training show too."""
    wanted = [identity_of(held_out, index) for index in range(len(held_out))]
    names = {last_name(held_out.key(index)) for index in range(len(held_out))}
    known: set[str | None] = set()
    for source in bases(training):
        keys = source.keys() if isinstance(source, HasKeys) else map(source.key, range(len(source)))
        known |= {identity_of(source, index) for index, key in enumerate(keys) if last_name(key) in names}
    known |= copies({each for each in wanted if each is not None} - known, training)
    return sum(identity in known for identity in wanted if identity is not None)


def identity_of(source: Source, index: int) -> str | None:
    """Return what all sources call a picture, None for one of a source that shares none."""
    base, inside = origin(source, index)
    return base.identity(inside) if isinstance(base, HasIdentity) else None


def last_name(key: str) -> str:
    """Return what a key has behind its last slash."""
    return key.rpartition("/")[2]


def copies(held_out: set[str], training: Source) -> set[str]:
    """Return those held-out files whose content a file of training has."""
    if len(held_out) > MOST_FILES or len(training) > MOST_FILES:
        return set()
    by_size: dict[int, list[str]] = defaultdict(list)
    for file, size in sizes(held_out):
        by_size[size].append(file)
    trained = (identity_of(training, index) for index in range(len(training)))
    contents = {file_hash(Path(file)) for file, size in sizes({each for each in trained if each}) if size in by_size}
    return {file for files in by_size.values() for file in files if contents and file_hash(Path(file)) in contents}


def sizes(files: set[str]) -> Iterator[tuple[str, int]]:
    """Yield the size of each of some files that is there; identities that are no files have none."""
    for file in files:
        with suppress(OSError, ValueError):
            if os.path.isabs(file) and os.path.isfile(file):
                yield file, os.path.getsize(file)
