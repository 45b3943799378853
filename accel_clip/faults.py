"""What can go wrong, as error types with the exit code each of them stands for."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable


class AccelClipError(Exception):
    """An error whose message is meant for the person who started the command."""

    exit_code = 1
    on_every_process = True  # whether all processes raise it alike, so that the first may speak for all


class ConfigError(AccelClipError):
    """A setting, a command line or a launch that cannot work."""

    exit_code = 2


class DataError(AccelClipError):
    """Data or a download that is missing or cannot be used."""

    exit_code = 3


class NonFiniteError(AccelClipError):
    """A loss or a gradient that is not a finite number."""

    exit_code = 4


class StorageError(AccelClipError):
    """A file that could not be written."""

    exit_code = 5


INTERRUPTED_EXIT_CODE = 130  # 128 + SIGINT, what shells report for Ctrl-C
KILLED_EXIT_CODE = 9  # of a crash that a test asked for


def exit_code_of(error: BaseException) -> int:
    """Return the exit code that an error stands for; 1 is a bug."""
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED_EXIT_CODE
    return error.exit_code if isinstance(error, AccelClipError) else 1


def describe(error: BaseException) -> str:
    """Return an error in one line for `STATUS.json`."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    return str(error) if isinstance(error, AccelClipError) else f"{type(error).__name__}: {error}"


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `, did you mean 'x'?` for the known name closest to `name`, or an empty string."""
    originals = {entry.lower(): entry for entry in known}
    matches = difflib.get_close_matches(name.lower(), originals, n=1, cutoff=0.5)
    return f", did you mean '{originals[matches[0]]}'?" if matches else ""


def reached(stage: str, step: int) -> None:
    """End this process at once if `ACCEL_CLIP_FAULT` names the stage (`rename` or `rename:12`), to test crashes."""
    if os.environ.get("ACCEL_CLIP_FAULT") in (stage, f"{stage}:{step}"):
        os._exit(KILLED_EXIT_CODE)
