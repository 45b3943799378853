"""Whether the files of a checkpoint, whole by their hashes, also hold what a run can go on from."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from accel_clip.checkpoint.manifest import MANIFEST, Checkpoint, InvalidCheckpoint, expected_files
from accel_clip.checkpoint.saved_state import SavedState
from accel_clip.checkpoint.snapshot import OPTIMIZER, OPTIMIZER_TENSORS, STATE
from accel_clip.checkpoint.tensors import unflatten
from accel_clip.faults import one_line
from accel_clip.typed_json import WrongContent, fit_json, read_json

ContentCheck = Callable[[Checkpoint], None]
"""A look at a checkpoint; it raises `InvalidCheckpoint`."""


def check_contents(checkpoint: Checkpoint) -> None:
    """Raise `InvalidCheckpoint` for a file that cannot be read, or an optimizer's state that is none."""
    names = {
        name: tensor_names(checkpoint.path / name)
        for name in sorted(expected_files(checkpoint.num_processes))
        if name.endswith(".safetensors")
    }
    check_stored_optimizer(checkpoint.path / OPTIMIZER, names[OPTIMIZER_TENSORS])


def tensor_names(file: Path) -> list[str]:
    """Return the names of the tensors in a file by its header; raises `InvalidCheckpoint`."""
    try:
        with safe_open(file, framework="pt") as opened:
            return list(opened.keys())
    except (OSError, SafetensorError) as error:
        raise InvalidCheckpoint(f"{file.name} cannot be read: {one_line(error)}") from error


def check_stored_optimizer(file: Path, tensors: Iterable[str]) -> None:
    """Raise `InvalidCheckpoint` unless a file holds the state of an optimizer whose tensors have these names."""
    try:
        state = unflatten(read_json(file, dict), dict.fromkeys(tensors, torch.empty(0)))
    except WrongContent as error:
        raise InvalidCheckpoint(str(error)) from error
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise InvalidCheckpoint(f"{file.name} holds no state of an optimizer: {one_line(error)}") from error
    groups = state.get("param_groups") if isinstance(state, dict) else None
    right = isinstance(groups, list) and all(isinstance(group, dict) for group in groups)
    if not right or not isinstance(state.get("state"), dict):
        raise InvalidCheckpoint(f"{file.name} holds no state of an optimizer: it lacks param_groups or state")


def read_state(checkpoint: Checkpoint) -> SavedState:
    """Return what a checkpoint holds beside weights, optimizer and random states; raises `InvalidCheckpoint`."""
    try:
        state: SavedState = fit_json(checkpoint.state, SavedState, STATE)
    except WrongContent as error:
        raise InvalidCheckpoint(str(error)) from error
    return state


def check_run(checkpoint: Checkpoint, batches_per_step: int = 1, is_exact: bool = False) -> None:
    """Raise `InvalidCheckpoint` for files as `check_contents` does, and for a state that no run can have been in.

    batches_per_step: `train.accumulate`, or 1 where it is not known; is_exact: each step took as many, as where no run
    is rolled back past some.
    """
    check_contents(checkpoint)
    run = read_state(checkpoint).run
    if run.step != checkpoint.step:
        raise InvalidCheckpoint(f"{STATE}: run.step is {run.step}, and {checkpoint.step} in {MANIFEST}")
    least = run.step * batches_per_step
    if run.next_batch < least or (is_exact and run.next_batch != least) or run.next_batch % batches_per_step:
        raise InvalidCheckpoint(f"{STATE}: run.next_batch is {run.next_batch}, and {run.step} steps take {least}")
    if (run.evaluated_step or 0) > run.step:
        raise InvalidCheckpoint(f"{STATE}: run.evaluated_step is {run.evaluated_step}, after step {run.step}")
