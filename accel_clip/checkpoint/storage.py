"""The room that checkpoints need on the disk, and what a full one is told as."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

from safetensors import SafetensorError

from accel_clip.faults import StorageError

WRITE_ERRORS = (OSError, SafetensorError)
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


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
