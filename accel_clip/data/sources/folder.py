"""Folders of pictures: with a metadata table, with `.txt` captions beside them, or with a folder per class."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import pyarrow

from accel_clip import console
from accel_clip.data.bad_samples import UnusableSample
from accel_clip.data.captions import LARGEST_CAPTION_BYTES, caption_too_large
from accel_clip.data.sources.base import Source
from accel_clip.data.sources.columns import Columns
from accel_clip.data.sources.endings import PICTURE_SUFFIXES
from accel_clip.data.sources.table import TableSource, open_table
from accel_clip.data.sources.table_files import READERS
from accel_clip.data.text_files import decode_text, decodes, guess_encoding, require_text_encoding
from accel_clip.faults import DataError

if TYPE_CHECKING:
    from accel_clip.data.sources.resolve import SourceOptions

METADATA_FILES = tuple(f"metadata{suffix}" for suffix in READERS)
PARTS = frozenset({"train", "training", "val", "valid", "validation", "dev", "test"})
CAPTION_FILES_TO_LOOK_AT = 500


class CaptionFiles(TableSource):
    """Pictures whose captions stand in text files, one a line, which are read when they are fetched."""

    def __init__(self, name: str, table: pyarrow.Table, root: Path, limit: Path, encodings: tuple[str, ...]) -> None:
        super().__init__(name, table, Columns("image", ("caption_file",), "label"), root, limit)
        self.encodings = encodings

    def captions(self, index: int) -> tuple[tuple[str, ...], tuple[float, ...]]:
        """Return the lines of a picture's text file that are not empty, all alike; raises `UnusableSample`."""
        written, _ = super().captions(index)
        if not written:
            return (), ()
        try:
            file = self.file(written[0])
            if not file.is_file():  # reading a pipe would wait for ever
                raise UnusableSample("no_caption", f"{written[0]} is no file", written[0])
            if (num_bytes := file.stat().st_size) > LARGEST_CAPTION_BYTES:
                raise caption_too_large(f"the file takes {num_bytes:,} bytes", written[0])
            text = decode_text(file.read_bytes(), self.encodings)
        except OSError as error:
            raise UnusableSample("no_caption", f"{written[0]}: {error.strerror or error}", written[0]) from error
        except UnicodeDecodeError as error:
            detail = f"{error}: name the encoding of captions by data.encoding"
            raise UnusableSample("caption_encoding", detail, written[0]) from error
        return tuple(line.strip() for line in text.splitlines() if line.strip()), ()


def open_folder(folder: Path, options: SourceOptions) -> Source:
    """Return the pairs of a folder; raises `DataError` saying what was looked for when it holds none."""
    metadata = next((folder / name for name in METADATA_FILES if (folder / name).is_file()), None)
    if metadata is not None:
        return open_table(metadata, options)
    files = list_files(folder)
    pictures = [name for name in files if PurePosixPath(name).suffix.lower() in PICTURE_SUFFIXES]
    labels = [class_of(name) for name in pictures]
    captions = caption_files(pictures, files)
    text = pyarrow.string()
    table = pyarrow.table(
        [pyarrow.array(column, text) for column in (pictures, captions, labels)], ["image", "caption_file", "label"]
    )
    if options.needs == "captions" and any(captions):
        names, limit = sorted({name for name in captions if name}), limit_of(folder, options)
        encodings = caption_encodings(folder, names, options.encoding, limit)
        return CaptionFiles(str(folder), table, folder, limit, encodings)
    require_classes(folder, pictures)
    return TableSource(str(folder), table, Columns("image", ("label",), "label"), folder, limit_of(folder, options))


