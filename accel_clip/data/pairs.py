"""The training pairs and the held-out pairs of a run."""

from __future__ import annotations

from collections.abc import Sequence

from accel_clip.config import DataConfig, SourceConfig
from accel_clip.data.sources.base import HasHeldOut, Source
from accel_clip.data.sources.combine import split_held_out
from accel_clip.data.sources.resolve import open_sources


def open_pairs(data: DataConfig, extra: tuple[str, ...] = ()) -> tuple[Source, Source | None]:
    """Return the pairs to train on and those held out, which are `data.val` or a part of `data.train`.

    extra: columns of numbers that the pairs to train on must bring.
    """
    training = open_sources(data.train, data, extra)
    if data.val is not None:
        return training, open_held_out(data.val, data)
    return split_held_out(training, data.val_fraction)


def open_held_out(items: Sequence[str | SourceConfig], data: DataConfig) -> Source:
    """Return the pairs that `data.val` names; of a source with a held-out part of its own (demo), that part."""
    source = open_sources(items, data)
    return source.held_out() if isinstance(source, HasHeldOut) else source
