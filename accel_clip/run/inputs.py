"""What a run reads by path, compared by content with what it read when its checkpoint was written.

1. At every start the first process takes down what the settings name: the rows of sources (`data/sources/rows.py`) and
   the content of files. Streams are known by their number of shards alone (`data/feed_parts.py`).
2. A checkpoint holds hashes of that. Which rows are which is kept beside the checkpoints, in files that are named by
   their hash: they tell how many rows differ, and the first of them.
3. A run that goes on compares before any step, and refuses what is not the same. Only what it could not use may be
   mended, and a folder may move.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy
import xxhash

from accel_clip.checkpoint.manifest import Checkpoint
from accel_clip.checkpoint.restore import load_state
from accel_clip.config import Config, SourceConfig
from accel_clip.console import say
from accel_clip.data.sources.base import Source
from accel_clip.data.sources.combine import bases
from accel_clip.data.sources.rows import MISSING, Rows, name_in, rows_of
from accel_clip.data.sources.shards.local import TarShards
from accel_clip.faults import ConfigError, StorageError
from accel_clip.files.whole import write_bytes

WAYS_OUT = "put it back to go on with that run, or name another output_dir to begin anew"
PIECE_BYTES = 1 << 22
ROWS = "rows-"
ARRAYS = tuple(Rows.__dataclass_fields__)


@dataclass(frozen=True)
class NamedSource:
    """A source as a setting names it, and its rows."""

    source: Source
    """what the setting was opened as"""
    written: str
    """the value of `eval.zero_shot`, empty for sources of other settings"""
    rows: Rows
    """what is known of each of its pairs"""

    @cached_property
    def summary(self) -> dict[str, Any]:
        """Return what a checkpoint holds of the source, as plain JSON; a file's time alone tells nothing."""
        rows = self.rows
        return {
            "written": self.written,
            "num_rows": len(rows),
            "names": digest_of(rows.keys),
            "captions": digest_of(rows.texts),
            "pictures": digest_of(rows.sizes, rows.contents),
            "details": digest_of(*rows.arrays().values()),
        }

    @property
    def pictures(self) -> str:
        """Return what the files are."""
        return "shards" if isinstance(self.source, TarShards) else "pictures"


class Inputs:
    """What the settings of a run name by path: sources and files by the setting that names them."""

    def __init__(self, config: Config, sources: Mapping[str, Source | None]) -> None:
        written = {"eval.zero_shot": repr(config.eval.zero_shot)}
        self.sources = {
            key: NamedSource(source, written.get(key, ""), rows_of(source)) for key, source in named_bases(sources)
        }
        self.files = named_files(config)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint holds, as plain JSON."""
        files = {key: content for key, (_, content) in self.files.items()}
        return {"sources": {key: each.summary for key, each in self.sources.items()}, "files": files}

    def keep(self, folder: Path) -> None:
        """Write which rows are which, where that is not there already; raises `StorageError`.

        folder: that of the checkpoints, so that it goes wherever they go.
        """
        try:
            for each in self.sources.values():
                file = file_of(folder, each.summary["details"])
                if not file.exists():
                    write_rows(file, each.rows)
        except OSError as error:
            raise StorageError(f"{folder}: {error}") from error

    def require_same_as_in(self, checkpoint: Checkpoint) -> None:
        """Raise `ConfigError` unless the inputs are those that a checkpoint was written with.

        What the run could not use, and listed, may be mended.
        """
        saved = load_state(checkpoint)
        if saved.get("inputs") is None:
            say(f"warning: {checkpoint.path} does not say what its data and files held: they are not compared")
            return
        self.require_same_files(saved["inputs"]["files"])
        for key, now in self.sources.items():
            before = saved["inputs"]["sources"].get(key)
            if before is None or before["written"] != now.written:
                continue
            mended = [int(row) for name, row in saved["bad_samples"]["listed"] if name == now.source.name]
            changes = changes_of(before, now, read_rows(file_of(checkpoint.path.parent, before["details"])), mended)
            if changes:
                raise ConfigError(
                    f"{key}: {now.source.name} is not what the run began with: {'; '.join(changes)}: {WAYS_OUT}"
                )

    def require_same_files(self, saved: Mapping[str, str]) -> None:
        """Raise `ConfigError` for a file with another content; one that is gone is missed by whoever reads it."""
        for key, (path, content) in self.files.items():
            if saved.get(key, content) != content:
                raise ConfigError(f"{key}: the content of {path} has changed since the run began: {WAYS_OUT}")


def named_bases(sources: Mapping[str, Source | None]) -> Iterator[tuple[str, Source]]:
    """Yield each source that no other one is a part of, once, with the setting that names it first."""
    seen = set()
    for key, source in sources.items():
        for number, base in enumerate([] if source is None else bases(source)):
            if id(base) not in seen:
                seen.add(id(base))
                yield key + (f"[{number}]" if number else ""), base


def changes_of(saved: Mapping[str, Any], now: NamedSource, before: Rows | None, mended: Sequence[int]) -> list[str]:
    """Return what has changed in a source in words, [] for nothing; `before` has the rows themselves, where known."""
    summary = now.summary
    if saved["num_rows"] != len(now.rows):
        of_what = "shards" if now.pictures == "shards" else "rows"
        return [f"it had {saved['num_rows']:,} {of_what} and now has {len(now.rows):,}"]
    if saved["details"] == summary["details"]:
        return []
    if before is None or len(before) != len(now.rows):
        return [key for key in ("names", "captions", "pictures") if saved[key] != summary[key]]
    may_differ = numpy.zeros(len(before), bool)
    if now.pictures != "shards":
        may_differ[[row for row in mended if row < len(before)]] = True
    return row_changes(before, now, may_differ)


def row_changes(before: Rows, now: NamedSource, may_differ: numpy.ndarray) -> list[str]:
    """Return what differs between rows of one number in words; `may_differ`, bool [n], says of which it may."""
    rows = now.rows
    others = (before.keys != rows.keys) & ~may_differ
    if others.any() and numpy.array_equal(sums_in_order(before), sums_in_order(rows)):
        return ["its rows stand in another order"]
    differing = {
        f"names of {now.pictures}": others,
        "places in shards" if now.pictures == "shards" else "captions": (before.texts != rows.texts) & ~may_differ,
        now.pictures: changed_files(before, now) & ~may_differ,
    }
    return [count_in_words(what, which, now) for what, which in differing.items() if which.any()]


def sums_in_order(rows: Rows) -> numpy.ndarray:
    """Return one number for each row's name and captions, ascending: the same in whatever order the rows stand."""
    return numpy.sort(rows.keys + 3 * rows.texts)


