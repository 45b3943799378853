"""The members of a tar archive from its headers, front to back, and whether the archive ends as it should.

Nothing is unpacked. Python's `tarfile` ends without a word where an archive was cut between two members, and takes many
times as long.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, Protocol

BLOCK_BYTES = 512
ZEROS = bytes(BLOCK_BYTES)
LONGEST_EXTENSION_BYTES = 1 << 20
MOST_EXTENSIONS = 64  # that describe one member; programs write up to four
MOST_SPARSE_BLOCKS = 1 << 16  # of a map of holes: more than a million of them
MOST_SIZE_DIGITS = 18  # of numbers that surely fit in 64 bits
REGULAR = frozenset(b"0\x007")
WITHOUT_DATA = frozenset(b"123456")  # links, devices, folders, pipes: whatever size their header claims
LONG_NAME, LONG_LINK, PAX, GLOBAL_PAX, SPARSE = b"LKxgS"
SOLARIS_PAX = ord("X")
EXTENSIONS = frozenset((LONG_NAME, LONG_LINK, PAX, SOLARIS_PAX, GLOBAL_PAX))
PAX_RECORD = re.compile(rb"(\d{1,10}) ([^=]+)=")


@dataclass(frozen=True)
class Member:
    """A member of an archive."""

    name: bytes
    """empty where there is no regular file: folders, links and the like, which whoever counts members counts"""
    offset: int
    """where its bytes begin"""
    num_bytes: int
    """its size; its bytes may lie behind the end of a cut archive"""


@dataclass(frozen=True)
class Header:
    """One block that describes a member, or what describes the next one better."""

    name: bytes
    """of the member that it describes"""
    kind: int
    """the type flag, a byte"""
    num_bytes: int
    """of what follows it"""
    continues: bool = False
    """whether more of a sparse file's map follows"""


@dataclass(frozen=True)
class ExtendedHeader:
    """What extended headers say about the member that follows them."""

    name: bytes | None = None
    """None where they do not say"""
    num_bytes: int | None = None
    """None where they do not say"""
    is_sparse: bool = False
    """whether the member is a file with holes"""


NOTHING = ExtendedHeader()


class BrokenHeader(Exception):
    """A block that should be a header and is none."""


class ForwardFile(Protocol):
    """A file that is read from front to back."""

    def tell(self) -> int:
        """Return the place of the next byte."""
        ...

    def read(self, num_bytes: int) -> bytes:
        """Return the next bytes, fewer at the end."""
        ...

    def skip(self, num_bytes: int) -> int:
        """Pass over the next bytes and return how many they were, fewer at the end."""
        ...


class LocalFile:
    """A file of `num_bytes` on a disk, of which nothing is read that is passed over."""

    def __init__(self, file: BinaryIO, num_bytes: int) -> None:
        self.file, self.num_bytes, self.tell, self.read = file, num_bytes, file.tell, file.read

    def skip(self, num_bytes: int) -> int:
        """Pass over the next bytes and return how many they were, fewer at the end."""
        place = self.tell()
        return self.file.seek(min(place + num_bytes, max(self.num_bytes, place))) - place


class Archive:
    """A tar archive that is gone through once; then `problem` is what is wrong with its end, or None.

    head: the first block, empty before it is read. The file may begin at any member of an archive, at the first of the
    headers that describe it.
    """

    def __init__(self, file: ForwardFile) -> None:
        self.file = file
        self.problem: str | None = None
        self.head = b""

    def members(self) -> Iterator[Member]:
        """Yield the members, at the place of their bytes: as many as are not read are passed over.

        What the file itself raises is passed on.
        """
        file, extended, num_extensions = self.file, NOTHING, 0
        while True:
            start = file.tell()
            block = file.read(BLOCK_BYTES)
            self.head = self.head or block
            if len(block) < BLOCK_BYTES or block == ZEROS:
                self.problem = problem_of_end(file, block)
                return
            try:
                header, data = parse_header(block), file.tell()
                if header.kind in EXTENSIONS:
                    num_extensions += 1
                    require_few(num_extensions)
                    extended = extend(extended, header, read_extension(file, header))
                elif header.continues:
                    pass_over_sparse_map(file)
                    data = file.tell()
            except BrokenHeader as problem:
                self.problem = f"{problem} at byte {start:,}"
                return
            size = header.num_bytes
            if header.kind not in EXTENSIONS:
                size = header.num_bytes if extended.num_bytes is None else extended.num_bytes
                size = 0 if header.kind in WITHOUT_DATA else size
                yield Member(name_of_member(header, extended), data, size)
                extended, num_extensions = NOTHING, 0
            if not pass_to(file, data + size):
                self.problem = f"it ends inside of a member, at byte {file.tell():,}"
                return
            pass_to(file, padded(data + size))


def name_of_member(header: Header, extended: ExtendedHeader) -> bytes:
    """Return the name of a regular file, empty for all else; old archives wrote folders as files without bytes."""
    name = extended.name or header.name
    is_file = header.kind in REGULAR and not extended.is_sparse and not name.endswith(b"/")
    return name if is_file else b""


