"""One class that maps the names users write in a config to the code behind them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from accel_clip.faults import ConfigError, nearest, some_of
from accel_clip.typed import WrongValue, fit

T = TypeVar("T", bound=Callable[..., Any])


@dataclass(frozen=True)
class Entry:
    """A registered name."""

    name: str
    """that is listed"""
    target: Callable[..., Any]
    """what it stands for"""
    aliases: tuple[str, ...]
    """its other spellings"""
    description: str
    """one line about it"""


class Registry:
    """Names of one kind (`loss`, `optimizer`, …) and the callables they stand for."""

    def __init__(self, kind: str, setting: str) -> None:
        self.kind = kind
        self.setting = setting
        self._entries: dict[str, Entry] = {}

    def register(self, name: str, *aliases: str, description: str | None = None) -> Callable[[T], T]:
        """Return a decorator that registers a function or class under `name` and its `aliases`.

        The description defaults to the first line of the docstring. Raises `ConfigError` when a name is taken.
        """

        def decorate(target: T) -> T:
            taken = [word for word in (name, *aliases) if word in self]
            if taken:
                raise ConfigError(f"the {self.kind} '{taken[0]}' is registered twice: give yours another name")
            text = description if description is not None else first_docstring_line(target)
            self._entries[name] = Entry(name, target, aliases, text)
            return target

        return decorate

    def __contains__(self, name: str) -> bool:
        return any(name in (entry.name, *entry.aliases) for entry in self._entries.values())

    def __iter__(self) -> Iterator[Entry]:
        return iter(sorted(self._entries.values(), key=lambda entry: entry.name))

    def names(self) -> list[str]:
        """Return the registered names without their aliases, sorted."""
        return sorted(self._entries)

    def get(self, name: str) -> Callable[..., Any]:
        """Return what `name` or the entry with that alias stands for; raises `ConfigError` with the known names."""
        for entry in self._entries.values():
            if name in (entry.name, *entry.aliases):
                return entry.target
        raise self.unknown(name, self.names())

    def unknown(self, name: str, known: list[str]) -> ConfigError:
        """Return the error for a name that is not among `known`."""
        aliases = [alias for entry in self._entries.values() for alias in entry.aliases]
        hint = nearest(name, [*known, *aliases])
        return ConfigError(f"{self.setting}: unknown {self.kind} '{name}'{hint or ';'} known: {some_of(known)}")


def first_docstring_line(target: Callable[..., Any]) -> str:
    """Return the first line of a docstring, or an empty string."""
    return (target.__doc__ or "").strip().split("\n")[0]


def name_of(item: str | Mapping[str, Any], setting: str) -> str:
    """Return the name that an item of a list begins with; raises `ConfigError` for one of another form."""
    if isinstance(item, Mapping) and len(item) == 1:
        item = next(iter(item))
    if not isinstance(item, str):
        raise ConfigError(f"{setting}: {item!r} does not work: an item is a name or {{name: {{option: value}}}}")
    return item


def options_of(item: str | Mapping[str, Any], setting: str) -> dict[str, Any]:
    """Return the options in an item of a list; raises `ConfigError` where they are no mapping."""
    options = None if isinstance(item, str) else next(iter(item.values()))
    if options is not None and not isinstance(options, Mapping):
        name = name_of(item, setting)
        raise ConfigError(f"{setting}: {name}: {options!r} does not work: write {{{name}: {{option: value}}}}")
    return dict(options or {})


def check_options(
    setting: str, owner: str, target: Callable[..., Any], options: Mapping[str, Any], given: Collection[str]
) -> None:
    """Raise `ConfigError` naming `setting` for an option that `target` does not take, or needs and did not get.

    `given` are the parameters of `target` that are not options because the caller passes them.
    """
    parameters = inspect.signature(target).parameters.values()
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    known = {entry.name: entry for entry in parameters if entry.name not in given and entry.kind not in variadic}
    takes_any = any(entry.kind is inspect.Parameter.VAR_KEYWORD for entry in parameters)
    listed = f"its options: {', '.join(known)}" if known else "it has none"
    for name, value in options.items():
        if name in given or (name not in known and not takes_any):
            raise ConfigError(f"{setting}: {owner} has no option '{name}' ({listed}){nearest(name, known)}")
        require_kind(f"{setting}.{name}", value, known[name].default if name in known else None)
    for name, entry in known.items():
        if entry.default is inspect.Parameter.empty and name not in options:
            raise ConfigError(f"{setting}: {owner} needs '{name}', write it as {{{name}: …}}")


def require_kind(key: str, value: Any, default: Any) -> None:
    """Raise `ConfigError` for an option whose default is a number or a truth value, and that is none."""
    kind = bool if isinstance(default, bool) else float if isinstance(default, (int, float)) else Any
    try:
        fit(value, kind, key)
    except WrongValue as error:
        raise ConfigError(str(error)) from error
