"""JSON files that other programs read, replaced in one go."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from accel_clip.faults import StorageError
from accel_clip.files.whole import write_text


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Replace a JSON file in one go, so that a reader never sees half of it; raises `StorageError`."""
    try:
        write_text(file, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    except OSError as error:
        raise StorageError(f"{file}: {error}") from error
