"""The training pairs and the held-out pairs of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from accel_clip.config import DataConfig, SourceConfig
from accel_clip.console import say
from accel_clip.data.held_out import shared_in_words
from accel_clip.data.overlap import num_shown_in_training
from accel_clip.data.sources.base import HasHeldOut, Source, Stream
from accel_clip.data.sources.combine import split_held_out
from accel_clip.data.sources.resolve import (
    NOT_LOOKED_FOR,
    Locations,
    as_one,
    open_item,
    open_sources,
    require_number_columns,
)


@dataclass(frozen=True)
class PairsOfRun:
    """The data of a run."""

    source: Source | None
    """the sources to train on that know their pairs, as one, None without any"""
    weights: list[float] | None
    """of each of these, None where they are shown one after the other"""
    source_weight: float
    """that of all these beside the streams"""
    streams: list[tuple[Stream, float]]
    """with a weight each"""
    held_out: Source | None
    """what the run is measured on, None for nothing"""
    num_shared: int = 0
    """how many pairs of `data.val` show pictures of `source`"""


def open_training(
    data: DataConfig,
    extra: tuple[str, ...] = (),
    index_folder: Path | None = None,
    locations: Locations = NOT_LOOKED_FOR,
) -> PairsOfRun:
    """Return the data of a run: what is trained on, and `data.val` or a part of `data.train` to measure it on.

    extra: columns of numbers that the pairs to train on must bring; index_folder: as in `SourceOptions`.
    """
    items = [open_item(item, data, extra, index_folder, locations) for item in data.train]
    require_number_columns(items, extra)
    weights = data.source_weights or [1.0] * len(items)
    weighted = list(zip(items, weights, strict=True))
    streams = [(item, weight) for item, weight in weighted if isinstance(item, Stream)]
    sources = [(item, weight) for item, weight in weighted if not isinstance(item, Stream)]
    source = as_one([item for item, _ in sources]) if sources else None
    held_out, num_shared = None, 0
    if data.val is not None:
        held_out = open_held_out(data.val, data, index_folder, locations)
        num_shared = 0 if source is None else num_shown_in_training(source, held_out)
    elif source is not None:
        source, held_out = split_held_out(source, data.val_fraction)
    of_sources = [weight for _, weight in sources]
    are_mixed = data.source_weights is not None and len(sources) > 1
    if num_shared and held_out is not None:
        say(f"warning: {shared_in_words(num_shared, len(held_out))}")
    return PairsOfRun(source, of_sources if are_mixed else None, sum(of_sources), streams, held_out, num_shared)


def open_held_out(
    items: Sequence[str | SourceConfig],
    data: DataConfig,
    index_folder: Path | None = None,
    locations: Locations = NOT_LOOKED_FOR,
) -> Source:
    """Return the pairs that `data.val` names; of a source with a held-out part of its own (demo), that part."""
    source = open_sources(items, data, (), index_folder, locations)
    return source.held_out() if isinstance(source, HasHeldOut) else source
