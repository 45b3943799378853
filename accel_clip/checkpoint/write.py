"""One checkpoint written so that a crash at any moment leaves a valid one behind."""

from __future__ import annotations

import re
from pathlib import Path

from safetensors.torch import save_file

from accel_clip.checkpoint.folders import BEST, LATEST, folder_name, newest_first, point, pointed
from accel_clip.checkpoint.manifest import MANIFEST, make_manifest
from accel_clip.checkpoint.snapshot import Snapshot
from accel_clip.checkpoint.storage import WRITE_ERRORS, check_space, storage_error
from accel_clip.console import say
from accel_clip.faults import reached
from accel_clip.files.kinds import CHECKPOINT
from accel_clip.files.marked import Draft, remove_folder

STAGES = ("snapshot", "model", "optimizer", "random", "state", "manifest", "rename", "latest", "best", "prune")


def write(snapshot: Snapshot, folder: Path, keep: int) -> Path:
    """Write a checkpoint, point `LATEST` (and `BEST`) to it, remove the oldest beyond `keep`, and return its folder.

    Pure file work that may run in a thread. Raises `StorageError` after removing what was half written; the other
    checkpoints are untouched then.
    """
    path = folder / folder_name(snapshot.step)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        check_space(folder, snapshot.num_bytes)
        with Draft(path, CHECKPOINT) as draft:
            fill(draft.path, snapshot)
            draft.publish()
        reached("rename", snapshot.step)
        point(folder, LATEST, snapshot.step)
        reached("latest", snapshot.step)
        if snapshot.is_best:
            point(folder, BEST, snapshot.step)
            reached("best", snapshot.step)
    except WRITE_ERRORS as error:
        raise storage_error(error, folder, snapshot.num_bytes) from error
    prune(folder, keep)
    reached("prune", snapshot.step)
    return path


def fill(draft: Path, snapshot: Snapshot) -> None:
    """Write all files of a checkpoint, the manifest last."""
    for name in sorted([*snapshot.tensors, *snapshot.documents], key=order_of_writing):
        if name in snapshot.tensors:
            save_file(snapshot.tensors[name], draft / name)
        else:
            (draft / name).write_text(snapshot.documents[name], encoding="utf-8")
        reached(stage_of(name), snapshot.step)
    (draft / MANIFEST).write_text(make_manifest(draft, snapshot.step, snapshot.num_processes), encoding="utf-8")
    reached("manifest", snapshot.step)


def stage_of(file: str) -> str:
    """Return the stage that writes a file: `random-0.safetensors` belongs to `random`."""
    return re.split(r"[-.]", file)[0]


def order_of_writing(file: str) -> int:
    """Return the place of a file's stage."""
    return STAGES.index(stage_of(file))


def prune(folder: Path, keep: int) -> None:
    """Remove all but the `keep` newest checkpoints and those that are pointed to; one that stays in the way is said."""
    kept = {*newest_first(folder)[: max(1, keep)], pointed(folder, LATEST), pointed(folder, BEST)}
    for path in newest_first(folder):
        if path not in kept:
            try:
                remove_folder(path, CHECKPOINT)
            except OSError as error:
                say(f"checkpoint {path.name} could not be removed: {error}")
