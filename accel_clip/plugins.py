"""The user's own Python files, which register losses, sources, optimizers, schedules, evaluators and hooks."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accel_clip import console
from accel_clip.faults import AccelClipError, ConfigError, PluginError, one_line, recognised

PREFIX = "accel_clip_plugin_"  # of the names of their modules


class PluginsFirst:
    """What goes to other processes; plugins that were run in this one run there before anything that is made of them.

    A forked process has them already. Another one starts empty, and asks for a plugin's module as soon as an object of
    its classes arrives: what comes before an object's state in its pickled form is done first.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return begin, (type(self), loaded_plugins()), self.__dict__


def begin(kind: type[PluginsFirst], files: list[str]) -> PluginsFirst:
    """Run the plugins and return an object without a state."""
    for file in files:
        if not is_loaded(file):
            run_plugin(file)
    return kind.__new__(kind)


def loaded_plugins() -> list[str]:
    """Return the files of the plugins that were run in this process, in their order."""
    return [str(module.__file__) for name, module in sys.modules.items() if name.startswith(PREFIX)]


def load_plugins(files: list[str]) -> None:
    """Run each file once and say so; raises `ConfigError` naming the file where it is missing or fails."""
    for file in files:
        if not is_loaded(file):
            if Path(file).is_file():
                console.say(f"plugins: running {Path(file).resolve()}")
            run_plugin(file)


def is_loaded(file: str) -> bool:
    """Return whether a plugin has been run in this process."""
    loaded = sys.modules.get(PREFIX + Path(file).stem)
    return loaded is not None and loaded.__file__ == str(Path(file).resolve())


def run_plugin(file: str) -> None:
    """Run a file as a module; raises `ConfigError` naming the file where it is missing or fails."""
    path = Path(file).resolve()
    name = PREFIX + path.stem
    if not path.is_file():
        raise ConfigError(f"plugins: {file} is not a file")
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"plugins: {file} is not a Python file (its name must end in .py)")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except ConfigError:
        raise
    except Exception as error:  # whatever the user's code raises is told with the file and the place
        del sys.modules[name]
        raise ConfigError(f"plugins: {file}: {place_of(error, path)}{type(error).__name__}: {error}") from error


@contextmanager
def own_code(title: str, code: object) -> Iterator[None]:
    """Name whose code it was that raised in a block; errors of the package's own code pass as they are.

    title: the setting and the name, which messages begin with; code: a registered class or function, or an object of
    one. An error that is meant for the person keeps its type and gets the title, any other one becomes `PluginError`.
    """
    kind = code if inspect.isclass(code) or inspect.isfunction(code) else type(code)
    if f"{kind.__module__}.".startswith("accel_clip."):
        yield
        return
    try:
        with recognised():
            yield
    except AccelClipError as error:
        error.args = (f"{title}: {error}",)
        raise
    except Exception as error:  # whatever the user's code raises is told with its name and the place
        file = getattr(sys.modules.get(kind.__module__), "__file__", None)
        where = f"{file}: {place_of(error, Path(file))}" if file else ""
        raise PluginError(f"{title}: {where}{type(error).__name__}: {one_line(error)}") from error


def place_of(error: Exception, path: Path) -> str:
    """Return `line N: ` for the last line of the user's file that an error passed through."""
    traceback, line = error.__traceback__, None
    while traceback is not None:
        if traceback.tb_frame.f_code.co_filename == str(path):
            line = traceback.tb_lineno
        traceback = traceback.tb_next
    return f"line {line}: " if line is not None else ""
