"""A lock on a folder that one process holds: the system drops it when that process ends, however it ends.

POSIX record locks: forked loader workers do not inherit them, so a killed run is free at once, and NFS 4 has them. A
file system without locks (some FUSE and Lustre mounts) is told, since nothing keeps two runs apart there.
"""

from __future__ import annotations

import errno
import json
import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from accel_clip.console import say
from accel_clip.faults import ConfigError
from accel_clip.typed_json import WrongContent, read_json

LOCK = ".accel_clip.lock"
HELD = {errno.EACCES, errno.EAGAIN, errno.EDEADLK}
WITHOUT_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}
SECONDS_OF_A_LOOK = 1.0  # another process may just be looking whether the lock is free, which takes it for a moment


@dataclass(frozen=True)
class LockHolder:
    """Who holds a lock, as the file of the lock says."""

    pid: int
    """its process"""
    host: str
    """its machine"""


class FolderLock:
    """A folder that belongs to this process from `take` to `release`; no other lock of this process is on it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.descriptor: int | None = None

    def take(self) -> bool:
        """Return whether the folder is this process's now; raises OSError where it takes no files."""
        if self.descriptor is not None:
            return True
        descriptor = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        if not is_locked_now(descriptor, self.folder):
            os.close(descriptor)
            return False
        self.descriptor = descriptor
        return True

    def sign(self) -> None:
        """Write into the lock that is held who holds it."""
        assert self.descriptor is not None, "it was taken"
        os.ftruncate(self.descriptor, 0)
        os.pwrite(self.descriptor, json.dumps({"host": platform.node(), "pid": os.getpid()}).encode(), 0)

    def release(self) -> None:
        """Give the folder back; the file stays, since another process may have opened it already."""
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.release()


def is_locked_now(descriptor: int, folder: Path) -> bool:
    """Lock an open file, and return whether that worked; where the file system has no locks, say so and go on."""
    patience = time.monotonic() + SECONDS_OF_A_LOOK
    while True:
        try:
            lock(descriptor)
            return True
        except OSError as error:
            if error.errno in WITHOUT_LOCKS:
                say(f"warning: {folder} is on a file system without locks: see to it that no other run uses it")
                return True
            if error.errno not in HELD:
                raise
        if time.monotonic() > patience:
            return False
        time.sleep(SECONDS_OF_A_LOOK / 10)


def is_held(folder: Path) -> bool:
    """Return whether another process owns a folder; nothing is written."""
    try:
        descriptor = os.open(folder / LOCK, os.O_RDWR)
    except OSError:  # nobody has ever owned it, or nobody can
        return False
    try:
        lock(descriptor)
    except OSError as error:
        return error.errno in HELD
    finally:
        os.close(descriptor)
    return False


def lock(descriptor: int) -> None:
    """Lock an open file for this process without waiting; raises OSError."""
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        return
    fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def held_error(folder: Path) -> ConfigError:
    """Return the error for a run folder that another process owns, which it names where it can."""
    try:
        holder: LockHolder = read_json(folder / LOCK, LockHolder)
        who = f"process {holder.pid} on {holder.host[:80]}"
    except (OSError, WrongContent):
        who = "another process"
    return ConfigError(
        f"output_dir: {who} trains in {folder}: wait for its end, stop it (the same command goes on with its run), or "
        "name another output_dir"
    )
