"""Batches for one process: samples fetched, decoded, augmented and tokenized in worker processes, ahead of the step."""

from __future__ import annotations

import atexit
import multiprocessing
import signal
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from random import Random

import torch
from PIL.Image import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from accel_clip.config import DataConfig
from accel_clip.data.augmentation import random_box, resized
from accel_clip.data.bad_samples import (
    MISSING,
    SAMPLES_TO_KNOW_THE_ROOT,
    BadSample,
    UnusableData,
    UnusableSample,
    too_few_usable,
)
from accel_clip.data.batch import Batch
from accel_clip.data.captions import choose_caption, hash_of
from accel_clip.data.decode import decode_part, decode_picture
from accel_clip.data.feature_cache import FeatureCache
from accel_clip.data.order import Order
from accel_clip.data.sources.base import Pair, Source
from accel_clip.data.sources.combine import origin
from accel_clip.faults import DataError, recognised
from accel_clip.randomness import derive_seed

MOST_KNOWN_CAPTIONS = 100_000  # about 100 MB; tokenizing costs more than decoding a small picture
NO_PICTURE = torch.empty(3, 0, 0, dtype=torch.uint8)


@dataclass(frozen=True)
class Place:
    """A position in the order of an epoch."""

    epoch: int
    position: int


@dataclass(frozen=True)
class Example:
    """One pair, ready for a batch: image uint8 [3, H, W], tokens int [L], extra float32 [any width] by column.

    features: those of a frozen tower that are known, float32 [D] by name; without its pixels `image` is empty.
    """

    image: Tensor
    tokens: Tensor
    sample: int
    caption_hash: int
    picture_hash: int
    bad_samples: tuple[BadSample, ...]
    extra: dict[str, Tensor] = field(default_factory=dict)
    features: dict[str, Tensor] = field(default_factory=dict)


class TrainingPairs(Dataset[Example | DataError]):
    """The pairs of a source by their place in the order; an unusable one is replaced by rule.

    pixels: from a decoded picture to uint8 [3, H, W], the same every time; None = a random crop of `image_size`.
    features: what is known of a tower, image or text; where pictures are known none is decoded, and `image` is empty.
    """

    def __init__(
        self,
        source: Source,
        order: Order,
        tokenizer: Callable[[list[str]], Tensor],
        image_size: int | tuple[int, int],
        max_pixels: float,
        pixels: Callable[[Image], Tensor] | None = None,
        features: Mapping[str, FeatureCache] | None = None,
    ) -> None:
        self.pixels, self.features = pixels, features or {}
        self.source, self.order, self.tokenizer, self.max_pixels = source, order, tokenizer, max_pixels
        self.known_tokens: dict[str, Tensor] = {}
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        self.size = width, height

    def __getitem__(self, place: Place) -> Example | DataError:
        """Return the pair at a place; an error is returned too, since raised in a worker it would lose its message."""
        try:
            return self.find(place)
        except DataError as error:
            return error

    def find(self, place: Place) -> Example:
        """Return the pair at a place, or the first usable one that may stand there; raises `DataError` without any.

        The search ends early where nothing but missing files is met: a wrong folder is told before all of it is tried.
        """
        met: list[BadSample] = []
        for sample in self.order.candidates(place.epoch, place.position):
            try:
                return self.load(sample, place.epoch, tuple(met))
            except UnusableSample as problem:
                met.append(self.describe(problem, sample, place.epoch, its_turn=not met))
            if len(met) >= SAMPLES_TO_KNOW_THE_ROOT and all(bad.reason == MISSING for bad in met):
                break
        where = f"position {place.position} of epoch {place.epoch}"
        raise too_few_usable(f"data.train: no sample can be used at {where}", met)

    def load(self, sample: int, epoch: int, bad_samples: tuple[BadSample, ...]) -> Example:
        """Return a sample; its caption and augmentation are drawn by (seed, epoch, sample) alone."""
        pair = self.source[sample]
        caption = choose_caption(pair.captions, self.order.seed, epoch, sample)
        hashes = {"text": hash_of("caption", caption), "image": hash_of("picture", self.source.key(sample))}
        features = {f"{side}_features": known[hashes[side]] for side, known in self.features.items()}
        image = NO_PICTURE if "image" in self.features else self.image_of(pair, sample, epoch)
        tokens, numbers = self.tokens_of(caption), numbers_in(pair)
        return Example(image, tokens, sample, hashes["text"], hashes["image"], bad_samples, numbers, features)

    def image_of(self, pair: Pair, sample: int, epoch: int) -> Tensor:
        """Return the pixels of a pair's picture, uint8 [3, H, W]."""
        if self.pixels is not None:
            return self.pixels(decode_picture(pair.image, self.max_pixels))
        choose = partial(random_box, Random(derive_seed(self.order.seed, "augmentation", epoch, sample)))
        return resized(decode_part(pair.image, self.max_pixels, choose, self.size), self.size)

    def tokens_of(self, caption: str) -> Tensor:
        """Return a caption's tokens; those of earlier epochs are remembered, as far as there is room."""
        tokens = self.known_tokens.get(caption)
        if tokens is None:
            tokens = self.tokenizer([caption])[0]
            if len(self.known_tokens) < MOST_KNOWN_CAPTIONS:
                self.known_tokens[caption] = tokens
        return tokens

    def describe(self, problem: UnusableSample, sample: int, epoch: int, its_turn: bool) -> BadSample:
        """Return the record of an unusable sample."""
        source, index = origin(self.source, sample)
        return BadSample(source.name, index, problem.reason, problem.path, problem.detail, epoch, its_turn)


