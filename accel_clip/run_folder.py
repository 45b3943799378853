"""The folder of a run: what stands where, and the status other programs read."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from accel_clip.faults import ConfigError, StorageError


class RunFolder:
    """The paths of one run. Nothing is created before `create()`."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.metrics = self.path / "metrics.jsonl"
        self.status = self.path / "STATUS.json"
        self.bad_samples = self.path / "bad_samples.jsonl"
        self.export = self.path / "export"
        self.features = self.path / "features"

    def refuse_used(self) -> None:
        """Raise `ConfigError` when the folder holds a run or cannot be one."""
        for file in (self.config, self.metrics, self.status):
            if file.exists():
                raise ConfigError(
                    f"output_dir: {self.path} holds a run ({file.name}): name another folder or remove this one"
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

    def write_status(
        self, state: str, step: int, exit_code: int | None = None, error: str | None = None, command: str = ""
    ) -> None:
        """Replace `STATUS.json`; `state` is running, complete, preempted or failed."""
        status = {"state": state, "step": step, "exit_code": exit_code, "error": error, "resume_command": command}
        write_json(self.status, status)

    def write_failure(self, step: int, exit_code: int, error: str) -> None:
        """Say in `STATUS.json` why a run failed, unless another process has said it or the disk is full."""
        try:
            if json.loads(self.status.read_text(encoding="utf-8"))["state"] != "failed":
                self.write_status("failed", step, exit_code, error)
        except (OSError, ValueError, StorageError):
            return


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Replace a JSON file in one go, so that a reader never sees half of it; raises `StorageError`."""
    temporary = file.with_name(file.name + ".tmp")
    try:
        temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        temporary.replace(file)
    except OSError as error:
        raise StorageError(f"{file}: {error}") from error
