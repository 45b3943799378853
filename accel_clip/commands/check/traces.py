"""What a check needs to write while it lasts, and that nothing of it stays."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory


@contextmanager
def without_traces() -> Iterator[Path]:
    """Yield a folder that is gone after the block, in which no compiled Python is kept beside a plugin either."""
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        with TemporaryDirectory(prefix="accel-clip-check-", ignore_cleanup_errors=True) as folder:
            yield Path(folder)
    finally:
        sys.dont_write_bytecode = before