def numbers_in(pair: Pair) -> dict[str, Tensor]:
    """Return a pair's columns of numbers, float32; raises `UnusableSample` where they could mean several captions."""
    if pair.extra and len(pair.captions) > 1:
        detail = f"{len(pair.captions)} captions share the numbers in {', '.join(pair.extra)}: write a row for each"
        raise UnusableSample("unreadable", detail)
    return {name: torch.tensor(numbers, dtype=torch.float32) for name, numbers in pair.extra.items()}


class BatchPlaces(Sampler[list[Place]]):
    """The places of one process in the contrastive batches of the run that are named, over all epochs."""

    def __init__(self, order: Order, batches: range, process: int, num_processes: int) -> None:
        self.order, self.batches = order, batches
        self.process, self.num_processes = process, num_processes

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[Place]]:
        for batch in self.batches:
            epoch, positions = self.order.positions(batch, self.process, self.num_processes)
            yield [Place(epoch, position) for position in positions]


def collate(fetched: Sequence[Example | DataError]) -> Batch | DataError:
    """Return examples as one batch, or the first error among them."""
    for item in fetched:
        if isinstance(item, DataError):
            return item
    examples = [item for item in fetched if isinstance(item, Example)]
    return Batch(
        image=torch.stack([example.image for example in examples]),
        tokens=torch.stack([example.tokens for example in examples]),
        sample=torch.tensor([example.sample for example in examples]),
        caption_hash=torch.tensor([example.caption_hash for example in examples]),
        picture_hash=torch.tensor([example.picture_hash for example in examples]),
        bad_samples=tuple(bad for example in examples for bad in example.bad_samples),
        features={name: torch.stack([example.features[name] for example in examples]) for name in examples[0].features},
        extra={name: torch.stack([example.extra[name] for example in examples]) for name in examples[0].extra},
    )


def ignore_interrupt(worker: int) -> None:
    """Leave Ctrl-C and SIGTERM, which a launcher sends to the whole group, to the training process.

    It may need more batches until it stops, and tells its workers to end itself.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


@atexit.register
def end_workers() -> None:
    """End the workers that are left when the program ends, such as those of a loader that an error's traceback holds.

    Python would ask them by SIGTERM, which they ignore, and wait for them forever.
    """
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would take the killed for an error
    for worker in multiprocessing.active_children():
        if worker.daemon:
            worker.kill()


def iterate(
    pairs: TrainingPairs, places: BatchPlaces, config: DataConfig, num_workers: int, pin_memory: bool
) -> Generator[Batch, None, None]:
    """Yield the batches of one process, on the CPU; raises what a worker could not get over, and `WorkerKilled`.

    Closed, it ends its workers. A generator of its own keeps the loader from drawing on torch's, so that dropout does
    not depend on the workers.
    """
    loader = DataLoader(
        pairs,
        batch_sampler=places,
        collate_fn=collate,
        num_workers=num_workers,
        prefetch_factor=config.prefetch if num_workers else None,
        pin_memory=pin_memory,
        worker_init_fn=ignore_interrupt,
        generator=torch.Generator(),
    )
    with recognised():
        for item in loader:
            if isinstance(item, DataError):
                raise UnusableData(str(item)) from item
            yield item
