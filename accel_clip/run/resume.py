"""Whether the run in a folder goes on with the settings that are given now."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

from accel_clip.checkpoint.folders import newest_first
from accel_clip.checkpoint.saved_state import ModelState
from accel_clip.command_line import config_of, known_keys, load_config
from accel_clip.config import Config
from accel_clip.console import is_first_process, say
from accel_clip.faults import ConfigError
from accel_clip.files.lock import held_error, is_held
from accel_clip.files.marked import stands_whole
from accel_clip.run.folder import RunFolder
from accel_clip.typed_json import WrongContent, read_json

MAY_CHANGE = (
    *("output_dir", "train.epochs", "train.steps", "train.micro_batch_size", "train.activation_gib", "train.threads"),
    *("train.timeout", "data.workers", "data.prefetch", "data.image_root", "data.image_cache_gib"),
    *("eval.", "checkpoint.", "track.", "stop."),
)
"""Settings, or sections ending in a dot, that decide nothing about the steps that were taken."""
LENGTHENS = ("train.epochs", "train.steps")


@dataclass(frozen=True)
class WithSettings:
    """What of a checkpoint's `state.json` tells the settings of its run."""

    config: dict


def check_folder(config: Config) -> None:
    """Raise `ConfigError` where the run folder cannot be used, or holds a run that these settings do not continue."""
    folder = RunFolder(config.output_dir)
    if is_first_process() and is_held(folder.path):
        raise held_error(folder.path)
    is_over = is_finished(config)
    folder.check([] if is_over else written_folders(folder, config))
    if not is_over:
        folder.check_checkpoints()
    if not folder.holds_run():
        return
    if config.checkpoint.resume == "never":
        raise ConfigError(
            f"checkpoint.resume: never, and {folder.path} holds a run: name another output_dir, or remove this one"
        )
    for key, (before, now) in differences(settings_of(folder, config), config).items():
        if not may_change(key):
            raise ConfigError(
                f"{key}: {folder.path} holds a run with {before!r}, and now it is {now!r}: set it back to continue "
                "that run, or name another output_dir to start a new one"
            )


def written_folders(folder: RunFolder, config: Config) -> list[Path]:
    """Return the folders in that of a run which a run with these settings writes as a whole."""
    written = [folder.export]
    if config.data.image_cache_gib:
        written.append(folder.pictures)
    if config.cached_tower is not None:
        written.append(folder.features / config.cached_tower)
    return written


def settings_of(folder: RunFolder, otherwise: Config) -> Config:
    """Return the settings of the run in a folder: from its newest checkpoint where a crash has emptied `config.yaml`.

    otherwise: what they are taken to be where no checkpoint says.
    """
    if folder.config.stat().st_size:
        return load_config(folder.config)
    for checkpoint in newest_first(folder.checkpoints):
        with suppress(OSError, WrongContent, ConfigError):
            return config_of(read_json(checkpoint / "state.json", WithSettings).config)
    return otherwise


@dataclass(frozen=True)
class WithModel:
    """What of a checkpoint's `state.json` describes the model."""

    model: ModelState


def described_model(config: Config) -> ModelState | None:
    """Return how the newest checkpoint describes the model of the run that goes on, None where none does."""
    chosen = config.checkpoint.resume
    if chosen == "never":
        return None
    paths = newest_first(RunFolder(config.output_dir).checkpoints) if chosen == "auto" else [Path(chosen)]
    for checkpoint in paths:
        with suppress(OSError, WrongContent):
            return read_json(checkpoint / "state.json", WithModel).model
    return None


def say_changes(config: Config) -> None:
    """Say which settings of the run in the folder have changed, where it holds one."""
    folder = RunFolder(config.output_dir)
    changed = differences(settings_of(folder, config), config) if folder.holds_run() else {}
    told = [f"{key} {before!r} -> {now!r}" for key, (before, now) in changed.items() if key != "output_dir"]
    if told:
        say(f"the run in {folder.path} goes on with changed settings: {', '.join(told)}")


def is_finished(config: Config) -> bool:
    """Return whether the run in the folder is complete, with its export, and these settings do not make it longer."""
    folder = RunFolder(config.output_dir)
    if not folder.holds_run() or folder.read_status().get("state") != "complete":
        return False
    changed = differences(settings_of(folder, config), config)
    begins_anew = config.checkpoint.resume != "auto" and "checkpoint.resume" in changed
    return stands_whole(folder.export) and not begins_anew and not any(key in LENGTHENS for key in changed)


def differences(before: Config, now: Config) -> dict[str, tuple[Any, Any]]:
    """Return the settings that differ by dotted key, with both values."""
    old, new = flattened(before), flattened(now)
    return {key: (old[key], new[key]) for key in old if old[key] != new[key]}


def flattened(config: Config) -> dict[str, Any]:
    """Return every setting by its dotted key; settings that are dictionaries themselves stay whole."""
    settings = config.to_dict()
    return {key: plain(reduce(getitem, key.split("."), settings)) for key in known_keys()}


def plain(value: Any) -> Any:
    """Return a setting as JSON gives it back, so that a tuple equals a list."""
    return json.loads(json.dumps(value))


def may_change(key: str) -> bool:
    """Return whether a run may go on with another value of a setting."""
    return any(key == each or (each.endswith(".") and key.startswith(each)) for each in MAY_CHANGE)
