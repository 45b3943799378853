"""Checkpoints of a run: when one is due, what it holds, and how all processes take part in it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.optim import Optimizer

from accel_clip.checkpoint.background import Writer
from accel_clip.checkpoint.contents import ContentCheck
from accel_clip.checkpoint.find import find_newest, find_newest_for_all, open_checkpoint
from accel_clip.checkpoint.folders import BEST, folder_name, point, pointed, set_aside_newer
from accel_clip.checkpoint.manifest import Checkpoint
from accel_clip.checkpoint.restore import load_state, restore, restore_random
from accel_clip.checkpoint.snapshot import expected_bytes, gather_random_states, take_snapshot
from accel_clip.checkpoint.storage import check_space
from accel_clip.config import CheckpointConfig
from accel_clip.console import say
from accel_clip.faults import StorageError
from accel_clip.process.accelerator import known_to_all, raise_for_all
from accel_clip.randomness import derive_seed


class Saver:
    """Saves a run and puts it back. The first process writes; every process takes part, so that all know how it went.

    parts: the unwrapped model and the loss; scaler: the state of fp16's gradient scaler goes with them; check: whether
    a checkpoint is one of a run with these settings.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        folder: Path,
        config: CheckpointConfig,
        parts: nn.Module,
        optimizer: Optimizer,
        check: ContentCheck,
    ) -> None:
        self.accelerator, self.folder, self.config = accelerator, folder, config
        self.parts, self.optimizer, self.check = parts, optimizer, check
        self.writer = Writer(folder, config.keep) if accelerator.is_main_process else None
        self.error: StorageError | None = None
        self.begin = self.last_save = time.monotonic()

    def check_space(self) -> None:
        """Raise `StorageError` on every process unless there is room for a checkpoint; collective."""
        needed = expected_bytes(self.parts, self.optimizer)
        raise_for_all(self.accelerator, self.attempt(lambda: check_space(self.folder, needed)))

    def is_due(self, step: int) -> bool:
        """Return whether the first process wants the state after `step` saved; False on the others."""
        every, minutes = self.config.every, self.config.minutes
        if self.writer is None:
            return False
        by_steps = every is not None and step % every == 0
        return by_steps or (minutes is not None and time.monotonic() - self.last_save >= 60 * minutes)

    def has_failed(self) -> bool:
        """Return whether writing has failed since the last look; False on processes that do not write."""
        if self.writer is not None and self.error is None:
            self.error = self.attempt(self.writer.poll)
        return self.error is not None

    def save(self, step: int, state: dict[str, Any], is_best: bool) -> None:
        """Take a snapshot and start to write it; collective. What goes wrong is told by `has_failed`."""
        random_states = gather_random_states(self.accelerator)
        scaler = self.accelerator.scaler
        state = {**state, "scaler": None if scaler is None else scaler.state_dict(), "resume": self.config.resume}
        self.last_save = time.monotonic()
        if self.writer is not None and self.error is None:
            writer = self.writer
            snapshot = take_snapshot(step, self.parts, self.optimizer, random_states, state, is_best)
            self.error = self.attempt(lambda: writer.submit(snapshot))

    def finish(self) -> None:
        """Wait for what is being written; collective. Raises `StorageError` on every process when it failed."""
        self.settle()
        raise_for_all(self.accelerator, self.error)

    def settle(self) -> None:
        """Let a write in flight come to its end, whatever that is: for a run that fails; no collective."""
        if self.writer is not None and self.error is None:
            self.error = self.attempt(self.writer.wait)

    def share_of_time(self) -> float:
        """Return the share of the run's time that checkpoints took from the training; 0 on other processes."""
        if self.writer is None:
            return 0.0
        return self.writer.blocking_seconds / max(time.monotonic() - self.begin, 1e-9)

    def find(self) -> Checkpoint | None:
        """Return the checkpoint to go on from, the same on every process; collective.

        A path in `checkpoint.resume` is where the run begins: once it has a newer checkpoint that came from there, or
        of its own where the path leads to another run, it goes on from that. Raises `ConfigError` for a path that
        cannot be used.
        """
        resume, newest = self.config.resume, find_newest_for_all(self.accelerator, self.folder, self.check)
        if resume in ("auto", "never") or (newest is not None and load_state(newest).get("resume") == resume):
            return newest
        named = open_checkpoint(Path(resume), self.check)
        self.accelerator.wait_for_everyone()
        if self.is_own(named):
            if self.accelerator.is_main_process:
                set_aside_newer(self.folder, named.step)
        elif newest is not None and newest.step > named.step:
            say(f"checkpoint.resume: {self.folder} has {newest.path.name}, which is newer than {named.path}")
            return newest
        return named

    def is_own(self, checkpoint: Checkpoint) -> bool:
        """Return whether a checkpoint lies in the folder of this run."""
        return checkpoint.path.resolve().parent == self.folder.resolve()

    def file_sizes(self, checkpoint: Checkpoint | None) -> dict[str, int]:
        """Return how much of the files that grow belongs to this run where it goes on; nothing of another run's."""
        own = checkpoint if checkpoint is None or self.is_own(checkpoint) else find_newest(self.folder, self.check)
        return {} if own is None else load_state(own)["file_sizes"]

    def point_to_best(self, step: int) -> None:
        """Make `BEST` name the checkpoint of a step, which a kill may have come before; collective."""
        with known_to_all(self.accelerator):
            if self.writer is not None and pointed(self.folder, BEST) != self.folder / folder_name(step):
                try:
                    point(self.folder, BEST, step)
                except OSError as error:
                    raise StorageError(f"{self.folder / BEST}: {error}") from error

    def restore(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """Put weights and optimizer back and return the rest of the state."""
        state = restore(checkpoint, self.parts, self.optimizer)
        if self.accelerator.scaler is not None and state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        return state

    def restore_random(self, checkpoint: Checkpoint, seed: int) -> None:
        """Put the random states back; last before the first step. Another number of processes gets new ones."""
        accelerator = self.accelerator
        same = checkpoint.num_processes == accelerator.num_processes
        if not (same and restore_random(checkpoint, accelerator.process_index, accelerator.device)):
            torch.manual_seed(derive_seed(seed, "dropout", accelerator.process_index, checkpoint.step))
        for change in checkpoint.version_changes():
            say(f"warning: {change}: from here on the run is equal to rounding only")

    def attempt(self, action: Callable[[], object]) -> StorageError | None:
        """Return the `StorageError` that an action of the first process raises, None when there is none."""
        if not self.accelerator.is_main_process:
            return None
        try:
            action()
        except StorageError as error:
            return error
        return None
