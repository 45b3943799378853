"""YAML files and flags, merged into one `Config`; every wrong word is an error that names the nearest right one."""

from __future__ import annotations

import json
import re
from argparse import ArgumentError
from collections.abc import Hashable, Iterable, Iterator
from contextlib import suppress
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ArgumentParser, Namespace, namespace_to_dict, set_parsing_settings

from accel_clip.config import Config
from accel_clip.faults import ConfigError, StorageError, nearest
from accel_clip.files.whole import write_text
from accel_clip.redaction import texts_in_settings
from accel_clip.typed import LARGEST_WHOLE, MOST_DEPTH, WrongValue, numbers_in, range_of

CONFIG_MARK = "# Written by accel_clip: the settings of the run in this folder, replaced at every start.\n"
HELP = ("-h", "--help")
MOST_BYTES = 1 << 18  # of a --config file, whose settings fill a few thousand; the reader needs seconds for more
MOST_SHOWN = 400  # characters of a value in a message
LONG_NUMBER = re.compile(r"[0-9_]{19}")
NO_ALIAS = "an alias (*name) is not read, since few of them can stand for billions of values: write the value out"


def parse_config(arguments: list[str], program: str, description: str) -> Config:
    """Return the settings: defaults, then every `--config` file in order, then the flags.

    Prints the help and exits when asked to. Raises `ConfigError` for an unknown key, a wrong type or a value out of
    range.
    """
    parser = build_parser(program, description)
    files, flags = take_config_files(arguments)
    if any(flag in HELP for flag in flags):
        parser.print_help()
        raise SystemExit(0)
    return merged(parser, (namespace_of(read_yaml(file), file) for file in files), flags)


def merged(parser: ArgumentParser, contents: Iterable[dict[str, Any]], flags: list[str]) -> Config:
    """Return the settings of defaults, then of every file's content in order, then of flags."""
    try:
        settings = parser.get_defaults()
        for content in contents:
            settings = parser.parse_object(content, cfg_base=settings)
        for key, text in given(flags):
            require_64_bits(key, text)
        settings = parser.parse_args([*wrap_list_values(flags)], namespace=settings)
    except ArgumentError as error:
        raise ConfigError(with_range(message_of_parser(str(error)))) from error
    except RecursionError as error:
        raise ConfigError("a setting nests too deeply") from error
    return config_from(parser, settings)


def load_config(file: Path) -> Config:
    """Return the settings that a `config.yaml` holds; an error names the file."""
    try:
        raw = read_settings(file)
    except OSError as error:
        raise ConfigError(f"{file}: {error}") from error
    return config_in(raw, file)


def config_in(raw: bytes, file: Path) -> Config:
    """Return the settings that the content of a `config.yaml` says; an error names the file it was read from."""
    parser = build_parser("accel-clip", "")
    try:
        return merged(parser, [namespace_of(yaml_in(raw, file), file)], [])
    except ConfigError as error:
        raise ConfigError(
            f"{file}: {str(error).removeprefix(f'--config {file}: ').removeprefix(f'{file}: ')}"
        ) from error


def config_of(settings: dict[str, Any]) -> Config:
    """Return the settings that `Config.to_dict` gave; raises `ConfigError` for others."""
    parser = build_parser("accel-clip", "")
    try:
        return config_from(parser, parser.parse_object(settings, cfg_base=parser.get_defaults()))
    except (ArgumentError, RecursionError) as error:
        raise ConfigError(message_of_parser(str(error))) from error


def save_config(config: Config, file: Path) -> None:
    """Replace a file by the resolved settings, so that `load_config` gives them back; raises `StorageError`."""
    text = yaml.dump(config.to_dict(), Dumper=Dumper, sort_keys=False, allow_unicode=True)
    try:
        write_text(file, CONFIG_MARK + text)
    except OSError as error:
        raise StorageError(f"{file}: {error}") from error


def build_parser(program: str, description: str) -> ArgumentParser:
    """Return the parser of every setting, with its help, unit and default from `config.py`."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(prog=program, description=description, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config", metavar="FILE.yaml", help="YAML file with settings; may be given several times")
    parser.add_class_arguments(Config, None)
    return parser


def config_from(parser: ArgumentParser, settings: Namespace) -> Config:
    """Return the dataclass of parsed settings; range errors come from the dataclasses themselves."""
    settings = settings.clone()
    settings.pop("config", None)
    objects = namespace_to_dict(parser.instantiate(settings))
    return Config(**{key: value for key, value in objects.items() if key in {f.name for f in fields(Config)}})


def take_config_files(arguments: list[str]) -> tuple[list[Path], list[str]]:
    """Split a command line into its `--config` files and its flags, each checked to be a known key."""
    require_plain(arguments)
    files: list[Path] = []
    flags: list[str] = []
    words = iter(arguments)
    for word in words:
        name, equals, value = word.partition("=")
        if name == "--config":
            files.append(Path(value if equals else next_word(words, "--config")))
        else:
            if word.startswith("--"):
                check_known(name[2:].removesuffix("+"), "--")
            flags.append(word)
    return files, flags


def given(flags: list[str]) -> Iterator[tuple[str, Any]]:
    """Yield the settings among flags with what their texts hold, where that may be a large number."""
    key = ""
    for word in flags:
        name, equals, value = word.partition("=") if word.startswith("--") else (key, "=", word)
        key = name.removeprefix("--").removesuffix("+")
        if equals and LONG_NUMBER.search(value):
            with suppress(yaml.YAMLError):  # then it is a word like others
                yield key, loaded(value, key)


def loaded(text: str, key: str) -> Any:
    """Return what a text holds as YAML; raises `ConfigError` for a number of thousands of digits."""
    try:
        return yaml.load(text, Loader=UniqueKeyLoader)
    except ValueError as error:
        raise ConfigError(f"{key}: {beginning_of(text, 40)} does not work: a number has too many digits") from error


def require_64_bits(key: str, value: Any) -> None:
    """Raise `ConfigError` for a whole number in a setting, where that is no text, that does not fit into 64 bits."""
    hint = hints_with_ranges().get(key)
    limits = range_of(hint)
    rule = f"it must be {limits.words}" if limits else f"a whole number must lie within ±{LARGEST_WHOLE:,}"
    for name, number in numbers_in(value, key) if hint not in (str, str | None) else ():
        if isinstance(number, int) and abs(number) > LARGEST_WHOLE:
            raise ConfigError(str(WrongValue(name, number, rule)))


def next_word(words: Iterator[str], flag: str) -> str:
    """Return the value after a flag."""
    value = next(words, None)
    if value is None:
        raise ConfigError(f"{flag} needs a value")
    return value


def known_keys() -> dict[str, Any]:
    """Return every dotted key with its type."""
    return dict(walk_keys(Config, "", with_ranges=False))


def hints_with_ranges() -> dict[str, Any]:
    """Return every dotted key with its type and the range of its numbers."""
    return dict(walk_keys(Config, "", with_ranges=True))


def walk_keys(section: type, prefix: str, with_ranges: bool) -> Iterator[tuple[str, Any]]:
    """Yield the dotted keys of a dataclass and their types; only sections are entered, not dictionaries."""
    hints = get_type_hints(section, include_extras=with_ranges)
    for entry in fields(section):
        hint = hints[entry.name]
        if is_dataclass(hint) and isinstance(hint, type):
            yield from walk_keys(hint, f"{prefix}{entry.name}.", with_ranges)
        else:
            yield prefix + entry.name, hint


def check_known(key: str, dashes: str) -> None:
    """Raise `ConfigError` for a key that does not exist, with the nearest one that does."""
    keys = known_keys()
    inside_dictionary = any(key.startswith(f"{name}.") for name, hint in keys.items() if get_origin(hint) is dict)
    if key not in keys and not inside_dictionary and dashes + key not in HELP:
        by_last_word = {name.rpartition(".")[2]: name for name in keys}
        close = nearest(key, keys) or nearest(key, by_last_word)
        for last_word, name in by_last_word.items():
            close = close.replace(f"'{last_word}'", f"'{name}'")
        raise ConfigError(f"unknown key '{dashes}{key}'{close or ' (see --help)'}")


def takes_a_list(hint: Any) -> bool:
    """Return whether a setting of this type is a list."""
    return get_origin(hint) is list or any(get_origin(option) is list for option in get_args(hint))


def takes_a_mapping(hint: Any) -> bool:
    """Return whether a setting of this type may be a mapping instead of a list."""
    return any(get_origin(option) is dict for option in get_args(hint))


def wrap_list_values(flags: list[str]) -> Iterator[str]:
    """Yield the flags with one bare value of a list setting put in brackets: `--plugins mine.py`."""
    keys = known_keys()
    hint = None
    for word in flags:
        name, equals, value = word.partition("=")
        if name.startswith("--"):
            hint = keys.get(name[2:])
            yield f"{name}={bracket(value, hint)}" if equals else word
        else:
            yield bracket(word, hint)


def bracket(value: str, hint: Any) -> str:
    """Return a YAML list of one bare value where the setting is a list; lists, null and mappings of its own stay."""
    stays = value.startswith("[") or value == "null" or (value.startswith("{") and takes_a_mapping(hint))
    if stays or not takes_a_list(hint):
        return value
    return f"[{value}]" if value.startswith("{") else json.dumps([value], ensure_ascii=False)


def namespace_of(settings: dict[str, Any], file: Path) -> dict[str, Any]:
    """Return what a YAML file holds as settings, its keys checked and its bare values put in lists."""
    require_plain(text for _, text in texts_in_settings(settings, ""))
    hints = known_keys()
    for key, value in dotted_settings(settings, file):
        require_64_bits(key, value)
        stays = value is None or isinstance(value, list) or (isinstance(value, dict) and takes_a_mapping(hints[key]))
        if takes_a_list(hints.get(key)) and not stays:
            section, _, name = key.rpartition(".")
            (settings[section] if section else settings)[name] = [value]
    return settings


def dotted_settings(settings: dict[str, Any], file: Path) -> list[tuple[str, Any]]:
    """Return a file's dotted keys and values; raises `ConfigError` for a key that does not exist."""
    sections = {key.partition(".")[0] for key in known_keys() if "." in key}
    flat: list[tuple[str, Any]] = []
    for name, value in settings.items():
        if name in sections and isinstance(value, dict):
            flat.extend((f"{name}.{key}", inner) for key, inner in value.items())
        elif name in sections:
            raise ConfigError(f"{file}: '{name}' is a section: write its keys below it, indented")
        else:
            flat.append((str(name), value))
    for key, _ in flat:
        check_known_in(file, key)
    return flat


