"""Features of pictures and captions, encoded by all processes together; the result does not depend on their number.

1. Cut the items into chunks of `batch_size` and deal them to the processes (`process/rounds.py`).
2. In each round every process encodes its chunk and fills it up with zeros to `batch_size` rows.
3. Gather the round: in rank order the rows are the next items, and what is left over at the end is filling.

Every process ends up with all features. Each chunk meets the tower in the same shape wherever it is encoded, and in
every evaluation: a picture that cannot be used is black there, and what becomes of it is left out afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from accel_clip.data.bad_samples import UnusableSample, missing_too_many, too_few_usable
from accel_clip.data.pictures.decode import decode_picture
from accel_clip.data.sources.base import Source
from accel_clip.data.workers import Workers
from accel_clip.faults import DataError
from accel_clip.models.build import ClipModel
from accel_clip.models.towers import encode_image, encode_text, evaluation_mode
from accel_clip.plugins import PluginsFirst
from accel_clip.process.rounds import in_rounds, own_chunks
from accel_clip.process.waiting import UNWATCHED, Lookout, never

PICTURES_PER_MESSAGE = 32  # what a worker hands over at once: small enough that few pictures keep all workers busy
Problems = dict[int, UnusableSample]
"""what is wrong with a picture, by its place among those that are encoded"""


@dataclass(frozen=True)
class PictureChunk:
    """Pictures ready for the image tower."""

    pictures: Tensor
    """float32 [n, 3, H, W]; those in `problems` are black"""
    problems: Problems = field(default_factory=dict)
    """what is wrong with those that cannot be used, by their place in the chunk"""

    def pin_memory(self) -> PictureChunk:
        """Return the pictures in page-locked memory (called by torch's DataLoader)."""
        return replace(self, pictures=self.pictures.pin_memory())


def encode_pictures(
    accelerator: Accelerator,
    model: ClipModel,
    source: Source,
    indices: Sequence[int],
    batch_size: int,
    max_pixels: float,
    num_workers: int,
    lookout: Lookout = UNWATCHED,
) -> tuple[Tensor, Problems]:
    """Return the features of the pictures at `indices` of a source, float32 [N, D] on the CPU, and which are unusable.

    Pictures are decoded in full and go through open_clip's evaluation transform; the features of an unusable one mean
    nothing. Every process gets the same. Raises `DataError` on all processes when a source fails on one of them, and
    `StopAsked` when one is asked to stop.
    """
    transform = image_transform_v2(PreprocessCfg(**model.preprocess_config), is_train=False)
    pictures = Pictures(source, transform, max_pixels)
    own_items = own_chunks(accelerator, len(indices), batch_size)
    own_indices = [[indices[item] for item in chunk] for chunk in own_items]
    loaded = load(pictures, own_indices, num_workers, accelerator.device, lookout.is_asked)
    own_problems: list[tuple[int, UnusableSample]] = []
    chunks = without_problems(loaded, own_items, own_problems)
    features = encode(accelerator, model, "image", chunks, len(indices), batch_size, lookout)
    return features, dict(sorted(gather_object(own_problems)))


def without_problems(
    loaded: Iterable[PictureChunk | str], own_items: Sequence[range], found: list[tuple[int, UnusableSample]]
) -> Iterator[Tensor | str]:
    """Yield the chunks of this process as the tower takes them, and add the problems in them to those found."""
    for items, chunk in zip(own_items, loaded, strict=True):
        if isinstance(chunk, str):
            yield chunk
        else:
            found += [(items[row], problem) for row, problem in chunk.problems.items()]
            yield chunk.pictures


def usable_places(source: Source, num_pictures: int, problems: Mapping[int, UnusableSample]) -> list[int]:
    """Return the places of the pictures that can be used; raises `DataError` without any, or when most are missing."""
    if len(problems) == num_pictures or missing_too_many(problems.values(), num_pictures):
        what = f"{source.name}: evaluation cannot use {len(problems)} of {num_pictures} pictures"
        raise too_few_usable(what, list(problems.values()))
    return [place for place in range(num_pictures) if place not in problems]


def encode_captions(
    accelerator: Accelerator,
    model: ClipModel,
    captions: Sequence[str],
    batch_size: int,
    lookout: Lookout = UNWATCHED,
) -> Tensor:
    """Return the features of captions, float32 [M, D] on the CPU of every process; raises `StopAsked` on all."""
    own = own_chunks(accelerator, len(captions), batch_size)
    tokens = (model.tokenizer([captions[item] for item in chunk]).to(accelerator.device) for chunk in own)
    return encode(accelerator, model, "text", tokens, len(captions), batch_size, lookout)


def encode(
    accelerator: Accelerator,
    model: ClipModel,
    side: str,
    own: Iterable[Tensor | str],
    num_items: int,
    batch_size: int,
    lookout: Lookout,
) -> Tensor:
    """Return the features of all items, float32 [num_items, D]; a chunk that is a text is an error to raise on all.

    So is `StopAsked`. side: `image` or `text`. The bare model is called: DDP's forward would broadcast buffers.
    """
    width = model.model_config["embed_dim"]
    features = torch.empty(num_items, width)
    encoders: dict[str, Callable[..., Tensor]] = {"image": encode_image, "text": encode_text}
    with evaluation_mode(model.clip), torch.no_grad(), accelerator.autocast():
        for items, chunk in in_rounds(accelerator, own, num_items, batch_size, lookout, "evaluation"):
            raise_together(accelerator, chunk if isinstance(chunk, str) else None)
            rows = torch.zeros(batch_size, width, device=accelerator.device)
            if isinstance(chunk, Tensor):
                rows[: len(chunk)] = encoders[side](model.clip, chunk)
            features[items.start : items.stop] = accelerator.gather(rows)[: len(items)].cpu()
    return features


def raise_together(accelerator: Accelerator, problem: str | None) -> None:
    """Raise `DataError` on all processes when one of them has a problem, so that none waits for one that is gone."""
    failed = accelerator.gather(torch.tensor([int(problem is not None)], device=accelerator.device))
    if failed.any():
        text = next(text for text in gather_object([problem]) if text is not None)
        raise DataError(text)


class Pictures(PluginsFirst, Dataset[Tensor | UnusableSample | str]):
    """The pictures of a source, ready for the image tower; an error is returned: raised in a worker it loses its type.

    A text is an error that ends the evaluation.
    """

    def __init__(self, source: Source, transform: Callable[[Image.Image], Tensor], max_pixels: float) -> None:
        self.source, self.transform, self.max_pixels = source, transform, max_pixels

    def __getitem__(self, index: int) -> Tensor | UnusableSample | str:
        try:
            return self.transform(decode_picture(self.source[index].image, self.max_pixels))
        except UnusableSample as problem:
            return UnusableSample(problem.reason, problem.detail, problem.path or self.source.key(index))
        except DataError as error:
            return str(error)

    def black(self) -> Tensor:
        """Return what stands for a picture that cannot be used."""
        return self.transform(Image.new("RGB", (1, 1)))

    def collate(self, loaded: list[Tensor | UnusableSample | str]) -> PictureChunk | str:
        """Return pictures as one tensor, or the first error that ends the evaluation."""
        for item in loaded:
            if isinstance(item, str):
                return item
        problems = {row: item for row, item in enumerate(loaded) if isinstance(item, UnusableSample)}
        return PictureChunk(
            torch.stack([item if isinstance(item, Tensor) else self.black() for item in loaded]), problems
        )


def load(
    pictures: Pictures,
    own_chunks: list[list[int]],
    num_workers: int,
    device: torch.device,
    is_asked: Callable[[], bool] = never,
) -> Iterator[PictureChunk | str]:
    """Yield this process's chunks of pictures, on the device, or the error that ends the evaluation.

    Raises `StopAsked` when this process is asked to stop.
    """
    messages = [split(chunk) for chunk in own_chunks]
    workers = Workers(num_workers, pin_memory=device.type == "cuda", is_asked=is_asked)
    received = workers.load(pictures, pictures.collate, [each for chunk in messages for each in chunk])
    for chunk in messages:
        yield join(list(islice(received, len(chunk))), device)


def split(chunk: list[int]) -> list[list[int]]:
    """Return a chunk in the portions that workers hand over."""
    return [chunk[start : start + PICTURES_PER_MESSAGE] for start in range(0, len(chunk), PICTURES_PER_MESSAGE)]


def join(messages: list[PictureChunk | str], device: torch.device) -> PictureChunk | str:
    """Return the portions of a chunk as one on the device, or the first error among them."""
    parts: list[Tensor] = []
    problems: Problems = {}
    num_pictures = 0
    for message in messages:
        if isinstance(message, str):
            return message
        problems |= {num_pictures + row: problem for row, problem in message.problems.items()}
        parts.append(message.pictures.to(device, non_blocking=True))
        num_pictures += len(message.pictures)
    return PictureChunk(torch.cat(parts), problems)
