"""One checkpoint written so that a crash at any moment leaves a valid one behind."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from safetensors.torch import save_file

from accel_clip.checkpoint.folders import BEST, LATEST, folder_name, newest_first, point, pointed, temporary_name
from accel_clip.checkpoint.manifest import MANIFEST, make_manifest
from accel_clip.checkpoint.snapshot import Snapshot
from accel_clip.checkpoint.storage import WRITE_ERRORS, check_space, storage_error, sync_file, sync_folder, write_text
from accel_clip.console import say
from accel_clip.faults import reached

STAGES = ("snapshot", "model", "optimizer", "random", "state", "manifest", "aside", "rename", "latest", "best", "prune")


def write(snapshot: Snapshot, folder: Path, keep: int) -> Path:
    """Write a checkpoint, point `LATEST` (and `BEST`) to it, remove the oldest beyond `keep`, and return its folder.

    Pure file work that may run in a thread. Raises `StorageError` after removing what was half written; the other
    checkpoints are untouched then.
    """
    temporary = temporary_name(folder, str(snapshot.step))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        check_space(folder, snapshot.num_bytes)
        fill(temporary, snapshot)
        path = publish(temporary, folder / folder_name(snapshot.step), snapshot.step)
        point(folder, LATEST, snapshot.step)
        reached("latest", snapshot.step)
        if snapshot.is_best:
            point(folder, BEST, snapshot.step)
            reached("best", snapshot.step)
    except WRITE_ERRORS as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise storage_error(error, folder, snapshot.num_bytes) from error
    prune(folder, keep)
    reached("prune", snapshot.step)
    return path


def fill(temporary: Path, snapshot: Snapshot) -> None:
    """Write all files of a checkpoint and wait until they are on the disk, the manifest last."""
    temporary.mkdir()
    for name in sorted([*snapshot.tensors, *snapshot.documents], key=order_of_writing):
        if name in snapshot.tensors:
            save_file(snapshot.tensors[name], temporary / name)
            sync_file(temporary / name)
        else:
            write_text(temporary / name, snapshot.documents[name])
        reached(stage_of(name), snapshot.step)
    write_text(temporary / MANIFEST, make_manifest(temporary, snapshot.step, snapshot.num_processes))
    sync_folder(temporary)
    reached("manifest", snapshot.step)


def stage_of(file: str) -> str:
    """Return the stage that writes a file: `random-0.safetensors` belongs to `random`."""
    return re.split(r"[-.]", file)[0]


def order_of_writing(file: str) -> int:
    """Return the place of a file's stage."""
    return STAGES.index(stage_of(file))


def publish(temporary: Path, final: Path, step: int) -> Path:
    """Give a finished folder its name; one that has the name already is kept under another until then."""
    replaced = None
    if final.exists():
        replaced = final.rename(temporary_name(final.parent, f"{step}-replaced"))
        reached("aside", step)
    temporary.rename(final)
    sync_folder(final.parent)
    reached("rename", step)
    if replaced is not None:
        shutil.rmtree(replaced, ignore_errors=True)
    return final


def prune(folder: Path, keep: int) -> None:
    """Remove all but the `keep` newest checkpoints and those that are pointed to; one that stays in the way is said."""
    kept = {*newest_first(folder)[: max(1, keep)], pointed(folder, LATEST), pointed(folder, BEST)}
    for path in newest_first(folder):
        if path not in kept:
            try:
                # renamed first, so that a crash half-way leaves no folder that looks like a damaged checkpoint
                shutil.rmtree(path.rename(temporary_name(folder, path.name)))
            except OSError as error:
                say(f"checkpoint {path.name} could not be removed: {error}")