def list_files(folder: Path) -> list[str]:
    """Return the files of a folder and of those in it, relative to it and sorted, hidden ones left out.

    Links to folders are followed, each folder once. Raises `DataError` for a folder that cannot be read.
    """
    found: list[str] = []
    seen = {str(above) for above in folder.resolve().parents}  # a link up there would lead through the whole disk
    for current, folders, names in os.walk(folder, onerror=unreadable_folder, followlinks=True):
        real = os.path.realpath(current)
        folders[:] = [] if real in seen else sorted(name for name in folders if not name.startswith("."))
        if real not in seen:
            inside = PurePosixPath(Path(current).relative_to(folder).as_posix())
            found.extend(require_utf8((inside / name).as_posix()) for name in names if not name.startswith("."))
        seen.add(real)
    return sorted(found)


def unreadable_folder(error: OSError) -> None:
    """Raise `DataError` for a folder that cannot be listed."""
    raise DataError(f"{error.filename}: {error.strerror or error}") from error


def require_utf8(name: str) -> str:
    """Return a file's name; raises `DataError` when it is not UTF-8, as after unpacking some archives."""
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"the file name {os.fsencode(name)!r} is not UTF-8: rename it (convmv renames many)") from error
    return name


def class_of(picture: str) -> str | None:
    """Return the class that a picture's first folder stands for."""
    folder, slash, _ = picture.partition("/")
    return folder.replace("_", " ").replace("-", " ").strip() if slash else None


def caption_files(pictures: list[str], files: list[str]) -> list[str | None]:
    """Return for each picture the .txt file of the same name, or None."""
    by_stem = {name[:-4]: name for name in files if name.lower().endswith(".txt")}
    return [by_stem.get(os.path.splitext(name)[0]) for name in pictures]


def caption_encodings(folder: Path, names: list[str], encoding: str | None, limit: Path) -> tuple[str, ...]:
    """Return the encodings that captions are tried with: the given one, else UTF-8 and then what some look like."""
    require_text_encoding(encoding)
    if encoding is not None:
        return (encoding,)
    step = len(names) // CAPTION_FILES_TO_LOOK_AT + 1
    contents = [raw for name in names[::step] if (raw := small_content(folder / name, limit)) is not None]
    guess = guess_encoding(line for raw in contents if not decodes(raw) for line in raw.splitlines(keepends=True))
    if guess is None:
        return ("utf-8",)
    console.say(f"{folder}: captions that are not UTF-8 are read as {guess}; if they look wrong, set data.encoding")
    return ("utf-8", guess)


def small_content(file: Path, limit: Path) -> bytes | None:
    """Return the bytes of a file, None for one that holds no captions or lies outside: said when it is fetched."""
    try:
        real = file.resolve()
        small = real.is_file() and real.stat().st_size <= LARGEST_CAPTION_BYTES
        return real.read_bytes() if small and real.is_relative_to(limit.resolve()) else None
    except OSError:
        return None


def limit_of(folder: Path, options: SourceOptions) -> Path:
    """Return the folder that linked files must stay in: `data.image_root` where it contains this one, else this one."""
    wider = Path(options.image_root).expanduser().resolve() if options.image_root else folder.resolve()
    return wider if folder.resolve().is_relative_to(wider) else folder


def require_classes(folder: Path, pictures: list[str]) -> None:
    """Raise `DataError` unless pictures lie in at least two folders that are not parts such as train and val."""
    classes = {name.partition("/")[0] for name in pictures if "/" in name}
    if len(classes) >= 2 and not {name.lower() for name in classes} <= PARTS:
        return
    tables = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in READERS)
    if classes and {name.lower() for name in classes} <= PARTS:
        hint = f"name one of its parts, such as {folder / min(classes)}"
    elif tables:
        hint = f"it holds the table {tables[0]}: name {folder / tables[0]}"
    else:
        hint = f"it holds {len(pictures)} pictures in {len(classes)} folders"
    raise DataError(
        f"{folder}: no captions found: looked for {', '.join(METADATA_FILES)}, for pictures with a .txt file of the "
        f"same name, and for two or more folders with the pictures of a class each; {hint}"
    )
