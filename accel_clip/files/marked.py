"""Folders of ours: marked when they are written, moved to their place when they are whole, removed by their mark.

The mark is a file that says what kind of folder it is and lists its files: their sizes, and the hashes of those that a
person may edit, who then owns them. Whatever the mark does not list belongs to somebody else.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from accel_clip.console import say
from accel_clip.faults import ConfigError, StorageError, some_of
from accel_clip.files.lock import LOCK, FolderLock, is_held
from accel_clip.files.names import CONDEMNED, DRAFT, REPLACED, beside, place_of_unfinished, state_of, unfinished
from accel_clip.files.whole import file_hash, sync_file, sync_folder, write_text
from accel_clip.typed_json import WrongContent, read_json

MARK = ".accel_clip.json"
OF_THE_SYSTEM = {".DS_Store", "Thumbs.db", "desktop.ini"}  # what file managers leave in every folder they show
MOST_NAMED = 3
STATES = (DRAFT, REPLACED, CONDEMNED)


@dataclass(frozen=True)
class FolderMark:
    """What a folder of ours says of itself."""

    kind: str
    """What the folder is: `export`, `features`, `decoded pictures`, `checkpoint`."""
    files: dict[str, tuple[int, str | None]] | None
    """Size of every file by its name in the folder, and the hash of an editable one; None while it is being written."""


class Draft:
    """A folder that is written beside its place, as `path`, and moved there by `publish`; raises OSError.

    As a context it is discarded unless it was published.
    """

    def __init__(self, place: Path, kind: str) -> None:
        self.place, self.kind = place.resolve(), kind
        self.path = beside(self.place, DRAFT)
        self.path.mkdir(parents=True)
        write_mark(self.path, FolderMark(kind, None))
        self.lock = FolderLock(self.path)
        self.lock.take()

    def __enter__(self) -> Draft:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.discard()

    def discard(self) -> None:
        """Leave nothing of a draft that was not published; an interruption between two moves is finished or undone."""
        self.lock.release()
        with suppress(OSError):  # what cannot be put right now is put right at the next start
            settle(self.place.parent, self.place)

    def publish(self, editable: Collection[str] = ()) -> None:
        """Put the folder in its place; what stood there is removed, or kept under another name where it is not ours.

        editable: the files that belong to whoever edits them.
        """
        write_mark(self.path, FolderMark(self.kind, listing(self.path, editable)))
        replaced = None
        if self.place.exists():
            replaced = self.place.rename(beside(self.place, REPLACED))
        self.path.rename(self.place)
        sync_folder(self.place.parent)
        self.lock.release()
        (self.place / LOCK).unlink(missing_ok=True)
        if replaced is not None:
            dismiss(replaced, self.place, self.kind)


def remove_folder(place: Path, kind: str) -> None:
    """Remove a folder of ours where there is one; one that holds anything else is kept under another name.

    A kill in between leaves nothing that looks like a damaged one. Raises OSError.
    """
    place = place.resolve()
    if place.exists():
        dismiss(place, place, kind)


def dismiss(folder: Path, place: Path, kind: str) -> None:
    """Remove a folder that stood in a place, or give it a name that says it was kept."""
    if not foreign_names(folder, kind):
        remove_condemned(folder.rename(beside(place, CONDEMNED)))
        return
    kept = free_name(place, "kept")
    folder.rename(kept)
    foreign = some_of(foreign_names(kept, kind), MOST_NAMED)
    say(f"warning: {place.name} held what is not of this run ({foreign}): kept as {kept}")


def set_aside(path: Path, ending: str) -> Path:
    """Rename something of ours to a free name with an ending and return it; raises `StorageError`."""
    try:
        return path.rename(free_name(path, ending))
    except OSError as error:
        raise StorageError(f"{path} could not be renamed: {error}") from error


def free_name(place: Path, ending: str) -> Path:
    """Return a name beside a place, with an ending, that nothing has yet."""
    name, number = place.with_name(f"{place.name}.{ending}"), 1
    while name.exists() or name.is_symlink():
        number += 1
        name = place.with_name(f"{place.name}.{ending}-{number}")
    return name


def settle(folder: Path, place: Path | None = None) -> None:
    """Finish or undo what a kill left in a folder, for one place in it or for all; raises OSError.

    A whole draft whose place is free gets it, what was replaced comes back where nothing took its place, and the rest
    goes. What carries no mark of ours stays, and so does what another process writes. Not while this one writes there.
    """
    left = [path for path in unfinished(folder) if place is None or place_of_unfinished(path) == folder / place.name]
    for path in sorted(left, key=lambda each: STATES.index(state_of(each))):
        if is_file(path):
            path.unlink()
        elif (mark := read_mark(path)) is None:
            remove_unmarked(path)
        elif not is_held(path):
            settle_marked(path, mark)


def remove_unmarked(path: Path) -> None:
    """Remove a folder with an unfinished name that was not marked yet, or no longer; one that holds anything stays."""
    for begun in unfinished(path):
        if place_of_unfinished(begun) == path / MARK and is_file(begun):
            begun.unlink()
    if not any(path.iterdir()):
        path.rmdir()


def settle_marked(path: Path, mark: FolderMark) -> None:
    """Finish or undo what a kill left of one folder that carries our mark and an unfinished name."""
    place, state = place_of_unfinished(path), state_of(path)
    assert place is not None, path
    if state == CONDEMNED or (state == DRAFT and (place.exists() or not is_whole(path, mark))):
        remove_condemned(path)
    elif place.exists():
        dismiss(path, place, mark.kind)
    else:
        path.rename(place)


def stands_whole(place: Path) -> bool:
    """Return whether a folder of ours is in its place with all its files."""
    mark = read_mark(place)
    return mark is not None and is_whole(place, mark)


def will_stand_whole(place: Path) -> bool:
    """Return whether a folder of ours is in its place with all its files, at the latest once it is settled."""
    place = place.resolve()
    if place.exists():
        return stands_whole(place)
    left = [
        path for path in unfinished(place.parent) if place_of_unfinished(path) == place and state_of(path) != CONDEMNED
    ]
    return any(stands_whole(path) for path in left if not is_file(path))


def is_whole(folder: Path, mark: FolderMark) -> bool:
    """Return whether all files that a mark lists are there with their sizes."""
    files = mark.files
    return files is not None and all(
        (folder / name).is_file() and (folder / name).stat().st_size == size for name, (size, _) in files.items()
    )


def remove_condemned(folder: Path) -> None:
    """Remove a folder that has an unfinished name: what its mark lists, or all while it was written; raises OSError."""
    mark = read_mark(folder)
    listed = None if mark is None else mark.files
    for leaf in leaves_of(folder):
        if mark is None or (listed is not None and name_below(folder, leaf) not in listed):
            continue
        leaf.unlink() if is_file(leaf) else leaf.rmdir()
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.name in OF_THE_SYSTEM:
            path.unlink()
        elif path.is_dir():
            path.rmdir()
    for own in (LOCK, MARK):  # the mark last: a kill before that leaves a folder that is still known
        (folder / own).unlink(missing_ok=True)
    folder.rmdir()


def foreign_names(folder: Path, kind: str) -> list[str]:
    """Return the names of what is in a folder and not ours: all of it, unless it carries our mark of this kind."""
    if not folder.is_dir():
        return [folder.name] if folder.exists() else []
    mark = read_mark(folder)
    known = mark.files if mark is not None and mark.kind == kind and mark.files is not None else {}
    names = {name_below(folder, leaf): leaf for leaf in leaves_of(folder)}
    return [name for name, leaf in names.items() if name not in known or is_edited(leaf, known[name][1])]


def is_edited(file: Path, digest: str | None) -> bool:
    """Return whether a file is another one than the mark lists."""
    return file.is_symlink() or (digest is not None and file_hash(file) != digest)


def leaves_of(folder: Path) -> list[Path]:
    """Return the files, links and empty folders below a folder, but for our mark and lock and a file manager's."""
    own = {folder / MARK, folder / LOCK}
    return [
        path
        for path in sorted(folder.rglob("*"))
        if path not in own and path.name not in OF_THE_SYSTEM and (is_file(path) or not any(path.iterdir()))
    ]


