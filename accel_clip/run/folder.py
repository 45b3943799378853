"""The folder of a run: what stands where, whose it is, and the status other programs read."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from accel_clip.command_line import CONFIG_MARK, read_settings
from accel_clip.console import is_first_process
from accel_clip.faults import INTERRUPTED_EXIT_CODE, ConfigError, StorageError
from accel_clip.files.json import write_json
from accel_clip.files.kinds import CHECKPOINTS, EXPORT, FEATURES, PICTURES
from accel_clip.files.lock import FolderLock, held_error
from accel_clip.files.marked import MARK, FolderMark, read_mark, require_link, require_own, settle, write_mark
from accel_clip.files.names import unfinished
from accel_clip.files.whole import cut
from accel_clip.redaction import masked
from accel_clip.typed import Count
from accel_clip.typed_json import WrongContent, read_json

SIDES = ("image", "text")
OF_CHECKPOINTS = (MARK, "manifest.json")
MOST_BYTES = 1 << 20  # of a status


@dataclass(frozen=True)
class Status:
    """What `STATUS.json` says."""

    state: str
    """running, complete, failed or preempted"""
    step: Count
    """the optimizer step that it stood at"""
    exit_code: int | None = None
    """what the command ended with, None while it goes"""
    error: str | None = None
    """why it ended, None where nothing went wrong"""
    resume_command: str = ""
    """the command line that goes on with it, empty where none does"""


class RunFolder:
    """The paths of one run. Nothing is created before `create()`; `lock` is held by the first process while it goes."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.metrics = self.path / "metrics.jsonl"
        self.status = self.path / "STATUS.json"
        self.bad_samples = self.path / "bad_samples.jsonl"
        self.export = self.path / "export"
        self.checkpoints = self.path / "checkpoints"
        self.features = self.path / "features"
        self.pictures = self.path / "pictures"
        self.lock = FolderLock(self.path)

    def places(self) -> dict[Path, str]:
        """Return the folders that a run may replace or remove, each with the kind that it must be of."""
        return {self.export: EXPORT, self.pictures: PICTURES, **{self.features / side: FEATURES for side in SIDES}}

    def read_config(self) -> bytes | None:
        """Return the content of `config.yaml` where a run of ours has begun here, else None: alone it may be anybody's.

        A run's begins with a mark, unless a crash has emptied it. Raises `ConfigError` where it cannot be read.
        """
        if not self.config.is_file():
            return None
        try:
            raw = read_settings(self.config)
        except OSError as error:
            if "state" not in self.read_status():
                return None
            raise ConfigError(f"{self.config}: {error}") from error
        return raw if raw.startswith(CONFIG_MARK.encode()) or "state" in self.read_status() else None

    def check(self, used: Iterable[Path], holds_run: bool) -> None:
        """Raise `ConfigError` when the folder cannot be that of a run, or holds what a run would replace.

        used: those of `places()` that the run with the settings at hand would write; holds_run: one has begun here.
        """
        for file in (self.config, self.metrics, self.status, self.bad_samples):
            if file.exists() and not holds_run:
                raise ConfigError(
                    f"output_dir: {self.path} holds {file.name}, and no run has begun there, so it is not known whose "
                    "it is: name another folder or move that away"
                )
        for path in (self.config, self.metrics, self.status, self.bad_samples, self.checkpoints):
            require_link(path, "output_dir")
        for place in used:
            require_own(place, self.places()[place], "output_dir")
        self.check_parent()

    def check_checkpoints(self, holds_run: bool) -> None:
        """Raise `ConfigError` where folders are named like checkpoints and are none, or those of a run are gone."""
        named = sorted(path for path in self.checkpoints.glob("step-*") if path.is_dir())
        for path in named:
            if path.name.removeprefix("step-").isdigit() and not any((path / each).exists() for each in OF_CHECKPOINTS):
                raise ConfigError(
                    f"output_dir: {path} has the name of a checkpoint and is none: move it away, or name another folder"
                )
        had_some = (self.checkpoints / "LATEST").is_file() or read_mark(self.checkpoints) is None
        if holds_run and had_some and not named:
            raise ConfigError(
                f"output_dir: {self.path} holds a run, and {self.checkpoints} none of its checkpoints: mount or put "
                "back what is missing, or name another output_dir to begin anew"
            )

    def check_parent(self) -> None:
        """Raise `ConfigError` where the folder cannot be created."""
        parent = self.path
        while not parent.exists() and not parent.is_symlink():
            parent = parent.parent
        if not parent.is_dir():
            raise ConfigError(f"output_dir: {self.path} cannot be created: {parent} is not a folder")
        if not os.access(parent, os.W_OK):
            raise ConfigError(f"output_dir: {self.path} cannot be created: {parent} is not writable")

    def own(self) -> None:
        """Make the folder this process's until `lock` is released; raises `ConfigError` while another one owns it."""
        try:
            if not self.lock.take():
                raise held_error(self.path)
        except OSError as error:
            raise StorageError(f"output_dir: {self.path}: {error}") from error

    def tidy(self) -> None:
        """Finish or undo what a kill left in the folder, if anything; raises `StorageError`, `ConfigError`."""
        if any(unfinished(folder) for folder in {self.path, *(place.resolve().parent for place in self.places())}):
            with self.lock:
                self.settle()

    def settle(self) -> None:
        """Own the folder, and finish or undo what a kill left in it; raises `StorageError`, `ConfigError`."""
        self.own()
        try:
            for place in self.places():
                settle(place.resolve().parent, place.resolve())
            settle(self.path)
        except OSError as error:
            raise StorageError(f"output_dir: {self.path}: {error}") from error

    def create(self) -> None:
        """Create the folder and own it, in order; raises `StorageError`, `ConfigError`."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.settle()
            self.lock.sign()
            if read_mark(self.checkpoints) is None:
                self.checkpoints.mkdir(exist_ok=True)
                write_mark(self.checkpoints, FolderMark(CHECKPOINTS, {}))
        except OSError as error:
            raise StorageError(f"output_dir: {self.path}: {error}") from error

    def require_no_checkpoint(self) -> None:
        """Raise `ConfigError` where a run that begins anew would take back what another one has done here."""
        if (self.checkpoints / "LATEST").is_file():
            raise ConfigError(
                f"output_dir: the run in {self.path} has come further, and none of its checkpoints can be used: put "
                f"one back, name another output_dir, or remove {self.checkpoints / 'LATEST'} to begin anew here"
            )

    def file_sizes(self) -> dict[str, int]:
        """Return the bytes of the files that grow while a run goes on."""
        return {file.name: file.stat().st_size for file in (self.metrics, self.bad_samples) if file.exists()}

    def cut_files(self, sizes: dict[str, int]) -> None:
        """Cut the files that grow back to their sizes at a checkpoint, or to nothing; raises `StorageError`."""
        try:
            for file in (self.metrics, self.bad_samples):
                cut(file, sizes.get(file.name, 0))
        except OSError as error:
            raise StorageError(f"{self.path}: {error}") from error

    def write_status(
        self, state: str, step: int, exit_code: int | None = None, error: str | None = None, command: str = ""
    ) -> None:
        """Replace `STATUS.json`; `state` is running, complete, preempted or failed."""
        error = None if error is None else masked(error)
        status = {"state": state, "step": step, "exit_code": exit_code, "error": error, "resume_command": command}
        write_json(self.status, status)

    def read_status(self) -> dict[str, Any]:
        """Return `STATUS.json`, empty where it cannot be read or is of another kind."""
        try:
            return asdict(read_json(self.status, Status, MOST_BYTES))
        except (OSError, WrongContent):
            return {}

    def write_end(self, state: str, step: int, exit_code: int, error: str, command: str) -> None:
        """Say in `STATUS.json` why a run ended early, unless another process has said it or the disk is full."""
        try:
            if self.read_status().get("state") != "failed":
                self.write_status(state, step, exit_code, error, command)
        except StorageError:
            return

    def note_interrupted_start(self) -> None:
        """Say in `STATUS.json` that a start was interrupted, where it calls the run running since a kill."""
        status = self.read_status()
        if not is_first_process() or status.get("state") != "running":
            return
        with suppress(OSError):
            if self.lock.take():  # else it is another process that runs
                step, command = status.get("step", 0), status.get("resume_command", "")
                self.write_end("preempted", step, INTERRUPTED_EXIT_CODE, "interrupted", command)