def check_known_in(file: Path, key: str) -> None:
    """Raise `ConfigError` naming the file for a key that does not exist."""
    try:
        check_known(key, "")
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None


def require_plain(texts: Iterable[str]) -> None:
    """Raise `ConfigError` for a text that the parser of settings, which reads texts as YAML, must not be given.

    It would write out what aliases stand for, and its reader in C ends the program when values nest too deeply.
    """
    for text in texts:
        if len(text) > MOST_DEPTH or ("*" in text and "&" in text):
            with suppress(yaml.YAMLError):  # then it is a word like others
                require_plain_events(yaml.parse(text), text)


def require_plain_events(events: Iterator[yaml.Event], text: str) -> None:
    """Raise `ConfigError` for an alias of a value in a text, and for deep nesting."""
    depth, anchors = 0, set()
    for event in events:
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        name = getattr(event, "anchor", None)
        if isinstance(event, yaml.AliasEvent) and name in anchors:
            raise ConfigError(f"'{beginning_of(text)}': {NO_ALIAS}")
        if depth > MOST_DEPTH:
            raise ConfigError(f"'{beginning_of(text)}': its values nest too deeply")
        anchors.add(name)


def beginning_of(text: str, most: int = MOST_SHOWN) -> str:
    """Return the beginning of a long text."""
    return text if len(text) <= most else text[:most] + " …"


class UniqueKeyLoader(yaml.SafeLoader):
    """A safe YAML loader that refuses a key written twice and an alias, and reads `1e-3` as a number."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Return the next node; raises `yaml.YAMLError` for an alias."""
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(None, None, NO_ALIAS, self.peek_event().start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return a mapping; raises `yaml.YAMLError` for a key that stands in it twice."""
        seen: set[Hashable] = set()
        for written, _ in node.value:
            key = self.construct_object(written, deep=True)
            if isinstance(key, Hashable) and key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key '{key}' stands twice", node.start_mark)
            seen.update([key] if isinstance(key, Hashable) else [])
        return super().construct_mapping(node, deep)


class Dumper(yaml.SafeDumper):
    """A safe YAML dumper that quotes what the loader would read as a number, and writes no alias."""

    def ignore_aliases(self, data: Any) -> bool:
        """Return that every value is written out."""
        return True


for side in (UniqueKeyLoader, Dumper):
    side.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
    )


def read_yaml(file: Path) -> dict[str, Any]:
    """Return what a YAML file holds; plain data only. Raises `ConfigError` where it cannot be read."""
    try:
        return yaml_in(read_settings(file), file)
    except OSError as error:
        raise ConfigError(f"--config {file}: {error}") from error


def read_settings(file: Path) -> bytes:
    """Return the content of a file of settings, or the beginning of one that is too large for it; raises OSError."""
    with file.open("rb") as opened:
        return opened.read(MOST_BYTES + 1)


def yaml_in(raw: bytes, file: Path) -> dict[str, Any]:
    """Return what the content of a YAML file says; plain data only. Raises `ConfigError` for any other."""
    if len(raw) > MOST_BYTES:
        raise ConfigError(f"--config {file}: it has more than {MOST_BYTES:,} bytes: name a file of settings")
    try:
        settings = yaml.load(raw.decode(), Loader=UniqueKeyLoader)
    except RecursionError as error:
        raise ConfigError(f"--config {file}: its values nest too deeply") from error
    except ValueError as error:  # no UTF-8, or a date that the calendar does not have
        raise ConfigError(f"--config {file}: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"--config {file}: {message_of_parser(str(error))}") from error
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise ConfigError(f"--config {file}: it must hold settings as 'key: value', not {type(settings).__name__}")
    return settings


def with_range(message: str) -> str:
    """Return a parser's message about a value of a wrong kind with the range of its setting, where that has one."""
    limits = range_of(hints_with_ranges().get(message.partition(":")[0]))
    return message if limits is None else f"{message}; it must be {limits.words}"


def message_of_parser(message: str) -> str:
    """Return a parser's message on one line, in the words of this command."""
    text = re.sub(r"<class '([\w.]+)'>", r"\1", message)
    text = re.sub(r'Parser key "([^"]+)":', r"\1:", text)
    text = " ".join(text.split()).replace("NoneType", "null").replace("argument --", "")
    text = re.sub(r"unrecognized arguments: (.*)", r"unknown word '\1': settings are written --key value", text)
    text = re.sub(r"Expected an? (\S+?)\.? Got value: ", r"expected \1, got ", text)
    return beginning_of(
        re.sub(r"Does not validate .*? Subtypes: \[(.*?)\] .* Given value: ", r"expected \1, got ", text)
    )