def is_file(path: Path) -> bool:
    """Return whether a path is a file or a link, also one to a folder."""
    return path.is_symlink() or not path.is_dir()


def name_below(folder: Path, path: Path) -> str:
    """Return the name of a path below a folder, with slashes on every system."""
    return path.relative_to(folder).as_posix()


def listing(folder: Path, editable: Collection[str]) -> dict[str, tuple[int, str | None]]:
    """Bring all files of a folder to the disk, and return the size of each, and the hash of an editable one."""
    files = {}
    for file in filter(is_file, leaves_of(folder)):
        sync_file(file)
        name = name_below(folder, file)
        files[name] = (file.stat().st_size, file_hash(file) if name in editable else None)
    return files


def read_mark(folder: Path) -> FolderMark | None:
    """Return the mark of a folder, None where there is none of ours."""
    try:
        mark: FolderMark = read_json(folder / MARK, FolderMark)
    except (OSError, WrongContent):
        return None
    return mark


def write_mark(folder: Path, mark: FolderMark) -> None:
    """Write the mark of a folder; raises OSError."""
    write_text(folder / MARK, json.dumps({"kind": mark.kind, "files": mark.files}, indent=2) + "\n")


def require_own(place: Path, kind: str, setting: str) -> None:
    """Raise `ConfigError` where something that is not ours stands in a place that we may replace or remove later."""
    require_link(place, setting)
    foreign = foreign_names(place, kind)
    if foreign:
        raise ConfigError(
            f"{setting}: {place} is where the {kind} would go, and it holds what is not of it "
            f"({some_of(foreign, MOST_NAMED)}): move that away, or name another folder"
        )


def require_link(path: Path, setting: str) -> None:
    """Raise `ConfigError` for a link to something that is not there, such as a disk that is not mounted."""
    if path.is_symlink() and not path.exists():
        raise ConfigError(
            f"{setting}: {path} is a link to {path.readlink()}, which is not there: mount that, or remove the link"
        )
