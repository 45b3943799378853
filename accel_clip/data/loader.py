"""Batches for one process: samples fetched, decoded, augmented and tokenized in worker processes, ahead of the step."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from PIL.Image import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms.functional import pil_to_tensor

from accel_clip.config import DataConfig
from accel_clip.data.bad_samples import BadSample, UnusableData, UnusableSample
from accel_clip.data.batch import Batch
from accel_clip.data.captions import choose_caption, hash_of
from accel_clip.data.decode import decode_picture
from accel_clip.data.feature_cache import FeatureCache
from accel_clip.data.order import Order, no_usable_sample
from accel_clip.data.sources.base import Pair, Source
from accel_clip.data.sources.combine import origin
from accel_clip.faults import DataError
from accel_clip.randomness import derive_seed, seeded

MOST_KNOWN_CAPTIONS = 100_000  # about 100 MB; tokenizing costs more than decoding a small picture
TRAINING_CROP_SCALE = (
    0.9,
    1.0,
)  # share of the picture that is kept; open_clip's default (transform.py, AugmentationCfg)

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
        self.crop = RandomResizedCrop(image_size, TRAINING_CROP_SCALE, interpolation=InterpolationMode.BICUBIC)

    def __getitem__(self, place: Place) -> Example | DataError:
        """Return the pair at a place; an error is returned too, since raised in a worker it would lose its message."""
        try:
            return self.find(place)
        except DataError as error:
            return error

    def find(self, place: Place) -> Example:
        """Return the pair at a place, or the first usable one that may stand there; raises `DataError` without any."""
        met: list[BadSample] = []
        for sample in self.order.candidates(place.epoch, place.position):
            try:
                return self.load(sample, place.epoch, tuple(met[:1]))
            except UnusableSample as problem:
                met.append(self.describe(problem, sample, place.epoch))
        raise no_usable_sample(place.epoch, place.position)

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
        picture = decode_picture(pair.image, self.max_pixels)
        if self.pixels is not None:
            return self.pixels(picture)
        with seeded(derive_seed(self.order.seed, "augmentation", epoch, sample)):
            return self.augment(picture)

    def tokens_of(self, caption: str) -> Tensor:
        """Return a caption's tokens; those of earlier epochs are remembered, as far as there is room."""
        tokens = self.known_tokens.get(caption)
        if tokens is None:
            tokens = self.tokenizer([caption])[0]
            if len(self.known_tokens) < MOST_KNOWN_CAPTIONS:
                self.known_tokens[caption] = tokens
        return tokens

    def augment(self, picture: Image) -> Tensor:
        """Return a random crop at the model's size, uint8 [3, H, W]."""
        return pil_to_tensor(self.crop(picture))

    def describe(self, problem: UnusableSample, sample: int, epoch: int) -> BadSample:
        """Return the record of an unusable sample."""
        source, index = origin(self.source, sample)
        return BadSample(source.name, index, problem.reason, problem.path, problem.detail, epoch)


def numbers_in(pair: Pair) -> dict[str, Tensor]:
    """Return a pair's columns of numbers, float32; raises `UnusableSample` where they could mean several captions."""
    if pair.extra and len(pair.captions) > 1:
        detail = f"{len(pair.captions)} captions share the numbers in {', '.join(pair.extra)}: write a row for each"
        raise UnusableSample("unreadable", detail)
    return {name: torch.tensor(numbers, dtype=torch.float32) for name, numbers in pair.extra.items()}


class BatchPlaces(Sampler[list[Place]]):
    """The places of one process, batch after batch over all epochs of the run."""

    def __init__(self, order: Order, num_batches: int, process: int, num_processes: int) -> None:
        self.order, self.num_batches = order, num_batches
        self.process, self.num_processes = process, num_processes

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[list[Place]]:
        for batch in range(self.num_batches):
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
    """Leave Ctrl-C to the training process, which ends its workers itself."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def iterate(
    pairs: TrainingPairs, places: BatchPlaces, config: DataConfig, num_workers: int, pin_memory: bool
) -> Iterator[Batch]:
    """Yield the batches of one process, on the CPU; raises what a worker could not get over.

    A generator of its own keeps the loader from drawing on torch's, so that dropout does not depend on the workers.
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
    for item in loader:
        if isinstance(item, DataError):
            raise UnusableData(str(item)) from item
        yield item
