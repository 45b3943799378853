"""Single files: replaced in one go, cut, and brought to the disk for good."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

from accel_clip.files.names import DRAFT, beside

CANNOT_SYNC_FOLDERS = {errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES, errno.EISDIR}
CHUNK_BYTES = 4 * 2**20


def write_text(file: Path, text: str) -> None:
    """Replace a file in one go: a reader, a kill or a full disk meets the old one or the new one; raises OSError.

    A link is followed, so that the file stays where it was put.
    """
    write_bytes(file, text.encode("utf-8"))


def write_bytes(file: Path, content: bytes) -> None:
    """Replace a file by bytes, as `write_text` does."""
    file = file.resolve()
    draft = beside(file, DRAFT)
    try:
        with draft.open("xb") as opened:
            opened.write(content)
            opened.flush()
            os.fsync(opened.fileno())
        draft.replace(file)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    sync_folder(file.parent)


def cut(file: Path, num_bytes: int) -> None:
    """Cut a file of ours back to so many bytes; a shorter one is left as it is. Raises OSError."""
    if file.exists() and file.stat().st_size > num_bytes:
        os.truncate(file, num_bytes)


def sync_file(file: Path) -> None:
    """Wait until a file's contents are on the disk."""
    with file.open("rb+") as opened:
        os.fsync(opened.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until a folder's names are on the disk, where the system knows how to (some mounts and Windows do not)."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in CANNOT_SYNC_FOLDERS:
            raise


def file_hash(file: Path) -> str:
    """Return the blake2b hash of a file, 32 bytes in hexadecimal."""
    digest = hashlib.blake2b(digest_size=32)
    with file.open("rb") as opened:
        while chunk := opened.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
