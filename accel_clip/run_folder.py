"""The folder of a run: what stands where, and the status other programs read."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from accel_clip.faults import ConfigError, StorageError
from accel_clip.redaction import masked


class RunFolder:
    """The paths of one run. Nothing is created before `create()`."""

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

    def holds_run(self) -> bool:
        """Return whether a run has begun here."""
        return self.config.exists()

    def check(self) -> None:
        """Raise `ConfigError` when the folder cannot be that of a run."""
        for file in (self.metrics, self.status):
            if file.exists() and not self.holds_run():
                raise ConfigError(
                    f"output_dir: {self.path} holds {file.name} without {self.config.name}, so it is not known whose "
                    "it is: name another folder or remove this one"
                )
        parent = self.path
        while not parent.exists() and not parent.is_symlink():
            parent = parent.parent
        if not parent.is_dir():
            raise ConfigError(f"output_dir: {self.path} cannot be created: {parent} is not a folder")
        if not os.access(parent, os.W_OK):
            raise ConfigError(f"output_dir: {self.path} cannot be created: {parent} is not writable")

    def create(self) -> None:
        """Create the folder; raises `StorageError`."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"output_dir: {self.path}: {error}") from error

    def file_sizes(self) -> dict[str, int]:
        """Return the bytes of the files that grow while a run goes on."""
        return {file.name: file.stat().st_size for file in (self.metrics, self.bad_samples) if file.exists()}

    def cut_files(self, sizes: dict[str, int]) -> None:
        """Cut the files that grow back to their sizes at a checkpoint, or to nothing; raises `StorageError`."""
        try:
            for file in (self.metrics, self.bad_samples):
                if file.exists():
                    os.truncate(file, min(sizes.get(file.name, 0), file.stat().st_size))
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
        """Return `STATUS.json`, empty where it cannot be read."""
        try:
            status = json.loads(self.status.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return status if isinstance(status, dict) else {}

    def write_end(self, state: str, step: int, exit_code: int, error: str, command: str) -> None:
        """Say in `STATUS.json` why a run ended early, unless another process has said it or the disk is full."""
        try:
            if self.read_status().get("state") != "failed":
                self.write_status(state, step, exit_code, error, command)
        except StorageError:
            return


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Replace a JSON file in one go, so that a reader never sees half of it; raises `StorageError`."""
    temporary = file.with_name(file.name + ".tmp")
    try:
        temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        temporary.replace(file)
    except OSError as error:
        raise StorageError(f"{file}: {error}") from error
