"""The checkpoint to go on from: whole ones only, whatever killed the run that wrote them."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast

from accel_clip.checkpoint.contents import ContentCheck, check_contents
from accel_clip.checkpoint.folders import BEST, folder_name, newest_first, pointed, step_of
from accel_clip.checkpoint.manifest import Checkpoint, InvalidCheckpoint, read_checkpoint, verify
from accel_clip.console import say
from accel_clip.faults import ConfigError, StorageError
from accel_clip.files.marked import set_aside, settle


def recover(folder: Path) -> None:
    """Put right what a dead run left: a checkpoint that is whole gets its name, any other is removed.

    For the start of a run, by one process, before `find_newest`. Raises `StorageError`.
    """
    try:
        settle(folder)
    except OSError as error:
        raise StorageError(f"{folder}: what a killed run left could not be removed: {error}") from error


def find_newest(folder: Path, check: ContentCheck = check_contents) -> Checkpoint | None:
    """Return the newest checkpoint that verifies, None when there is none.

    For one process: damaged ones are renamed to `step-….corrupt`, and one line says why and what is used instead.
    """
    damaged: list[str] = []
    newest = None
    for path in newest_first(folder):
        try:
            newest = verify_step(path, check)
            break
        except InvalidCheckpoint as reason:
            damaged.append(f"{path.name}: {reason} (now {set_aside(path, 'corrupt').name})")
    if damaged:
        used = "there is no other" if newest is None else f"{newest.path.name} is used instead"
        say(f"warning: damaged checkpoint {'; '.join(damaged)}; {used}")
    return newest


def find_whole(folder: Path, check: ContentCheck = check_contents) -> Checkpoint | None:
    """Return the newest checkpoint that verifies, None when there is none; damaged ones stay where they are."""
    for path in newest_first(folder):
        with suppress(InvalidCheckpoint):
            return verify_step(path, check)
    return None


def find_newest_for_all(
    accelerator: Accelerator, folder: Path, check: ContentCheck = check_contents
) -> Checkpoint | None:
    """Clean up and search on the first process, and return what it found on every one.

    Collective. Raises `ConfigError` on a machine that does not see the folder.
    """
    newest = None
    if accelerator.is_main_process:
        recover(folder)
        newest = find_newest(folder, check)
    found = torch.tensor(-1 if newest is None else newest.step, device=accelerator.device)
    step = int(broadcast(found))
    if newest is not None or step < 0:
        return newest
    path = folder / folder_name(step)
    try:
        return read_checkpoint(path)
    except InvalidCheckpoint as reason:
        raise ConfigError(f"output_dir: {path}: {reason}: all machines must share the folder of the run") from reason


def find_best(folder: Path, check: ContentCheck = check_contents) -> Checkpoint | None:
    """Return the checkpoint that `BEST` points to, None when there is none that verifies."""
    path = pointed(folder, BEST)
    try:
        return None if path is None else verify_step(path, check)
    except InvalidCheckpoint as reason:
        say(f"warning: the best checkpoint cannot be used: {path}: {reason}")
        return None


def open_checkpoint(path: Path, check: ContentCheck = check_contents) -> Checkpoint:
    """Return the checkpoint in a folder that the user named; raises `ConfigError` when it does not verify."""
    try:
        checkpoint = verify(path)
        check(checkpoint)
        return checkpoint
    except InvalidCheckpoint as reason:
        raise ConfigError(
            f"checkpoint.resume: {path} cannot be used: {reason}: name another step-… folder, or use 'auto'"
        ) from reason


def verify_step(path: Path, check: ContentCheck) -> Checkpoint:
    """Verify a checkpoint under the name of its step, and what it holds; raises `InvalidCheckpoint`."""
    checkpoint = verify(path)
    if checkpoint.step != step_of(path):
        raise InvalidCheckpoint(f"it holds step {checkpoint.step}")
    check(checkpoint)
    return checkpoint
