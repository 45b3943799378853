"""From a pair as it is stored to an example: its picture decoded and augmented, one of its captions tokenized."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random

import torch
from PIL.Image import Image
from torch import Tensor

from accel_clip.config import Config
from accel_clip.data.bad_samples import BadSample, UnusableSample
from accel_clip.data.batch import Batch
from accel_clip.data.caches.features import FeatureCache
from accel_clip.data.caches.pictures import PictureCache
from accel_clip.data.captions import choose_caption, identity_hash, is_caption_cut
from accel_clip.data.pictures.augmentation import (
    cropped,
    evaluation_pixels,
    pixels_of,
    random_box,
    resized,
    training_scale,
)
from accel_clip.data.pictures.decode import decode_picture, decode_small
from accel_clip.data.pictures.transforms import Transforms, build_transforms
from accel_clip.data.sources.base import Pair
from accel_clip.models.build import ClipModel
from accel_clip.randomness import derive_seed

MOST_KNOWN_CAPTIONS = 1 << 15  # about 20 MB a worker; tokenizing costs more than decoding a small picture
NO_PICTURE = torch.empty(3, 0, 0, dtype=torch.uint8)


@dataclass(frozen=True)
class Example:
    """One pair, ready for a batch."""

    image: Tensor
    """uint8 [3, H, W], empty where its features are known"""
    tokens: Tensor
    """int [L]"""
    sample: int
    """the pair's index over all sources"""
    caption_hash: int
    """equal for equal captions, int64"""
    picture_hash: int
    """equal for pairs of one picture, int64"""
    extra: dict[str, Tensor] = field(default_factory=dict)
    """float32 [any width] by column"""
    features: dict[str, Tensor] = field(default_factory=dict)
    """those of a frozen tower that are known, float32 [D] by name"""
    is_cut: bool = False
    """whether the caption has more tokens than these"""


class Preparation:
    """What a pair goes through before it stands in a batch, drawn by (seed, epoch, sample) alone.

    image_size: height and width of the model's pictures. pixels: from a decoded picture to uint8 [3, H, W], the
    same every time; None = a random crop of `image_size`. features: what is known of a tower, image or text; where
    pictures are known none is decoded, and `image` is empty. pictures: their decoded pixels, so that none is decoded.
    transforms: what follows, in training alone.
    """

    def __init__(
        self,
        tokenizer: Callable[[list[str]], Tensor],
        image_size: tuple[int, int],
        max_pixels: float,
        seed: int,
        pixels: Callable[[Image], Tensor] | None = None,
        features: Mapping[str, FeatureCache] | None = None,
        pictures: PictureCache | None = None,
        transforms: Transforms | None = None,
    ) -> None:
        self.tokenizer, self.max_pixels, self.seed = tokenizer, max_pixels, seed
        self.pixels, self.features, self.pictures = pixels, features or {}, pictures
        self.transforms = transforms
        self.known_tokens: dict[str, tuple[bytes, bool]] = {}  # a tensor takes three times as much as its numbers
        height, width = image_size
        self.size = width, height

    def example(self, pair: Pair, key: str, sample: int, epoch: int) -> Example:
        """Return a pair as an example; `key` is its picture's; raises `UnusableSample`."""
        caption = choose_caption(pair.captions, self.seed, epoch, sample, pair.weights)
        hashes = {"text": identity_hash("caption", caption), "image": identity_hash("picture", key)}
        features = {f"{side}_features": known[hashes[side]] for side, known in self.features.items()}
        image = NO_PICTURE if "image" in self.features else self.image_of(pair, hashes["image"], sample, epoch)
        (tokens, has_more), numbers = self.tokens_of(caption), columns_of_pair(pair)
        return Example(image, tokens, sample, hashes["text"], hashes["image"], numbers, features, has_more)

    def image_of(self, pair: Pair, picture_hash: int, sample: int, epoch: int) -> Tensor:
        """Return the pixels of a pair's picture as training sees it this time, uint8 [3, H, W]."""
        pixels = self.at_size(pair, picture_hash, sample, epoch)
        if self.transforms is None:
            return pixels
        return self.transforms(pixels, derive_seed(self.seed, "transforms", epoch, sample))

    def at_size(self, pair: Pair, picture_hash: int, sample: int, epoch: int) -> Tensor:
        """Return the part of a pair's picture that training sees this time, uint8 [3, H, W]."""
        pixels = self.decoded(pair.image) if self.pictures is None else self.pictures[picture_hash]
        if self.pixels is not None:
            return pixels
        height, width, _ = pixels.shape
        generator = Random(derive_seed(self.seed, "augmentation", epoch, sample))
        return resized(cropped(pixels, random_box(generator, width, height)), self.size)

    def decoded(self, image: Image | bytes | Path) -> Tensor:
        """Return what of a picture is always the same: uint8 [h, w, 3] to be cut, or [3, H, W] without augmentation."""
        if self.pixels is not None:
            return self.pixels(decode_picture(image, self.max_pixels))
        return pixels_of(decode_small(image, self.max_pixels, partial(training_scale, self.size)))

    def tokens_of(self, caption: str) -> tuple[Tensor, bool]:
        """Return a caption's tokens, int [L], and whether it has more; both are remembered as far as there is room."""
        known = self.known_tokens.get(caption)
        if known is not None:
            return torch.frombuffer(bytearray(known[0]), dtype=torch.int32).long(), known[1]
        tokens = self.tokenizer([caption])[0]
        has_more = is_caption_cut(caption, tokens, self.tokenizer)
        if len(self.known_tokens) < MOST_KNOWN_CAPTIONS:
            self.known_tokens[caption] = tokens.int().numpy().tobytes(), has_more
        return tokens, has_more


def preparation_for(
    model: ClipModel,
    config: Config,
    features: Mapping[str, FeatureCache] | None = None,
    pictures: PictureCache | None = None,
) -> Preparation:
    """Return what pairs go through on their way to a model, as the settings say."""
    data, preprocess = config.data, model.preprocess_config
    pixels = evaluation_pixels(preprocess) if data.augmentation == "none" else None
    size, transforms = model.picture_size, build_transforms(data.transforms, model.picture_size, preprocess["mean"])
    return Preparation(model.tokenizer, size, data.max_pixels, config.seed, pixels, features, pictures, transforms)


def columns_of_pair(pair: Pair) -> dict[str, Tensor]:
    """Return a pair's columns of numbers, float32; raises `UnusableSample` where they could mean several captions."""
    if pair.extra and len(pair.captions) > 1:
        detail = f"{len(pair.captions)} captions share the numbers in {', '.join(pair.extra)}: write a row for each"
        raise UnusableSample("unreadable", detail)
    return {name: torch.tensor(numbers, dtype=torch.float32) for name, numbers in pair.extra.items()}


def batch_of(examples: Sequence[Example], bad_samples: Sequence[BadSample]) -> Batch:
    """Return examples as one batch, with the unusable samples that were met on the way to them."""
    first = examples[0]
    return Batch(
        image=torch.stack([example.image for example in examples]),
        tokens=torch.stack([example.tokens for example in examples]),
        sample=torch.tensor([example.sample for example in examples]),
        caption_hash=torch.tensor([example.caption_hash for example in examples]),
        picture_hash=torch.tensor([example.picture_hash for example in examples]),
        bad_samples=tuple(bad_samples),
        num_cut_captions=sum(example.is_cut for example in examples),
        features={name: torch.stack([example.features[name] for example in examples]) for name in first.features},
        extra={name: torch.stack([example.extra[name] for example in examples]) for name in first.extra},
    )
