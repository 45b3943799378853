"""A sample of the training pairs, spread evenly over the data and looked at as the loader does."""

from __future__ import annotations

import textwrap
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path, PurePosixPath

import numpy
from PIL.Image import Image
from torch import Tensor

from accel_clip.data.bad_samples import UnusableSample, may_be_the_root
from accel_clip.data.captions import choose_caption, identity_hash, is_caption_cut
from accel_clip.data.examples import columns_of_pair
from accel_clip.data.feed import Feed
from accel_clip.data.pictures.augmentation import training_scale
from accel_clip.data.pictures.decode import decode_small
from accel_clip.data.sources.base import Pair, Source, Stream
from accel_clip.data.sources.combine import Concatenated, origin
from accel_clip.data.sources.endings import PICTURE_SUFFIXES

SHARDS_TO_LOOK_AT = 4
CAPTIONS_TO_SHOW, LONGEST_SHOWN = 3, 100  # characters
MOST_SECONDS = 60.0  # large pictures are decoded at ten a second: fewer are looked at then


@dataclass(frozen=True)
class SampledPair:
    """A usable pair of the sample."""

    source: str
    """name of the source that it comes from"""
    caption: str
    """the one that is drawn for the first epoch"""
    picture_size: tuple[int, int]
    """width and height of its picture in pixels"""
    decoded_size: tuple[int, int]
    """width and height of what is decoded of the picture for training"""
    tokens: Tensor
    """those of the caption, int [L]"""
    is_cut: bool
    """whether they are not all of the caption"""
    picture_hash: int
    """equal for equal pictures"""
    caption_hash: int
    """equal for equal captions"""
    numbers: dict[str, Tensor]
    """further columns of the pair, by name"""
    is_file_name: bool
    """whether the caption is the name of a picture file"""


@dataclass
class Sample:
    """What was found."""

    num_looked_at: int = 0
    """pairs that were looked at, usable or not"""
    pairs: list[SampledPair] = field(default_factory=list)
    """the usable ones"""
    unusable: Counter[str] = field(default_factory=Counter)
    """how many are not, by reason"""
    first: dict[str, tuple[int, str]] = field(default_factory=dict)
    """the one that stands first in the data, by reason: its index, and what is wrong with it"""
    num_missing_files: int = 0
    """unusable ones that another `data.image_root` might have"""
    seconds: float = 0.0
    """what looking at all took"""

    def take_unusable(self, source: Source, index: int, problem: UnusableSample) -> None:
        """Count an unusable pair, and keep the one of its reason that stands first in the data."""
        self.unusable[problem.reason] += 1
        self.num_missing_files += may_be_the_root(problem)
        within, row = origin(source, index)
        where = f"{problem.path or within.name}, sample {row}"
        found = index, " ".join(f"{where}: {problem.detail}".split())
        self.first[problem.reason] = min(found, self.first.get(problem.reason, found))

    def captions(self) -> dict[str, list[str]]:
        """Return the first few captions of each source, on one line each, the end of a long one left out."""
        shown: dict[str, list[str]] = {}
        for pair in self.pairs:
            found = shown.setdefault(pair.source, [])
            if len(found) < CAPTIONS_TO_SHOW:
                end = f" [cut after {len(pair.tokens)} tokens]" if pair.is_cut else ""
                found.append(textwrap.shorten(pair.caption, LONGEST_SHOWN, placeholder=" …") + end)
        return shown

    def num_repeated(self, kind: str) -> int:
        """Return how many pairs show a picture, or a caption, that one before them shows."""
        return len(self.pairs) - len({getattr(pair, f"{kind}_hash") for pair in self.pairs})


@dataclass(frozen=True)
class PairSampler:
    """Looks at pairs as the loader does."""

    source: Source
    """what it takes pairs of"""
    tokenizer: Callable[..., Tensor]
    """the model's, from texts to int [n, L]"""
    size: tuple[int, int]
    """the model's picture size, width and height in pixels"""
    seed: int
    """that of the run, which a pair's caption is drawn by"""
    max_pixels: float
    """largest picture that is decoded, in pixels"""

    def look_at(self, index: int) -> SampledPair:
        """Return what a pair is in the first epoch; raises `UnusableSample` where the loader does."""
        pair = self.source[index]
        caption = choose_caption(pair.captions, self.seed, 0, index, pair.weights)
        picture_size, decoded_size = self.sizes_of(pair.image)
        tokens = self.tokenizer([caption])[0]
        return SampledPair(
            origin(self.source, index)[0].name,
            caption,
            picture_size,
            decoded_size,
            tokens,
            is_caption_cut(caption, tokens, self.tokenizer),
            identity_hash("picture", self.source.key(index)),
            identity_hash("caption", caption),
            columns_of_pair(pair),
            PurePosixPath(caption).suffix.lower() in PICTURE_SUFFIXES,
        )

    def sizes_of(self, image: Image | bytes | Path) -> tuple[tuple[int, int], tuple[int, int]]:
        """Return a picture's width and height, and those at which it is decoded; raises `UnusableSample`."""
        sizes: list[tuple[int, int]] = []

        def scale_for(width: int, height: int, spare: float) -> int:
            sizes.append((width, height))
            return training_scale(self.size, width, height, spare)

        decoded = decode_small(image, self.max_pixels, scale_for)
        return sizes[0], decoded.size


class StreamBeginning:
    """The first pairs of a stream, as a source that knows its pairs; they come from up to four of its shards."""

    def __init__(self, stream: Stream, num_samples: int) -> None:
        self.name = stream.name
        num_shards = min(stream.num_shards, SHARDS_TO_LOOK_AT)
        heads = (islice(stream.read(shard, 0), -(-num_samples // num_shards)) for shard in range(num_shards))
        self.items = [item for head in heads for item in head]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Pair:
        pair = self.items[index].pair
        if isinstance(pair, UnusableSample):
            raise pair
        return pair

    def key(self, index: int) -> str:
        """Return the key that the stream gives the picture."""
        return self.items[index].key


def known_part(feed: Feed, num_samples: int) -> Source:
    """Return the pairs that can be fetched by their number, and the beginnings of streams."""
    sources: list[Source] = [] if feed.fetched is None else [feed.fetched.source]
    sources += [StreamBeginning(part.stream, max(1, num_samples // len(feed.parts))) for part in feed.streams]
    return sources[0] if len(sources) == 1 else Concatenated(sources)


def look_at_sample(sampler: PairSampler, num_samples: int) -> Sample:
    """Return what a sample of a source holds; smaller than asked for where decoding takes too long."""
    sample = Sample()
    start = time.perf_counter()
    for index in spread(len(sampler.source), num_samples):
        try:
            sample.pairs.append(sampler.look_at(index))
        except UnusableSample as problem:
            sample.take_unusable(sampler.source, index, problem)
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