def changed_files(before: Rows, now: NamedSource) -> numpy.ndarray:
    """Return which files are not what they were, bool [n]; one that was missing could not be used, and may come.

    Where the content is known it decides. Else a file has changed with its time, unless all times are others: those of
    a copy, which is said.
    """
    rows = now.rows
    had_file = before.sizes != MISSING
    other_size, other_time = before.sizes != rows.sizes, before.times != rows.times
    is_known = (before.contents != 0) & (rows.contents != 0)
    other_content = is_known & (before.contents != rows.contents)
    by_time = other_time & ~is_known
    if by_time.any() and not (other_size | other_content).any() and other_time[rows.sizes > 0].all():
        say(f"{now.source.name}: all {now.pictures} have another time and the same size: they are taken for a copy")
        by_time[:] = False
    return had_file & (other_size | other_content | by_time)


def count_in_words(what: str, which: numpy.ndarray, now: NamedSource) -> str:
    """Return how many rows differ, bool [n], and which is the first."""
    first = int(which.argmax())
    return (
        f"{what}: {which.sum():,} of {len(which):,} differ, the first is {name_in(now.source, first)}, row {first + 1}"
    )


def named_files(config: Config) -> dict[str, tuple[Path, str]]:
    """Return the files that settings name beside the data, and hashes of their content, by setting."""
    settings = {
        "plugins": config.plugins,
        "model": config.to_dict()["model"],
        "loss.options": config.loss.options,
        "optim.options": config.optim.options,
        "optim.schedule_options": config.optim.schedule_options,
        "data.transforms": config.data.transforms,
        **arguments_of("data.train", config.data.train),
        **arguments_of("data.val", config.data.val or []),
    }
    paths = (found for key, value in settings.items() for found in paths_in(key, value))
    return {key: (path, content_of(path)) for key, path in paths}


def arguments_of(key: str, items: Sequence[str | SourceConfig]) -> dict[str, str]:
    """Return what is written behind the names of registered sources."""
    written = (item.source if isinstance(item, SourceConfig) else item for item in items)
    return {f"{key}[{number}]": each.partition(":")[2] for number, each in enumerate(written)}


def paths_in(key: str, value: Any) -> Iterator[tuple[str, Path]]:
    """Yield the files that a setting names, with the place where it does, also inside of a model's description."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from paths_in(f"{key}.{name}", inner)
    elif isinstance(value, (list, tuple)):
        for number, inner in enumerate(value):
            yield from paths_in(f"{key}[{number}]", inner)
    elif isinstance(value, str) and value:
        is_folder = value.startswith("local-dir:") or ".hf_" in key  # any other word may be a folder's name by chance
        yield from files_under(key, Path(value.removeprefix("local-dir:")).expanduser(), is_folder)


def files_under(key: str, path: Path, is_folder: bool) -> Iterator[tuple[str, Path]]:
    """Yield a file, and what it names where it describes a model, or the files of a folder that is meant."""
    try:
        if path.is_file():
            yield key, path
            if path.suffix == ".json" and ":" not in key:
                yield from paths_in(f"{key}:", json.loads(path.read_text(encoding="utf-8")))
        elif is_folder and path.is_dir():
            for file in sorted(each for each in path.rglob("*") if each.is_file()):
                yield f"{key}/{file.relative_to(path).as_posix()}", file
    except (OSError, ValueError, RecursionError):  # who reads it says what is wrong
        return


def content_of(path: Path) -> str:
    """Return a hash of all bytes of a file; raises `ConfigError` where it cannot be read."""
    digest = xxhash.xxh3_128()
    try:
        with path.open("rb") as file:
            while piece := file.read(PIECE_BYTES):
                digest.update(piece)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from error
    return digest.hexdigest()


def digest_of(*arrays: numpy.ndarray) -> str:
    """Return a hash of the numbers in arrays."""
    digest = xxhash.xxh3_128()
    for array in arrays:
        digest.update(array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes())
    return digest.hexdigest()


def file_of(folder: Path, details: str) -> Path:
    """Return the file that rows with a hash are kept in."""
    return folder / f"{ROWS}{details}.npz"


def write_rows(file: Path, rows: Rows) -> None:
    """Write rows in one go; raises OSError."""
    content = io.BytesIO()
    numpy.savez(content, allow_pickle=False, **rows.arrays())
    write_bytes(file, content.getvalue())


def read_rows(file: Path) -> Rows | None:
    """Return the rows that were kept, None where they are not there or not whole."""
    try:
        with numpy.load(file, allow_pickle=False) as stored:
            rows = Rows(**{name: stored[name] for name in ARRAYS})
    except (OSError, ValueError, KeyError, EOFError, BadZipFile):
        return None
    return rows if file.stem == ROWS + digest_of(*rows.arrays().values()) else None
