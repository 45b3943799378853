"""The training pairs and the held-out pairs of a run."""

from __future__ import annotations

from accel_clip.config import DataConfig
from accel_clip.data.sources.base import Source
from accel_clip.data.sources.combine import split_held_out
from accel_clip.data.sources.resolve import open_sources


def open_pairs(data: DataConfig) -> tuple[Source, Source | None]:
    """Return the pairs to train on and those held out, which are `data.val` or a part of `data.train`."""
    training = open_sources(data.train, data)
    if data.val is not None:
        return training, open_sources(data.val, data)
    return split_held_out(training, data.val_fraction)
