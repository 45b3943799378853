"""Names in the folder of all checkpoints: steps, and the pointers to them."""

from __future__ import annotations

import re
from pathlib import Path

from accel_clip.files.marked import set_aside
from accel_clip.files.whole import write_text

LATEST = "LATEST"
BEST = "BEST"
STEP_FOLDER = re.compile(r"step-(\d{8,})")


def folder_name(step: int) -> str:
    """Return the name of a step's checkpoint."""
    return f"step-{step:08d}"


def step_of(path: Path) -> int:
    """Return the step in a checkpoint's name."""
    return int(path.name.removeprefix("step-"))


def newest_first(folder: Path) -> list[Path]:
    """Return the folders that are named like checkpoints, the highest step first."""
    named = [path for path in folder.glob("step-*") if STEP_FOLDER.fullmatch(path.name) and path.is_dir()]
    return sorted(named, key=step_of, reverse=True)


def point(folder: Path, pointer: str, step: int) -> None:
    """Make `LATEST` or `BEST` name the checkpoint of a step, in one go."""
    write_text(folder / pointer, folder_name(step) + "\n")


def pointed(folder: Path, pointer: str) -> Path | None:
    """Return the folder that `LATEST` or `BEST` names, None when it names none that is there."""
    try:
        name = (folder / pointer).read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return None
    return folder / name if STEP_FOLDER.fullmatch(name) and (folder / name).is_dir() else None


def set_aside_newer(folder: Path, step: int) -> None:
    """Rename checkpoints after a step to `step-….superseded`: a run that goes on from that step writes them anew."""
    for path in newest_first(folder):
        if step_of(path) > step:
            set_aside(path, "superseded")
