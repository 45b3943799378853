"""What a folder of pictures is: one with a table, with captions in files beside pictures, or with a folder per class.

Names of folders are captions only where nothing better is there and they are words; otherwise the run asks.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Sequence
from pathlib import Path, PurePosixPath

import pyarrow

from accel_clip.data.sources.base import Source, SourceOptions
from accel_clip.data.sources.class_names import are_codes, class_name, some_names
from accel_clip.data.sources.endings import PICTURE_SUFFIXES, TABLE_SUFFIXES
from accel_clip.data.sources.folders.caption_files import open_caption_files
from accel_clip.data.sources.folders.picture_files import PictureFiles
from accel_clip.data.sources.tables.columns import Columns
from accel_clip.data.sources.tables.opening import open_content, open_table
from accel_clip.data.sources.tables.parquet_files import SPLITS, read_folder
from accel_clip.faults import ConfigError, DataError

METADATA_FILES = tuple(f"metadata{suffix}" for suffix in (".csv", ".tsv", ".jsonl", ".parquet"))
NAMES_OF_FOLDERS = "folder"
"""what data.caption_key calls the names of folders"""
LIST_NAMES = re.compile(r"(caption|annotation|label|result|dataset|metadata|text)", re.IGNORECASE)
"""in the names of .json and .txt files that list captions; others are notes"""
OF_FORMATS = re.compile(
    r"(images?|imgs?|pictures?|pics?|photos?|jpe?gs?|pngs?|data|files?|parts?|batch(es)?|chunks?|shards?|splits?"
    r"|train(ing)?|val(id(ation)?)?|dev|test)",
    re.IGNORECASE,
)
WORDS = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+|[^\W\d_]+")
COUNTED = re.compile(r"\d+[_.].*")
"""10_toy as kohya's trainer has it, with how often a picture is shown, or 001.Black_footed_Albatross"""


def open_folder(folder: Path, options: SourceOptions) -> Source:
    """Return the pairs of a folder; raises `DataError` where it holds none, `ConfigError` where that is not clear."""
    metadata = next((folder / name for name in METADATA_FILES if (folder / name).is_file()), None)
    if metadata is not None:
        return open_table(metadata, options)
    files = list_files(folder)
    names = [name for name in files if PurePosixPath(name).suffix.lower() in PICTURE_SUFFIXES]
    parts = [folder / name for name in files if name.lower().endswith(".parquet")]
    if parts and not names:
        return open_content(read_folder(folder, parts, options), str(folder), options)
    text = pyarrow.string()
    classes = [class_of(name) for name in names]
    pictures = pyarrow.table([pyarrow.array(column, text) for column in (names, classes)], ["image", "label"])
    limit = limit_of(folder, options)
    if options.needs == "captions" and NAMES_OF_FOLDERS not in options.captions:
        source = open_caption_files(folder, files, pictures, limit, options)
        if source is not None:
            return source
    require_classes(folder, names, files, options)
    return PictureFiles(str(folder), pictures, Columns("image", ("label",), "label"), folder, limit)


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
    """Return the name of a picture's first folder, None without one."""
    folder, slash, _ = picture.partition("/")
    return folder if slash else None


def limit_of(folder: Path, options: SourceOptions) -> Path:
    """Return the folder that linked files must stay in: `data.image_root` where it contains this one, else this one."""
    wider = Path(options.image_root).expanduser().resolve() if options.image_root else folder.resolve()
    return wider if folder.resolve().is_relative_to(wider) else folder


def require_classes(folder: Path, pictures: Sequence[str], files: Sequence[str], options: SourceOptions) -> None:
    """Raise unless pictures lie in folders of classes: `DataError` without two, `ConfigError` where that is unclear."""
    classes = {name.partition("/")[0] for name in pictures if "/" in name}
    tables = lists_in(files) if options.needs == "captions" else []
    if len(classes) < 2 or {name.lower() for name in classes} <= SPLITS:
        refuse(folder, pictures, classes, tables)
    if NAMES_OF_FOLDERS in options.captions or options.label_key == NAMES_OF_FOLDERS:
        return
    setting = "data.caption_key" if options.needs == "captions" else "eval.label_key"
    if tables:
        raise ConfigError(
            f"{setting}: {folder} has pictures in folders and beside them {some_names(tables)}: name that as the "
            f"source if the captions stand there, or set {setting} to {NAMES_OF_FOLDERS} if folders are called by "
            "captions"
        )
    odd = no_classes(classes)
    if odd:
        raise ConfigError(
            f"{setting}: {folder} has no captions beside its pictures, and its folders ({some_names(odd)}) do not look "
            f"like names of classes: set {setting} to {NAMES_OF_FOLDERS} if they are, or name a table with captions"
        )


def refuse(folder: Path, pictures: Sequence[str], classes: Collection[str], tables: Sequence[str]) -> None:
    """Raise `DataError` for a folder without captions, saying what was looked for and what is there."""
    hint = f"it holds {len(pictures)} pictures in {len(classes)} folders"
    if tables:
        several = len(tables) > 1
        hint = f"it holds the table{'s' if several else ''} {some_names(tables)}: name {folder / tables[0]}"
        hint += ", or several in a list" if several else ""
    elif classes and {name.lower() for name in classes} <= SPLITS:
        hint = f"name one of its parts, such as {folder / min(classes)}"
    raise DataError(
        f"{folder}: no captions found: looked for {', '.join(METADATA_FILES)}, for pictures with a .txt or .caption "
        f"file of the same name, and for two or more folders with the pictures of a class each; {hint}"
    )


def lists_in(files: Sequence[str]) -> list[str]:
    """Return the files of a folder, and of the folders in it, that are tables or look like lists of captions."""
    shallow = [PurePosixPath(name) for name in files if name.count("/") <= 1]
    found = [path for path in shallow if path.suffix.lower() in TABLE_SUFFIXES]
    sure = [path for path in found if path.suffix.lower() not in (".json", ".txt")]
    return [str(path) for path in found if path in sure or LIST_NAMES.search(path.stem)]


def no_classes(names: Collection[str]) -> Collection[str]:
    """Return the names of folders that are those of formats, or else all where most are numbers or codes."""
    of_formats = {name for name in names if is_of_format(name)}
    return of_formats or (names if are_codes({class_name(name) for name in names}) else ())


def is_of_format(name: str) -> bool:
    """Return whether a folder is called as formats have it, such as images, train2017 or 10_toy, and not as a class."""
    words = [word for word in WORDS.findall(name) if not word.isdigit()]
    if COUNTED.fullmatch(name):
        return True
    return bool(words) and OF_FORMATS.fullmatch(words[-1]) is not None
