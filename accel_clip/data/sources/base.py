"""What a source of pairs is, the registry of sources, and how a user's words find one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from accel_clip.registry import Registry

if TYPE_CHECKING:
    import numpy
    from PIL.Image import Image


@dataclass(frozen=True)
class Pair:
    """A picture as it is stored, and the captions it may be shown with (none when it has none).

    extra: numbers by the name of the column that they come from, as many in every pair; they mean the only caption.
    """

    image: Image | bytes | Path
    captions: tuple[str, ...]
    label: str | None = None
    extra: Mapping[str, numpy.ndarray | Sequence[float]] = field(default_factory=dict)


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


@runtime_checkable
class HasHeldOut(Protocol):
    """A source that brings its own held-out part, which is used instead of `data.val_fraction`."""

    def held_out(self) -> Source:
        """Return the held-out part."""
        ...


SOURCES = Registry("source", setting="data.train")
