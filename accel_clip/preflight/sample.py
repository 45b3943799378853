"""A sample of the training pairs, spread evenly over the data and looked at as the loader does."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy
from PIL.Image import Image
from torch import Tensor

from accel_clip.data.bad_samples import UnusableSample
from accel_clip.data.captions import choose_caption, hash_of
from accel_clip.data.decode import Box, decode_part
from accel_clip.data.examples import numbers_in
from accel_clip.data.sources.base import Source
from accel_clip.data.sources.combine import origin

MOST_SECONDS = 60.0  # large pictures are decoded at ten a second: fewer are looked at then


@dataclass(frozen=True)
class Look:
    """A usable pair: its picture's size in pixels, its tokens int [L], and whether they are not all of the caption."""

    picture_size: tuple[int, int]
    tokens: Tensor
    is_cut: bool
    picture_hash: int
    caption_hash: int
    numbers: dict[str, Tensor]


@dataclass
class Sample:
    """What was found: the usable pairs, and the unusable ones by reason, of each the first with its index."""

    num_looked_at: int = 0
    looks: list[Look] = field(default_factory=list)
    unusable: Counter[str] = field(default_factory=Counter)
    first: dict[str, tuple[int, str]] = field(default_factory=dict)
    seconds: float = 0.0

    def take_unusable(self, source: Source, index: int, problem: UnusableSample) -> None:
        """Count an unusable pair, and keep the one of its reason that stands first in the data."""
        self.unusable[problem.reason] += 1
        within, row = origin(source, index)
        where = f"{problem.path or within.name}, sample {row}"
        found = index, " ".join(f"{where}: {problem.detail}".split())
        self.first[problem.reason] = min(found, self.first.get(problem.reason, found))

    def num_repeated(self, kind: str) -> int:
        """Return how many pairs show a picture, or a caption, that one before them shows."""
        return len(self.looks) - len({getattr(look, f"{kind}_hash") for look in self.looks})


@dataclass(frozen=True)
class Looker:
    """Looks at pairs as the loader does; `size` is the model's, width and height in pixels."""

    source: Source
    tokenizer: Callable[..., Tensor]
    size: tuple[int, int]
    seed: int
    max_pixels: float

    def look_at(self, index: int) -> Look:
        """Return what a pair is in the first epoch; raises `UnusableSample` where the loader does."""
        pair = self.source[index]
        caption = choose_caption(pair.captions, self.seed, 0, index)
        picture_size = self.decoded_size(pair.image)
        tokens = self.tokenizer([caption])[0]
        return Look(
            picture_size,
            tokens,
            is_cut(caption, tokens, self.tokenizer),
            hash_of("picture", self.source.key(index)),
            hash_of("caption", caption),
            numbers_in(pair),
        )

    def decoded_size(self, image: Image | bytes | Path) -> tuple[int, int]:
        """Return a picture's width and height after decoding it; raises `UnusableSample`."""
        sizes: list[tuple[int, int]] = []

        def whole(width: int, height: int) -> Box:
            sizes.append((width, height))
            return 0, 0, width, height

        decode_part(image, self.max_pixels, whole, self.size)
        return sizes[0]


def look_at_sample(looker: Looker, num_samples: int) -> Sample:
    """Return what a sample of a source holds; smaller than asked for where decoding takes too long."""
    sample = Sample()
    start = time.perf_counter()
    for index in spread(len(looker.source), num_samples):
        try:
            sample.looks.append(looker.look_at(index))
        except UnusableSample as problem:
            sample.take_unusable(looker.source, index, problem)
        sample.num_looked_at += 1
        sample.seconds = time.perf_counter() - start
        if sample.seconds > MOST_SECONDS:
            break
    return sample


def spread(num_pairs: int, num_samples: int) -> list[int]:
    """Return indices that are spread evenly, in an order of which every beginning is spread too."""
    number = min(num_pairs, num_samples)
    even = numpy.arange(number) * num_pairs // number
    return numpy.random.Generator(numpy.random.PCG64(0)).permutation(even).tolist()


def is_cut(caption: str, tokens: Tensor, tokenizer: Callable[..., Tensor]) -> bool:
    """Return whether a caption has more tokens than its context: with room for one more it reads differently."""
    longer = tokenizer([caption], context_length=len(tokens) + 1)[0]
    return not bool((longer[: len(tokens)] == tokens).all())
