"""From what a user writes for tar shards to their paths or addresses; nothing heavy is imported.

`shards/{0000..0041}.tar`, `{a,b}.tar`, `shards/*.tar`, one `x.tar`, a folder that holds shards alone, or
`https://host/{0000..0041}.tar`.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

from accel_clip.faults import ConfigError, DataError, some_of

SUFFIX = ".tar"
COMPRESSED = re.compile(r"\.(tgz|tbz2?|txz|tzst|tar\.\w+)$", re.IGNORECASE)
ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
SHELL = re.compile(r"\s*(pipe:|\|)|.*(\|\s*$|`|\$\()", re.IGNORECASE | re.DOTALL)
NUMBERS = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.(-?\d+))?")
LETTERS = re.compile(r"([a-zA-Z])\.\.([a-zA-Z])")
GLOB = re.compile(r"[*\[]")
COMPANIONS = frozenset({SUFFIX, ".accel-clip-index", ".json", ".parquet", ".idx"})
"""Endings of files in a folder of shards: the shards, their indexes, and what programs that write shards add."""

LONGEST_LABEL, LONGEST_HOST = 63, 253  # characters of a part of a host's name, and of all of it
LARGEST_PORT = 65535
MOST_SHARDS = 1_000_000
MOST_NAMED = 100


def refuse_address(written: str, setting: str) -> None:
    """Raise `ConfigError` for a command or an address where a file, or tar shards at addresses, are needed."""
    if SHELL.match(written) and not Path(written).exists():
        raise ConfigError(
            f"{setting}: '{written}' would start a command, and data never does: download the shards and write their "
            "path, such as shards/{0000..0041}.tar"
        )
    if ADDRESS.match(written) and not means_addresses(written):
        raise ConfigError(
            f"{setting}: '{written}' is an address, and only tar shards are read from one, by http or https, such as "
            "https://host/{0000..0041}.tar: download the data and write its path, or hf:org/name for a dataset of the "
            "Hugging Face Hub"
        )


def means_addresses(written: str) -> bool:
    """Return whether words stand for tar shards at http(s) addresses."""
    if not ADDRESS.match(written):
        return False
    try:
        first = urlsplit(next(expand_braces(written)))
    except ValueError:
        return False
    is_shard_name = first.path.lower().endswith(SUFFIX) or first.query.lower().endswith(SUFFIX)
    return first.scheme.lower() in ("http", "https") and (is_shard_name or COMPRESSED.search(first.path) is not None)


def find_addresses(written: str, setting: str = "data.train") -> list[str]:
    """Return the addresses of shards in the order they are written; raises `ConfigError` for what is none."""
    addresses = expanded(written, setting)
    for address in addresses:
        parts = split_address(address, setting)
        if GLOB.search(parts.path) or (parts.query and "=" not in parts.query):
            raise ConfigError(
                f"{setting}: '{written}' has a *, ? or [, and no server says which files fit: write the numbers of the "
                "shards in braces, such as {0000..0041}.tar"
            )
        if COMPRESSED.search(parts.path):
            raise ConfigError(
                f"{setting}: '{address}' is compressed, and so are no shards read: unpack it to a plain .tar (gunzip, "
                "bunzip2, unxz or zstd -d)"
            )
    return addresses


def split_address(address: str, setting: str) -> SplitResult:
    """Return the parts of an address; raises `ConfigError` for one without a host, or with a port that is none."""
    try:
        parts = urlsplit(address)
        problem = problem_of_host(parts.hostname or "", parts.port)
        if problem:
            raise ValueError(f"it {problem}")
    except ValueError as error:
        raise ConfigError(
            f"{setting}: '{address}' is no address: {error}: write https://host/folder/0000.tar"
        ) from error
    return parts


def problem_of_host(host: str, port: int | None) -> str:
    """Return why nothing can be connected to, beginning with a verb, or an empty string."""
    try:
        labels = host.encode("idna").removesuffix(b".").split(b".")
    except UnicodeError:
        return "names a host of which a part is empty or too long"
    if not host or not all(0 < len(label) <= LONGEST_LABEL for label in labels) or sum(map(len, labels)) > LONGEST_HOST:
        return "names no host"
    return "" if port is None or 0 < port <= LARGEST_PORT else f"names the port {port}, which is none"


def means_shards(written: str) -> bool:
    """Return whether words stand for tar shards: names that end in .tar, or a folder that holds shards alone."""
    path = Path(written).expanduser()
    if path.is_dir():
        return holds_shards_alone(path)
    return any(name.lower().endswith(SUFFIX) or COMPRESSED.search(name) for name in islice(expand_braces(written), 1))


def holds_shards_alone(folder: Path) -> bool:
    """Return whether a folder has shards, and beside them only files that belong to shards."""
    entries = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
    return any(is_shard(entry) for entry in entries) and all(belongs_to_shards(entry) for entry in entries)


def belongs_to_shards(path: Path) -> bool:
    """Return whether a file is a shard or of the kinds that stand beside shards; a metadata table is not."""
    return path.suffix.lower() in COMPANIONS and path.stem != "metadata" and path.is_file()


def is_shard(path: Path) -> bool:
    """Return whether a path is named as a shard is."""
    return path.suffix.lower() == SUFFIX and not path.name.startswith(".")


def find_shards(written: str, setting: str = "data.train") -> list[Path]:
    """Return the paths of shards in the order they are written, those that fit a * sorted.

    Raises `DataError` naming all that are missing, `ConfigError` for compressed ones.
    """
    paths = [path for name in expanded(written, setting) for path in matching(name)]
    compressed = next((path for path in paths if COMPRESSED.search(path.name)), None)
    if compressed:
        raise ConfigError(
            f"{setting}: '{compressed}' is compressed, and pictures are fetched from the middle of shards: unpack it "
            "to a plain .tar (gunzip, bunzip2, unxz or zstd -d)"
        )
    if not paths:
        raise DataError(f"{setting}: no file fits '{written}': name shards that are there")
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        raise DataError(
            f"{setting}: {len(missing)} of the {len(paths)} shards in '{written}' are missing: "
            f"{some_of(missing, MOST_NAMED)}: get them again, or leave them out of the pattern"
        )
    return paths


def expanded(written: str, setting: str) -> list[str]:
    """Return the names that braces stand for; a file that is named so itself stands for itself."""
    if Path(written).expanduser().exists():
        return [written]
    names = list(islice(expand_braces(written), MOST_SHARDS + 1))
    if len(names) > MOST_SHARDS:
        raise ConfigError(f"{setting}: '{written}' stands for more than {MOST_SHARDS:,} shards: write a smaller range")
    return names


def matching(name: str) -> list[Path]:
    """Return the shards in a folder or those that fit a pattern, sorted; else the path itself."""
    path = Path(name).expanduser()
    if path.is_dir() and not is_shard(path):
        return sorted(entry for entry in path.iterdir() if is_shard(entry))
    if glob.has_magic(name) and not path.exists():
        return sorted(Path(found) for found in glob.iglob(str(path), recursive=True))
    return [path]


def expand_braces(pattern: str) -> Iterator[str]:
    """Yield what a pattern with {0..9}, {00..20..5}, {a..f} and {a,b} stands for, in the order a shell gives."""
    group = first_group(pattern)
    if group is None:
        yield pattern
        return
    start, end = group
    for choice in choices(pattern[start + 1 : end]):
        for rest in expand_braces(pattern[end + 1 :]):
            yield pattern[:start] + choice + rest


def first_group(pattern: str) -> tuple[int, int] | None:
    """Return the places of the first brace that is closed, and of the one that closes it."""
    opened: list[int] = []
    for place, character in enumerate(pattern):
        if character == "{":
            opened.append(place)
        elif character == "}" and opened:
            start = opened.pop()
            if not opened:
                return start, place
    return None


def choices(inside: str) -> Iterator[str]:
    """Yield what one pair of braces stands for; without a range or a comma they stand for themselves."""
    numbers, letters = NUMBERS.fullmatch(inside), LETTERS.fullmatch(inside)
    parts = split_outside_braces(inside)
    if numbers:
        yield from count(numbers[1], numbers[2], numbers[3])
    elif letters:
        first, last = ord(letters[1]), ord(letters[2])
        yield from map(chr, inclusive(first, last, 1))
    elif len(parts) > 1:
        for part in parts:
            yield from expand_braces(part)
    else:
        for content in expand_braces(inside):
            yield f"{{{content}}}"


def count(first: str, last: str, step: str | None) -> Iterator[str]:
    """Yield numbers as they are written, as wide as the wider end where one of them begins with a zero."""
    padded = any(len(end.lstrip("-")) > 1 and end.lstrip("-").startswith("0") for end in (first, last))
    width = max(len(first), len(last)) if padded else 0
    for number in inclusive(int(first), int(last), abs(int(step or 1)) or 1):
        yield f"{number:0{width}d}"


def inclusive(first: int, last: int, step: int) -> range:
    """Return the numbers from first to last, both counted, up or down."""
    return range(first, last + 1, step) if first <= last else range(first, last - 1, -step)


def split_outside_braces(text: str) -> list[str]:
    """Return the parts of a text between the commas that stand in no braces of their own."""
    parts, depth = [""], 0
    for character in text:
        depth += {"{": 1, "}": -1}.get(character, 0)
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts
