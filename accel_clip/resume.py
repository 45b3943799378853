"""Whether the run in a folder goes on with the settings that are given now."""

from __future__ import annotations

import json
from functools import reduce
from operator import getitem
from typing import Any

from accel_clip.command_line import known_keys, load_config
from accel_clip.config import Config
from accel_clip.console import say
from accel_clip.faults import ConfigError
from accel_clip.run_folder import RunFolder

MAY_CHANGE = (
    *("output_dir", "train.epochs", "train.steps", "train.micro_batch_size", "train.activation_gib", "train.threads"),
    *("train.timeout", "data.workers", "data.prefetch", "data.image_root", "data.image_cache_gib"),
    *("eval.", "checkpoint.", "track.", "stop."),
)
"""Settings, or sections ending in a dot, that decide nothing about the steps that were taken."""
LENGTHENS = ("train.epochs", "train.steps")


def check_folder(config: Config) -> None:
    """Raise `ConfigError` where the run folder cannot be used, or holds a run that these settings do not continue."""
    folder = RunFolder(config.output_dir)
    folder.check()
    if not folder.holds_run():
        return
    if config.checkpoint.resume == "never":
        raise ConfigError(
            f"checkpoint.resume: never, and {folder.path} holds a run: name another output_dir, or remove this one"
        )
    changed = differences(load_config(folder.config), config)
    for key, (before, now) in changed.items():
        if not may_change(key):
            raise ConfigError(
                f"{key}: {folder.path} holds a run with {before!r}, and now it is {now!r}: set it back to continue "
                "that run, or name another output_dir to start a new one"
            )


def say_changes(config: Config) -> None:
    """Say which settings of the run in the folder have changed, where it holds one."""
    folder = RunFolder(config.output_dir)
    changed = differences(load_config(folder.config), config) if folder.holds_run() else {}
    told = [f"{key} {before!r} -> {now!r}" for key, (before, now) in changed.items() if key != "output_dir"]
    if told:
        say(f"the run in {folder.path} goes on with changed settings: {', '.join(told)}")


def is_finished(config: Config) -> bool:
    """Return whether the run in the folder is complete and these settings do not make it longer."""
    folder = RunFolder(config.output_dir)
    if config.checkpoint.resume != "auto" or not folder.holds_run() or folder.read_status().get("state") != "complete":
        return False
    return not any(key in LENGTHENS for key in differences(load_config(folder.config), config))


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
