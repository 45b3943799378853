"""What becomes of a run folder with the settings that are given now: a run that begins, goes on, is over or refused."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any, Literal

from accel_clip.checkpoint.folders import newest_first
from accel_clip.checkpoint.saved_state import ModelState
from accel_clip.command_line import config_in, config_of, known_keys
from accel_clip.config import Config
from accel_clip.console import is_first_process, say
from accel_clip.faults import ConfigError
from accel_clip.files.lock import held_error, is_held
from accel_clip.files.marked import will_stand_whole
from accel_clip.run.folder import RunFolder
from accel_clip.run.rates import with_rates
from accel_clip.typed_json import WrongContent, read_json

MAY_CHANGE = (
    *("output_dir", "train.epochs", "train.steps", "train.micro_batch_size", "train.activation_gib", "train.threads"),
    *("train.timeout", "data.workers", "data.prefetch", "data.image_root", "data.image_cache_gib"),
    *("hooks", "optim.length", "eval.", "checkpoint.", "track.", "stop."),
)
"""Settings, or sections ending in a dot, that decide nothing about the steps that were taken."""
LENGTHENS = ("train.epochs", "train.steps")

Changes = Mapping[str, tuple[Any, Any]]
"""Settings that differ by dotted key, each with what it was and what it is now."""


@dataclass(frozen=True)
class Decision:
    """What becomes of a run's folder, decided once a start by what it holds before anything is written."""

    kind: Literal["new", "goes on", "complete", "refused"]
    """what the run is: one that begins, one in the folder that goes on, or one that is left as it is"""
    changes: Changes
    """settings of the run in the folder that are others now, empty without one"""
    described: ModelState | None
    """how the newest checkpoint describes the model, None where none is gone on from or none says"""
    config: Config
    """the settings, with the rates that were left open"""
    refusal: ConfigError | None = None
    """why the folder cannot be used, or holds a run that these settings do not continue"""

    def require_allowed(self) -> None:
        """Raise `ConfigError` where the run is refused."""
        if self.refusal is not None:
            raise self.refusal

    def say_changes(self, folder: Path) -> None:
        """Say which settings of the run in the folder have changed."""
        changed = [f"{key} {before!r} -> {now!r}" for key, (before, now) in self.changes.items() if key != "output_dir"]
        if changed:
            say(f"the run in {folder} goes on with changed settings: {', '.join(changed)}")


def decide(config: Config) -> Decision:
    """Return what becomes of the folder of a run with these settings; what is read of it is read once."""
    folder, described = RunFolder(config.output_dir), described_model(config)
    try:
        if is_first_process() and is_held(folder.path):
            raise held_error(folder.path)
        saved = saved_settings(folder, config)
        config = with_rates(config, saved)
        changes = {} if saved is None else differences(saved, config)
        is_over = saved is not None and is_complete(folder, config, changes)
        folder.check([] if is_over else written_folders(folder, config), holds_run=saved is not None)
        if not is_over:
            folder.check_checkpoints(holds_run=saved is not None)
        if saved is not None:
            require_continued(folder, config, changes)
    except ConfigError as refusal:
        return Decision("refused", {}, described, with_rates(config, None), refusal)
    kind: Literal["new", "complete", "goes on"] = "new" if saved is None else "complete" if is_over else "goes on"
    return Decision(kind, changes, described, config)


def written_folders(folder: RunFolder, config: Config) -> list[Path]:
    """Return the folders in that of a run which a run with these settings writes as a whole."""
    written = [folder.export]
    if config.data.image_cache_gib:
        written.append(folder.pictures)
    if config.cached_tower is not None:
        written.append(folder.features / config.cached_tower)
    return written


def require_continued(folder: RunFolder, config: Config, changes: Changes) -> None:
    """Raise `ConfigError` where the run in the folder cannot be the one that these settings are for."""
    if config.checkpoint.resume == "never":
        raise ConfigError(
            f"checkpoint.resume: never, and {folder.path} holds a run: name another output_dir, or remove this one"
        )
    for key, (before, now) in changes.items():
        if not may_change(key):
            raise ConfigError(
                f"{key}: {folder.path} holds a run with {before!r}, and now it is {now!r}: set it back to continue "
                "that run, or name another output_dir to start a new one"
            )


def saved_settings(folder: RunFolder, otherwise: Config) -> Config | None:
    """Return the settings of the run in a folder, None without one.

    Those of its newest checkpoint where a crash has emptied `config.yaml`, and `otherwise` where no checkpoint says.
    Raises `ConfigError` where they cannot be read.
    """
    raw = folder.read_config()
    if raw is None or raw:
        return None if raw is None else config_in(raw, folder.config)
    for checkpoint in newest_first(folder.checkpoints):
        with suppress(OSError, WrongContent, ConfigError):
            return config_of(read_json(checkpoint / "state.json", WithSettings).config)
    return otherwise


@dataclass(frozen=True)
class WithSettings:
    """What of a checkpoint's `state.json` tells the settings of its run."""

    config: dict
    """as `config.yaml` has them"""


@dataclass(frozen=True)
class WithModel:
    """What of a checkpoint's `state.json` describes the model."""

    model: ModelState
    """what the model's export would say"""


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


def is_complete(folder: RunFolder, config: Config, changed: Iterable[str]) -> bool:
    """Return whether the run in the folder is complete, with its export, and the settings do not make it longer.

    changed: the settings that it did not have.
    """
    changed = set(changed)
    begins_anew = config.checkpoint.resume != "auto" and "checkpoint.resume" in changed
    if folder.read_status().get("state") != "complete" or begins_anew or changed & set(LENGTHENS):
        return False
    return will_stand_whole(folder.export)


def differences(before: Config, now: Config) -> dict[str, tuple[Any, Any]]:
    """Return the settings that differ by dotted key, with both values."""
    old, new = values_by_key(before), values_by_key(now)
    return {key: (old[key], new[key]) for key in old if old[key] != new[key]}


def values_by_key(config: Config) -> dict[str, Any]:
    """Return every setting by its dotted key; settings that are dictionaries themselves stay whole."""
    settings = config.to_dict()
    return {key: as_json_gives_back(reduce(getitem, key.split("."), settings)) for key in known_keys()}


def as_json_gives_back(value: Any) -> Any:
    """Return a setting as JSON gives it back, so that a tuple equals a list."""
    return json.loads(json.dumps(value))


def may_change(key: str) -> bool:
    """Return whether a run may go on with another value of a setting."""
    return any(key == each or (each.endswith(".") and key.startswith(each)) for each in MAY_CHANGE)
