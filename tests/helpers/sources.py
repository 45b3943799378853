"""Sources as training opens them, and what their pairs hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from accel_clip.config import DataConfig, SourceConfig
from accel_clip.data.bad_samples import UnusableSample
from accel_clip.data.sources.base import Source
from accel_clip.data.sources.resolve import open_source


def opened(item: Path | str | SourceConfig, **settings: Any) -> Source:
    """Open what `data.train` names; settings are those of `data`."""
    return open_source(str(item) if isinstance(item, Path) else item, DataConfig(**settings))


def captions_of(source: Source) -> list[tuple[str, ...]]:
    """Return the captions of every pair."""
    return [source[index].captions for index in range(len(source))]


def problem_of(source: Source, index: int = 0) -> UnusableSample:
    """Return what is wrong with a pair; fail where nothing is."""
    with pytest.raises(UnusableSample) as caught:
        source[index]
    return caught.value
