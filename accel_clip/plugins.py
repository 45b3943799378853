"""The user's own Python files, which register losses, sources, optimizers and schedules."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from accel_clip import console
from accel_clip.faults import ConfigError


def load_plugins(files: list[str]) -> None:
    """Run each file once; raises `ConfigError` naming the file where it is missing or fails."""
    for file in files:
        path = Path(file).resolve()
        name = f"accel_clip_plugin_{path.stem}"
        loaded = sys.modules.get(name)
        if loaded is not None and loaded.__file__ == str(path):
            continue
        if not path.is_file():
            raise ConfigError(f"plugins: {file} is not a file")
        spec = importlib.util.spec_from_file_location(name, path)
        if spec is None or spec.loader is None:
            raise ConfigError(f"plugins: {file} is not a Python file (its name must end in .py)")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        console.say(f"plugins: running {path}")
        try:
            spec.loader.exec_module(module)
        except ConfigError:
            raise
        except Exception as error:  # whatever the user's code raises is told with the file and the place
            del sys.modules[name]
            raise ConfigError(f"plugins: {file}: {place_of(error, path)}{type(error).__name__}: {error}") from error


def place_of(error: Exception, path: Path) -> str:
    """Return `line N: ` for the last line of the user's file that an error passed through."""
    traceback, line = error.__traceback__, None
    while traceback is not None:
        if traceback.tb_frame.f_code.co_filename == str(path):
            line = traceback.tb_lineno
        traceback = traceback.tb_next
    return f"line {line}: " if line is not None else ""
