"""What a source of pairs is, the registry of sources, and how a user's words find one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from accel_clip.config import SourceConfig
from accel_clip.registry import Registry

if TYPE_CHECKING:
    import numpy
    from PIL.Image import Image

    from accel_clip.data.bad_samples import UnusableSample


SAVED_DATASET_FILES = ("dataset_info.json", "state.json", "dataset_dict.json")
"""Any of these makes a folder a saved dataset."""


@dataclass(frozen=True)
class SourceOptions(SourceConfig):
    """All settings of one source: those of its item completed by the `data` section's, which every opener receives."""

    captions: Mapping[str, float] = field(default_factory=dict)
    """column(s) with captions and how often each is shown beside the others; empty = found by the usual names"""
    encoding: str | None = None
    """text encoding of tables and captions; null = found"""
    quoting: str = "auto"
    """what quotes mean in delimited text: auto, standard or none"""
    caption_lines: bool | None = None
    """whether each line of a text beside a picture is a caption; null = unless a blank line is in it"""
    label_key: str | None = None
    """column with the label; null = found by the usual names"""
    needs: str = "captions"
    """what a table must have beside pictures: captions, or labels"""
    extra: tuple[str, ...] = ()
    """columns of numbers that the loss asks for"""
    index_folder: Path | None = None
    """where the indexes of shards are kept; None = beside them, for the next start"""


@dataclass(frozen=True)
class Pair:
    """A picture as it is stored, and the captions it may be shown with."""

    image: Image | bytes | Path
    """decoded, as bytes of a picture file, or as the path of one"""
    captions: tuple[str, ...]
    """none when it has none"""
    label: str | None = None
    """name of its class, None without one"""
    extra: Mapping[str, numpy.ndarray | Sequence[float]] = field(default_factory=dict)
    """numbers by the name of the column that they come from, as many in every pair; they mean the only caption"""
    weights: tuple[float, ...] = ()
    """how often each caption is shown beside the others, as many as captions; without any, all alike"""


class Source(Protocol):
    """A map-style source: it knows its length and fetches pair `index`, the same one every time.

    A registered entry is a function `(argument, options: SourceConfig) -> Source`; `argument` is what the user
    wrote after `name:`.
    """

    name: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Pair: ...

    def key(self, index: int) -> str:
        """Return the identity of the picture: pairs with one key show one picture."""
        ...


@dataclass(frozen=True)
class StreamItem:
    """What comes by next in a shard of a stream."""

    key: str
    """identity of the picture"""
    pair: Pair | UnusableSample
    """the pair, or what is wrong with it"""
    end: int
    """the place behind it, from which the shard can be read on: any number above 0 that the stream understands"""


@runtime_checkable
class Stream(Protocol):
    """A source that is read from front to back, shard after shard, and does not know its length.

    It is pickled into loader workers, each of which reads other shards. Registered like a map-style source.
    """

    name: str
    num_shards: int

    def read(self, shard: int, start: int) -> Iterator[StreamItem]:
        """Yield what a shard holds from a place on, 0 or the `end` of something that this shard gave before.

        What is broken, missing or cut off is given as an `UnusableSample` in its place; the rest of a shard that cannot
        be read after all attempts is one of them, and the last.
        """
        ...


@runtime_checkable
class HasHeldOut(Protocol):
    """A source that brings its own held-out part, which is used instead of `data.val_fraction`."""

    def held_out(self) -> Source:
        """Return the held-out part."""
        ...


SOURCES = Registry("source", setting="data.train")
