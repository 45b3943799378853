"""Where the members of a tar shard lie, kept in a small file so that the shard is gone through once.

1. One pass over the headers lists the members; those with one name up to its last dot belong together, in whatever
   order they stand in the shard. Which of several dots begins the ending is seen later, in all shards (`member_names`).
2. The index is kept beside the shard, or in the user's cache where that folder takes no files: a line of JSON, then
   plain arrays. It counts as long as the shard has the size and the time of change that it names.

Processes that start together each begin at another shard and take over what the others have kept meanwhile.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy

from accel_clip import console
from accel_clip.data.sources.shards.member_names import stem_and_ending
from accel_clip.data.sources.shards.tar_headers import BLOCK_BYTES, Member, list_members
from accel_clip.faults import ConfigError, DataError
from accel_clip.files.whole import write_bytes
from accel_clip.typed import Count
from accel_clip.typed_json import WrongContent, parse_json, read_bytes

FORMAT = "accel-clip tar index"
VERSION = 2
MARK = f'{{"format": "{FORMAT}"'.encode()  # what an index begins with
SIDE_FILE_SUFFIX = ".accel-clip-index"
BUFFER_BYTES = 1 << 16
HEAD_BYTES = 1 << 20  # an index is smaller than its shard, but for its first line
MEMBER = numpy.dtype([("sample", "<u4"), ("extension", "<u4"), ("offset", "<i8"), ("size", "<i8")])
KEY_END = numpy.dtype("<u4")
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd")


@dataclass(frozen=True)
class TarIndex:
    """The samples of one shard, in the order in which their first members stand in it."""

    num_bytes: int
    """size of the shard"""
    mtime_ns: int
    """when the shard was last changed"""
    members: numpy.ndarray
    """of dtype MEMBER [M]: sample and extension by number, place of the bytes"""
    key_ends: numpy.ndarray
    """uint32 [N]: where each sample's key ends in `keys`"""
    keys: bytes
    """of the samples, one after the other"""
    extensions: tuple[str, ...]
    """in lower case, without the dot before them; empty for hidden files and those without an ending"""
    problem: str | None
    """what is wrong with the shard's end"""

    @property
    def num_samples(self) -> int:
        """Return how many keys there are."""
        return len(self.key_ends)


def index_all(paths: Sequence[Path], name: str, folder: Path | None = None) -> list[TarIndex]:
    """Return the indexes of shards, those that are not kept yet built; raises `DataError` for what is no tar.

    folder: where those are kept, in place of beside the shards.
    """
    kept = [load_index(path, folder) for path in paths]
    missing = [number for number, index in enumerate(kept) if index is None]
    if missing:
        console.say(f"{name}: going through {len(missing)} of {len(paths)} shards once, to know where pictures lie")
    share = int(os.environ.get("RANK", "0")) / int(os.environ.get("WORLD_SIZE", "1"))
    first = int(len(missing) * share)
    not_kept = 0
    for number in missing[first:] + missing[:first]:
        index = load_index(paths[number], folder)
        if index is None:
            index = build_index(paths[number])
            not_kept += not keep_index(index, paths[number], folder)
        kept[number] = index
    if not_kept:
        console.say(f"{name}: the indexes of {not_kept} shards could not be kept: every start goes through them again")
    return [index for index in kept if index is not None]


def build_index(path: Path) -> TarIndex:
    """Return the index of a shard after one pass over its headers; raises `DataError` naming the shard."""
    try:
        with path.open("rb", buffering=BUFFER_BYTES) as file:
            status = os.fstat(file.fileno())
            members, problem = list_members(file, status.st_size)
            file.seek(0)
            head = file.read(BLOCK_BYTES)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error
    if head.startswith(COMPRESSED):
        raise ConfigError(f"{path}: the shard is compressed, whatever its name says: unpack it to a plain .tar")
    if not members and problem and len(head) == BLOCK_BYTES and problem.endswith("byte 0"):
        raise DataError(f"{path}: not a tar archive ({problem}): get it again, or leave it out of data.train")
    return group(members, status.st_size, status.st_mtime_ns, problem)


def group(members: Sequence[Member], num_bytes: int, mtime_ns: int, problem: str | None) -> TarIndex:
    """Return members grouped by their names up to the last dot."""
    samples: dict[bytes, int] = {}
    extensions: dict[str, int] = {}
    rows = []
    for member in members:
        names = stem_and_ending(member.name)
        if names is None:
            continue
        key, extension = names
        sample = samples.setdefault(key, len(samples))
        rows.append((sample, extensions.setdefault(extension, len(extensions)), member.offset, member.num_bytes))
    key_ends = numpy.cumsum([len(key) for key in samples], dtype=KEY_END)
    table = numpy.array(rows, MEMBER)
    return TarIndex(num_bytes, mtime_ns, table, key_ends, b"".join(samples), tuple(extensions), problem)


