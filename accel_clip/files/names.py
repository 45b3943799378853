"""Names of what is not finished, or not wanted any more: random ones beside the place it is meant for."""

from __future__ import annotations

import re
import uuid
from pathlib import Path

DRAFT, REPLACED, CONDEMNED = "new", "old", "gone"
"""What is being written; what stood in its place until a moment ago; what is being removed."""
UNFINISHED = re.compile(rf"\.accel_clip-(?P<place>.+)-[0-9a-f]{{32}}\.(?P<state>{DRAFT}|{REPLACED}|{CONDEMNED})")


def beside(place: Path, state: str) -> Path:
    """Return a free name beside a place, which tells the place and the state."""
    return place.with_name(f".accel_clip-{place.name}-{uuid.uuid4().hex}.{state}")


def place_of_unfinished(path: Path) -> Path | None:
    """Return the place that an unfinished name was made for, None for any other name."""
    match = UNFINISHED.fullmatch(path.name)
    return None if match is None else path.with_name(match["place"])


def state_of(path: Path) -> str:
    """Return the state that an unfinished name tells."""
    return path.suffix.removeprefix(".")


def unfinished(folder: Path) -> list[Path]:
    """Return everything in a folder that has an unfinished name, in a fixed order."""
    return sorted(path for path in folder.iterdir() if place_of_unfinished(path) is not None) if folder.is_dir() else []
