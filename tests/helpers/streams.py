"""A stream in memory, and a tokenizer for the numbers that it has as captions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from accel_clip.data.bad_samples import UnusableSample
from accel_clip.data.sources.base import Pair, StreamItem
from helpers.pictures import numbered_picture


@dataclass
class StreamInMemory:
    """As many pairs a shard as `lengths` says; an `end` is the number of items passed."""

    lengths: list[int]
    broken: frozenset[tuple[int, int]] = frozenset()
    lost: frozenset[int] = frozenset()
    name: str = "memory"

    @property
    def num_shards(self) -> int:
        return len(self.lengths)

    def read(self, shard: int, start: int) -> Iterator[StreamItem]:
        if shard in self.lost:
            yield StreamItem(f"{shard}", UnusableSample("missing_file", "no answer", f"shard {shard}"), 1)
            return
        for number in range(start, self.lengths[shard]):
            key = f"{shard}/{number}"
            pair: Pair | UnusableSample = Pair(numbered_picture(shard * 40 + number, (20, 24)), (f"{shard} {number}",))
            if (shard, number) in self.broken:
                pair = UnusableSample("no_caption", "none", key) if number % 2 else Pair(b"broken", ("a",))
            yield StreamItem(key, pair, number + 1)


def tokens(captions: list[str]) -> Tensor:
    """Return the numbers that captions consist of, and two zeros."""
    return torch.tensor([[*(int(word) for word in caption.split()), 0, 0] for caption in captions])
