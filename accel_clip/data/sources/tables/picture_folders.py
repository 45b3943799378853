"""The folder that the picture names of an annotation file start from, where it lies in one of the usual places."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

from accel_clip import console
from accel_clip.data.sources.base import SourceOptions

NAMES_TO_TRY = 20
MOST_FOLDERS = 200


def folder_of_pictures(file: Path, names: Iterable[str], options: SourceOptions) -> Path:
    """Return the folder near a file in which most of the first of some names are found; its own without any.

    Where `data.image_root` is given it decides, and nothing is looked for.
    """
    tried = [] if options.image_root else list(islice(names, NAMES_TO_TRY))
    folders = list(islice(dict.fromkeys(near(file)), MOST_FOLDERS))
    best = max(folders, key=lambda folder: num_found(folder, tried))  # the first of equals
    if best == file.parent or not num_found(best, tried):
        return file.parent
    console.say(f"{file}: its pictures are read from {best}; data.image_root names another folder")
    return best


def near(file: Path) -> Iterator[Path]:
    """Yield a file's folder, those in it and in them, then the same of the folder above it."""
    for folder in (file.parent, file.absolute().parent.parent):
        yield folder
        inside = folders_in(folder)
        yield from inside
        for each in inside:
            yield from folders_in(each)


def folders_in(folder: Path) -> Sequence[Path]:
    """Return the folders in a folder, none where it cannot be listed."""
    try:
        return sorted(path for path in islice(folder.iterdir(), MOST_FOLDERS) if path.is_dir())
    except OSError:
        return []


def num_found(folder: Path, names: Sequence[str]) -> int:
    """Return how many of some names are files of a folder."""
    return sum((folder / name).is_file() for name in names)
