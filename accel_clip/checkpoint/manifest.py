"""The manifest of a checkpoint: what it must hold, and whether it still does."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

from accel_clip.checkpoint.snapshot import MODEL, OPTIMIZER, OPTIMIZER_TENSORS, STATE, random_file
from accel_clip.files.whole import file_hash
from accel_clip.typed import Count, Range
from accel_clip.typed_json import WrongContent, read_json

MANIFEST = "manifest.json"
FORMAT = 3
LIBRARIES = ("torch", "accelerate", "open_clip_torch", "accel-clip")


class InvalidCheckpoint(Exception):
    """A folder that is no checkpoint, or no longer; the message is the reason."""


@dataclass(frozen=True)
class ListedFile:
    """A file of a checkpoint in its manifest."""

    bytes: Count
    """its size"""
    blake2b: str
    """its hash, in hexadecimal"""


@dataclass(frozen=True)
class Manifest:
    """What a manifest says."""

    format: Count
    """number of the form in which checkpoints are written"""
    step: Count
    """optimizer steps taken before it"""
    num_processes: Annotated[int, Range(1, 2**20)]
    """processes of the run that wrote it"""
    versions: dict[str, str]
    """versions of the libraries that wrote it, by name"""
    files: dict[str, ListedFile]
    """the checkpoint's files by their names"""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on the disk, and what its manifest says of the run that wrote it."""

    path: Path
    """its folder"""
    step: int
    """optimizer steps taken before it"""
    num_processes: int
    """processes of the run that wrote it"""
    versions: dict[str, str]
    """versions of the libraries that wrote it, by name"""

    @cached_property
    def state(self) -> dict[str, Any]:
        """Return what the run stored beside weights and optimizer, read once: whoever changes it copies it first.

        Raises `WrongContent`, and OSError where it cannot be read.
        """
        state: dict[str, Any] = read_json(self.path / STATE, dict)
        return state

    def version_changes(self) -> list[str]:
        """Return the libraries that are not what they were, as `torch 2.10.0 is now 2.11.0`."""
        now = library_versions()
        changed = [name for name in now if self.versions.get(name) != now[name]]
        return [f"{name} {self.versions.get(name, 'unknown')} is now {now[name]}" for name in changed]


def make_manifest(folder: Path, step: int, num_processes: int) -> str:
    """Return the manifest of the files that stand in a folder."""
    files = {
        name: {"bytes": (folder / name).stat().st_size, "blake2b": file_hash(folder / name)}
        for name in sorted(expected_files(num_processes))
    }
    content = {"format": FORMAT, "step": step, "num_processes": num_processes}
    return json.dumps({**content, "versions": library_versions(), "files": files}, indent=2) + "\n"


def expected_files(num_processes: int) -> set[str]:
    """Return the names of the files that a manifest lists."""
    return {MODEL, OPTIMIZER, OPTIMIZER_TENSORS, STATE, *(random_file(rank) for rank in range(num_processes))}


def verify(path: Path) -> Checkpoint:
    """Return the checkpoint in a folder once every file has the size and the hash that the manifest says.

    Raises `InvalidCheckpoint`.
    """
    files = read_manifest(path).files
    try:
        for name, listed in files.items():
            check_size(path / name, listed.bytes)
        for name, listed in files.items():
            if file_hash(path / name) != listed.blake2b:
                raise InvalidCheckpoint(f"{name} is damaged: its hash is not the one in {MANIFEST}")
    except OSError as error:
        raise InvalidCheckpoint(f"a file cannot be read: {error}") from error
    return read_checkpoint(path)


def read_checkpoint(path: Path) -> Checkpoint:
    """Return the checkpoint in a folder by its manifest alone; raises `InvalidCheckpoint`."""
    manifest = read_manifest(path)
    return Checkpoint(path, manifest.step, manifest.num_processes, manifest.versions)


def check_size(file: Path, listed: int) -> None:
    """Raise `InvalidCheckpoint` unless a file is there with the size that is listed."""
    if not file.is_file():
        raise InvalidCheckpoint(f"{file.name} is missing")
    size = file.stat().st_size
    if size != listed:
        raise InvalidCheckpoint(f"{file.name} has {size} bytes of {listed}")


def read_manifest(path: Path) -> Manifest:
    """Return the manifest of a checkpoint; raises `InvalidCheckpoint` unless it has all its parts."""
    try:
        manifest: Manifest = read_json(path / MANIFEST, Manifest)
    except FileNotFoundError:
        raise InvalidCheckpoint(f"{MANIFEST} is missing") from None
    except OSError as error:
        raise InvalidCheckpoint(f"{MANIFEST} cannot be read: {error}") from error
    except WrongContent as error:
        raise InvalidCheckpoint(str(error)) from error
    if manifest.format != FORMAT:
        raise InvalidCheckpoint(f"its format is {manifest.format} and this version reads {FORMAT}")
    if len(manifest.files) != 4 + manifest.num_processes or set(manifest.files) != expected_files(
        manifest.num_processes
    ):
        raise InvalidCheckpoint(f"{MANIFEST} does not list the files of a checkpoint")
    return manifest


def library_versions() -> dict[str, str]:
    """Return the versions of the libraries that decide the bits of a run."""
    return {name: installed_version(name) for name in LIBRARIES}


def installed_version(name: str) -> str:
    """Return the version of an installed package; a checkout that runs without being installed has none."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
