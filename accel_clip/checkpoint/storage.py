"""Files that outlive a crash, the room they need, and what a full disk is told as."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from pathlib import Path

from safetensors import SafetensorError

from accel_clip.faults import StorageError

WRITE_ERRORS = (OSError, SafetensorError)
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
CANNOT_SYNC_FOLDERS = {errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES, errno.EISDIR}
CHUNK_BYTES = 4 * 2**20


def write_text(file: Path, text: str) -> None:
    """Write a file that is on the disk when this returns."""
    file.write_text(text, encoding="utf-8")
    sync_file(file)


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


def hash_of(file: Path) -> str:
    """Return the blake2b hash of a file, 32 bytes in hexadecimal."""
    digest = hashlib.blake2b(digest_size=32)
    with file.open("rb") as opened:
        while chunk := opened.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def check_space(folder: Path, needed: int) -> None:
    """Raise `StorageError` unless `needed` bytes are free where `folder` is or will be."""
    if available_bytes(folder) < needed:
        raise disk_full(folder, needed)


def available_bytes(folder: Path) -> int:
    """Return the bytes that are free where `folder` is or will be; raises `StorageError`."""
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    try:
        return shutil.disk_usage(existing).free
    except OSError as error:
        raise StorageError(f"{folder}: {error}") from error


def disk_full(folder: Path, needed: int) -> StorageError:
    """Return the error that names the room a checkpoint needs and the room there is."""
    return StorageError(
        f"disk full: a checkpoint needs {needed} bytes and {available_bytes(folder)} are available at {folder}: "
        "free some space, lower checkpoint.keep, or choose another output_dir"
    )


def storage_error(error: Exception, folder: Path, needed: int) -> StorageError:
    """Return what a failed write means: a full disk (or a limit on file sizes), or else the system's own words."""
    numbers = {f"os error {number}" for number in FULL}
    is_full = error.errno in FULL if isinstance(error, OSError) else any(each in str(error) for each in numbers)
    return disk_full(folder, needed) if is_full else StorageError(f"{folder}: no checkpoint could be written: {error}")
