"""The manifest of a checkpoint: what it must hold, and whether it still does."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from accel_clip.checkpoint.snapshot import MODEL, OPTIMIZER, OPTIMIZER_TENSORS, STATE, random_file
from accel_clip.files.whole import hash_of

MANIFEST = "manifest.json"
FORMAT = 3
LIBRARIES = ("torch", "accelerate", "open_clip_torch", "accel-clip")
NUMBERS = ("format", "step", "num_processes")


class InvalidCheckpoint(Exception):
    """A folder that is no checkpoint, or no longer; the message is the reason."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on the disk: its folder and what its manifest says of the run that wrote it."""

    path: Path
    step: int
    num_processes: int
    versions: dict[str, str]

    def version_changes(self) -> list[str]:
        """Return the libraries that are not what they were, as `torch 2.10.0 is now 2.11.0`."""
        now = library_versions()
        changed = [name for name in now if self.versions.get(name) != now[name]]
        return [f"{name} {self.versions.get(name, 'unknown')} is now {now[name]}" for name in changed]


def make_manifest(folder: Path, step: int, num_processes: int) -> str:
    """Return the manifest of the files that stand in a folder."""
    files = {
        name: {"bytes": (folder / name).stat().st_size, "blake2b": hash_of(folder / name)}
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
    files = read_manifest(path)["files"]
    try:
        for name, listed in files.items():
            check_size(path / name, listed["bytes"])
        for name, listed in files.items():
            if hash_of(path / name) != listed["blake2b"]:
                raise InvalidCheckpoint(f"{name} is damaged: its hash is not the one in {MANIFEST}")
    except OSError as error:
        raise InvalidCheckpoint(f"a file cannot be read: {error}") from error
    return read_checkpoint(path)


def read_checkpoint(path: Path) -> Checkpoint:
    """Return the checkpoint in a folder by its manifest alone; raises `InvalidCheckpoint`."""
    manifest = read_manifest(path)
    return Checkpoint(path, manifest["step"], manifest["num_processes"], manifest["versions"])


def check_size(file: Path, listed: int) -> None:
    """Raise `InvalidCheckpoint` unless a file is there with the size that is listed."""
    if not file.is_file():
        raise InvalidCheckpoint(f"{file.name} is missing")
    size = file.stat().st_size
    if size != listed:
        raise InvalidCheckpoint(f"{file.name} has {size} bytes of {listed}")


def read_manifest(path: Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint; raises `InvalidCheckpoint` unless it has all its parts."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InvalidCheckpoint(f"{MANIFEST} is missing") from None
    except OSError as error:
        raise InvalidCheckpoint(f"{MANIFEST} cannot be read: {error}") from error
    except (ValueError, RecursionError) as error:
        raise InvalidCheckpoint(f"{MANIFEST} is not JSON") from error
    if not isinstance(manifest, dict) or not all(isinstance(manifest.get(key), int) for key in NUMBERS):
        raise InvalidCheckpoint(f"{MANIFEST} lacks one of {', '.join(NUMBERS)}")
    if manifest["format"] != FORMAT:
        raise InvalidCheckpoint(f"its format is {manifest['format']} and this version reads {FORMAT}")
    if not isinstance(manifest.get("versions"), dict) or not lists_all_files(manifest):
        raise InvalidCheckpoint(f"{MANIFEST} does not list the files of a checkpoint")
    return manifest


def lists_all_files(manifest: dict[str, Any]) -> bool:
    """Return whether a manifest gives a size and a hash for exactly the files that make a checkpoint."""
    files, num_processes = manifest.get("files"), manifest["num_processes"]
    if not isinstance(files, dict) or len(files) != 4 + num_processes or set(files) != expected_files(num_processes):
        return False
    return all(isinstance(listed, dict) and {"bytes", "blake2b"} <= set(listed) for listed in files.values())


def library_versions() -> dict[str, str]:
    """Return the versions of the libraries that decide the bits of a run."""
    return {name: installed_version(name) for name in LIBRARIES}


def installed_version(name: str) -> str:
    """Return the version of an installed package; a checkout that runs without being installed has none."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