def require_few(num_extensions: int) -> None:
    """Raise `BrokenHeader` for more extended headers than any member has."""
    if num_extensions > MOST_EXTENSIONS:
        raise BrokenHeader(f"there are more than {MOST_EXTENSIONS} extended headers for one member")


def list_members(file: BinaryIO, num_bytes: int) -> tuple[list[Member], str | None]:
    """Return the regular files of an archive on a disk in order, and what is wrong with its end or None."""
    archive = Archive(LocalFile(file, num_bytes))
    members = [member for member in archive.members() if member.name]
    return members, archive.problem


def pass_to(file: ForwardFile, place: int) -> bool:
    """Pass over what lies before a place; return whether the file goes so far."""
    num_bytes = place - file.tell()
    return file.skip(num_bytes) == num_bytes


def padded(place: int) -> int:
    """Return where the block ends that ends at a place or behind it."""
    return -(-place // BLOCK_BYTES) * BLOCK_BYTES


def problem_of_end(file: ForwardFile, block: bytes) -> str | None:
    """Return what is wrong with the end of an archive; `block` is what stands there in place of a header."""
    if not block:
        return "it ends without the end-of-archive marker"
    if len(block) < BLOCK_BYTES:
        return f"it ends inside of a header, at byte {file.tell():,}"
    if file.read(BLOCK_BYTES) == ZEROS:
        return None
    return "it ends with one block of zeros where two are the end-of-archive marker"


def parse_header(block: bytes) -> Header:
    """Return what a block of 512 bytes says; raises `BrokenHeader`."""
    try:
        stored, size = number_of_field(block[148:156]), number_of_field(block[124:136])
    except ValueError:
        raise BrokenHeader("there is no tar header") from None
    checksum = sum(block) - sum(block[148:156]) + 8 * ord(" ")
    if stored != checksum and stored != signed_checksum(block):
        raise BrokenHeader("there is no tar header")
    name = before_null(block[:100])
    prefix = before_null(block[345:500]) if block[257:263] == b"ustar\0" else b""
    kind = block[156]
    return Header(prefix + b"/" + name if prefix else name, kind, size, kind == SPARSE and block[482] != 0)


def signed_checksum(block: bytes) -> int:
    """Return the checksum as some old programs computed it, over signed bytes."""
    fields = block[:148] + block[156:]
    return sum(fields) - 256 * sum(byte > 127 for byte in fields) + 8 * ord(" ")


def number_of_field(field: bytes) -> int:
    """Return a number written in octal digits, or in binary after a byte of 128; raises `ValueError`."""
    value = int.from_bytes(field[1:], "big") if field[0] == 128 else int(before_null(field).strip() or b"0", 8)
    if not 0 <= value < 2**62:
        raise ValueError(value)
    return value


def before_null(field: bytes) -> bytes:
    """Return a field's bytes up to the first zero."""
    return field.partition(b"\0")[0]


def read_extension(file: ForwardFile, header: Header) -> bytes:
    """Return the bytes of an extended header; raises `BrokenHeader` for one that is too long to be true."""
    if header.num_bytes > LONGEST_EXTENSION_BYTES:
        raise BrokenHeader(f"there is an extended header of {header.num_bytes:,} bytes")
    return file.read(header.num_bytes)


def extend(extended: ExtendedHeader, header: Header, content: bytes) -> ExtendedHeader:
    """Return what is known of the next member after one more extended header."""
    if header.kind == LONG_NAME:
        return ExtendedHeader(before_null(content), extended.num_bytes, extended.is_sparse)
    if header.kind not in (PAX, SOLARIS_PAX):
        return extended
    records = pax_records(content)
    written = records.get(b"size")
    if written is not None and not (written.isdigit() and len(written) <= MOST_SIZE_DIGITS):
        raise BrokenHeader("there is a broken extended header")
    size = extended.num_bytes if written is None else int(written)
    is_sparse = any(key.startswith(b"GNU.sparse.") for key in records)
    return ExtendedHeader(records.get(b"path", extended.name), size, is_sparse)


def pax_records(content: bytes) -> dict[bytes, bytes]:
    """Return the records `<length> <key>=<value>` of an extended header; raises `BrokenHeader`."""
    records, place = {}, 0
    while place < len(content) and content[place] != 0:
        match = PAX_RECORD.match(content, place)
        end = place + int(match[1]) if match else 0
        if match is None or not match.end() < end <= len(content):
            raise BrokenHeader("there is a broken extended header")
        records[match[2]] = content[match.end() : end - 1]
        place = end
    return records


def pass_over_sparse_map(file: ForwardFile) -> None:
    """Pass over the blocks that map the holes of an old GNU sparse file; raises `BrokenHeader`."""
    for _ in range(MOST_SPARSE_BLOCKS):
        block = file.read(BLOCK_BYTES)
        if len(block) < BLOCK_BYTES:
            raise BrokenHeader("there is a broken sparse file")
        if block[504] == 0:
            return
    raise BrokenHeader("there is a sparse file without end")
