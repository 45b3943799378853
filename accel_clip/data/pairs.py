"""The training pairs and the held-out pairs of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from accel_clip.config import DataConfig, SourceConfig
from accel_clip.data.sources.base import HasHeldOut, Source, Stream
from accel_clip.data.sources.combine import split_held_out
from accel_clip.data.sources.resolve import as_one, open_item, open_sources, require_columns


@dataclass(frozen=True)
class Opened:
    """The data of a run.

    source: the sources to train on that know their pairs, as one, None without any; weights: of each of these, None
    where they are shown one after the other; streams, with a weight each, and source_weight, that of all sources beside
    them; held_out: what the run is measured on.
    """

    source: Source | None
    weights: list[float] | None
    source_weight: float
    streams: list[tuple[Stream, float]]
    held_out: Source | None


def open_training(data: DataConfig, extra: tuple[str, ...] = ()) -> Opened:
    """Return the data of a run; `extra` are columns of numbers that the pairs to train on must bring."""
    items = [open_item(item, data, extra) for item in data.train]
    require_columns(items, extra)
    given = data.source_weights
    weights = [1.0] * len(items) if given is None else given
    streams = [(item, weight) for item, weight in zip(items, weights, strict=True) if isinstance(item, Stream)]
    sources = [item for item in items if not isinstance(item, Stream)]
    of_sources = [weight for item, weight in zip(items, weights, strict=True) if not isinstance(item, Stream)]
    source, held_out = None, None
    if sources:
        source, held_out = hold_out(as_one(sources), data)
    elif data.val is not None:
        held_out = open_held_out(data.val, data)
    kept_weights = None if given is None or len(sources) == 1 else of_sources
    return Opened(source, kept_weights, sum(of_sources), streams, held_out)


def open_pairs(data: DataConfig, extra: tuple[str, ...] = ()) -> tuple[Source, Source | None]:
    """Return the pairs to train on and those held out, which are `data.val` or a part of `data.train`.

    extra: columns of numbers that the pairs to train on must bring. Raises `ConfigError` for streams.
    """
    return hold_out(open_sources(data.train, data, extra), data)


def hold_out(training: Source, data: DataConfig) -> tuple[Source, Source | None]:
    """Return what is left to train on and what is held out."""
    if data.val is not None:
        return training, open_held_out(data.val, data)
    return split_held_out(training, data.val_fraction)


def open_held_out(items: Sequence[str | SourceConfig], data: DataConfig) -> Source:
    """Return the pairs that `data.val` names; of a source with a held-out part of its own (demo), that part."""
    source = open_sources(items, data)
    return source.held_out() if isinstance(source, HasHeldOut) else source
