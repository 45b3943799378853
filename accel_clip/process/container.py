"""What a container leaves of a machine's memory and cores, which the machine itself does not tell (Linux, cgroup 2)."""

from __future__ import annotations

import math
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
NO_LIMIT = "max"


def memory_left(cgroup: Path = CGROUP) -> float:
    """Return the bytes of memory that this container may still take; infinity where nothing limits it."""
    limit, used = first_word(cgroup / "memory.max"), first_word(cgroup / "memory.current")
    if limit in (None, NO_LIMIT) or used is None:
        return math.inf
    return float(max(0, int(limit) - int(used) + reclaimable(cgroup / "memory.stat")))


def core_limit(cgroup: Path = CGROUP) -> float:
    """Return how many cores' time this container may take; infinity where nothing limits it.

    `cpu.max` holds the microseconds of time and of the period that they count for
    (docs.kernel.org/admin-guide/cgroup-v2.html).
    """
    words = words_in(cgroup / "cpu.max").split()
    return math.inf if len(words) != 2 or words[0] == NO_LIMIT else int(words[0]) / int(words[1])


def reclaimable(file: Path) -> int:
    """Return the bytes of files kept in memory, which the kernel gives up before it refuses any."""
    rows = (line.split() for line in words_in(file).splitlines())
    return sum(int(row[1]) for row in rows if row[0] == "inactive_file")


def first_word(file: Path) -> str | None:
    """Return the first word of a file, None where there is none."""
    return next(iter(words_in(file).split()), None)


def words_in(file: Path) -> str:
    """Return what a file of the kernel says, nothing where it is not there."""
    try:
        return file.read_text(encoding="ascii")
    except OSError:
        return ""