def load_index(path: Path, folder: Path | None = None) -> TarIndex | None:
    """Return the index that is kept for a shard as it is now, or None."""
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error
    for side_file in filter(Path.is_file, [*side_files(path), *(side_files(path, folder) if folder else ())]):
        with contextlib.suppress(OSError, WrongContent):
            index = unpack(read_bytes(side_file, status.st_size + HEAD_BYTES))  # names stand in the shard too
            if index and (index.num_bytes, index.mtime_ns) == (status.st_size, status.st_mtime_ns):
                return index
    return None


def keep_index(index: TarIndex, path: Path, folder: Path | None = None) -> bool:
    """Write an index where the next start finds it, in one move; return whether any place takes it."""
    for side_file in side_files(path, folder):
        with contextlib.suppress(OSError):  # a folder that takes no files: the next place is tried
            if is_foreign(side_file):
                console.say(f"{side_file} is no index and is left as it is: that of the shard is kept elsewhere")
                continue
            if side_file.parent != path.parent:
                side_file.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(side_file, pack(index))
            return True
    return False


def is_foreign(side_file: Path) -> bool:
    """Return whether what is in an index's place is none, whole, cut or older: it may be the user's."""
    if not side_file.is_file():
        return os.path.lexists(side_file)
    with side_file.open("rb") as file:
        head = file.read(len(MARK))
    return not MARK.startswith(head)


def side_files(path: Path, folder: Path | None = None) -> list[Path]:
    """Return where the index of a shard may be kept: beside it or in the user's cache, or else in the folder alone."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    digest = hashlib.blake2b(os.fsencode(os.path.abspath(path)), digest_size=16).hexdigest()
    if folder is not None:
        return [folder / digest]
    return [path.with_name(path.name + SIDE_FILE_SUFFIX), cache / "accel_clip" / "shards" / digest]


def pack(index: TarIndex) -> bytes:
    """Return an index as bytes: a line of JSON, then members, ends of keys, and keys."""
    arrays = index.members.tobytes() + index.key_ends.tobytes() + index.keys
    head = {
        "format": FORMAT,
        "version": VERSION,
        "num_bytes": index.num_bytes,
        "mtime_ns": index.mtime_ns,
        "num_members": len(index.members),
        "num_samples": index.num_samples,
        "extensions": index.extensions,
        "problem": index.problem,
        "checksum": zlib.crc32(arrays),
    }
    return json.dumps(head).encode() + b"\n" + arrays


@dataclass(frozen=True)
class IndexHeader:
    """The first line of a kept index."""

    format: str
    """says that it is one"""
    version: int
    """of the form"""
    num_bytes: Count
    """size of the shard"""
    mtime_ns: int
    """when the shard was last changed"""
    num_members: Count
    """of the shard"""
    num_samples: Count
    """of the shard"""
    extensions: list[str]
    """of members, in lower case"""
    problem: str | None
    """what is wrong with the shard's end, None for nothing"""
    checksum: Count
    """of the arrays that follow, CRC-32"""


def unpack(raw: bytes) -> TarIndex | None:
    """Return the index in bytes that `pack` wrote, or None for any other bytes."""
    line, _, arrays = raw.partition(b"\n")
    try:
        head: IndexHeader = parse_json(line, IndexHeader, FORMAT)
        if (head.format, head.version, head.checksum) != (FORMAT, VERSION, zlib.crc32(arrays)):
            return None
        members = numpy.frombuffer(arrays, MEMBER, head.num_members)
        key_ends = numpy.frombuffer(arrays, KEY_END, head.num_samples, members.nbytes)
    except (WrongContent, ValueError):
        return None
    keys = arrays[members.nbytes + key_ends.nbytes :]
    index = TarIndex(head.num_bytes, head.mtime_ns, members, key_ends, keys, tuple(head.extensions), head.problem)
    return index if is_sound(index) else None


def is_sound(index: TarIndex) -> bool:
    """Return whether samples, extensions and keys are there as they are counted, and members lie in the shard.

    They stand there one after the other, as `build_index` lists them.
    """
    members, offsets, sizes = index.members, index.members["offset"], index.members["size"]
    counted = (members["sample"] < index.num_samples).all() and (members["extension"] < len(index.extensions)).all()
    inside = ((offsets >= 0) & (sizes >= 0) & (sizes <= index.num_bytes) & (offsets <= index.num_bytes - sizes)).all()
    in_order = (offsets[1:] >= offsets[:-1] + sizes[:-1]).all()
    ends = numpy.concatenate([[0], index.key_ends]).astype(numpy.int64)
    return bool(counted and inside and in_order and (numpy.diff(ends) > 0).all() and ends[-1] == len(index.keys))
