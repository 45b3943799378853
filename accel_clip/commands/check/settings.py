"""The settings of a command line, read one by one when they do not work as a whole, so that every mistake is told."""

from __future__ import annotations

from argparse import ArgumentError
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from accel_clip.command_line import (
    build_parser,
    config_from,
    dotted_settings,
    known_keys,
    message_of_parser,
    parse_config,
    read_yaml,
    take_config_files,
    takes_a_list,
    wrap_list_values,
)
from accel_clip.config import Config
from accel_clip.faults import ConfigError
from accel_clip.run.problems import Problems

PROGRAM = "accel-clip check"


def settings_to_check(arguments: list[str], description: str, problems: Problems) -> Config:
    """Return the settings as `parse_config` does; those that cannot work are taken in and keep their defaults."""
    try:
        return parse_config(arguments, PROGRAM, description)
    except ConfigError as error:
        config = read_one_by_one(arguments, problems)
        if not problems:
            problems.add(error)
        return config


def read_one_by_one(arguments: list[str], problems: Problems) -> Config:
    """Return the settings that work, each applied alone: files in their order, then flags."""
    parser = build_parser(PROGRAM, "")
    files: list[Path] = []
    flags: list[list[str]] = []
    for words in one_flag_each(arguments):
        named, rest = problems.attempt(partial(take_config_files, words)) or ([], [])
        files += named
        flags += [rest] if rest else []
    settings = parser.get_defaults()
    for file in files:
        for entry in entries_of(file, problems):
            settings = applied(partial(parser.parse_object, entry), "cfg_base", settings, problems)
    for words in flags:
        settings = applied(partial(parser.parse_args, [*wrap_list_values(words)]), "namespace", settings, problems)
    return within_range(parser, settings, problems)


def one_flag_each(arguments: list[str]) -> Iterator[list[str]]:
    """Yield the words of a command line one flag at a time, with its value; a word too many stands alone."""
    words = list(arguments)
    while words:
        takes_value = words[0].startswith("--") and "=" not in words[0]
        length = 2 if takes_value and len(words) > 1 and not words[1].startswith("--") else 1
        yield words[:length]
        words = words[length:]


def entries_of(file: Path, problems: Problems) -> Iterator[dict[str, Any]]:
    """Yield the settings in a YAML file one by one, as nested dictionaries; unknown keys are taken in and left out."""
    for name, value in (problems.attempt(partial(read_yaml, file)) or {}).items():
        parts = [{name: {key: inner}} for key, inner in value.items()] if isinstance(value, dict) else [{name: value}]
        for part in parts:
            for key, inner in problems.attempt(partial(dotted_settings, part, file)) or []:
                is_bare = takes_a_list(known_keys().get(key)) and inner is not None and not isinstance(inner, list)
                yield in_list(key, inner) if is_bare else part


def in_list(key: str, value: Any) -> dict[str, Any]:
    """Return one bare value of a list setting as a list, under its section."""
    section, _, name = key.rpartition(".")
    return {section: {name: [value]}} if section else {name: [value]}


def applied(parse: Callable[..., Namespace], base: str, settings: Namespace, problems: Problems) -> Namespace:
    """Return the settings with one more, or as they are when that one has the wrong type."""
    try:
        return parse(**{base: settings.clone()})
    except (ArgumentError, RecursionError) as error:
        problems.add(ConfigError(message_of_parser(str(error))))
        return settings


def within_range(parser: ArgumentParser, settings: Namespace, problems: Problems) -> Config:
    """Return the settings as a `Config`, those out of range at their defaults."""
    defaults = parser.get_defaults()
    while True:
        try:
            return config_from(parser, settings)
        except ConfigError as error:
            problems.add(error)
            changed = [key for key in known_keys() if settings[key] != defaults[key]]
            culprit = next((key for key in changed if named_first(key, str(error))), None)
            culprit = culprit or next((key for key in changed if key in str(error)), None)
            if culprit is None:
                return Config()
            settings[culprit] = defaults[culprit]


def named_first(key: str, message: str) -> bool:
    """Return whether a message begins with a setting, or with an entry of one that is a dictionary."""
    return message.startswith((f"{key}:", f"{key}."))
