"""Features of pictures and captions, encoded by all processes together; the result does not depend on their number.

1. Cut the items into chunks of `batch_size`; chunk c goes to process c % num_processes, so a round of one chunk per
   process covers consecutive items.
2. In each round every process encodes its chunk and fills it up with zeros to `batch_size` rows.
3. Gather the round: in rank order the rows are the next items, and what is left over at the end is filling.

Every process ends up with all features. Each chunk meets the tower in the same shape wherever it is encoded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL.Image import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from accel_clip.data.bad_samples import UnusableSample
from accel_clip.data.decode import decode_picture
from accel_clip.data.loader import ignore_interrupt
from accel_clip.data.sources.base import Source
from accel_clip.faults import DataError
from accel_clip.models.build import ClipModel
from accel_clip.models.towers import encode_image, encode_text, evaluation_mode

PICTURES_PER_MESSAGE = 32  # what a worker hands over at once: small enough that few pictures keep all workers busy


def encode_pictures(
    accelerator: Accelerator,
    model: ClipModel,
    source: Source,
    indices: Sequence[int],
    batch_size: int,
    max_pixels: float,
    num_workers: int,
) -> Tensor:
    """Return the features of the pictures at `indices` of a source, float32 [N, D] on the CPU of every process.

    Pictures are decoded in full and go through open_clip's evaluation transform. Raises `DataError` on all processes
    when one of them meets a picture that cannot be used.
    """
    transform = image_transform_v2(PreprocessCfg(**model.preprocess_config), is_train=False)
    pictures = Pictures(source, transform, max_pixels)
    own_chunks = [[indices[item] for item in chunk] for chunk in chunks_of(accelerator, len(indices), batch_size)]
    loaded = load(pictures, own_chunks, num_workers, accelerator.device)
    return encode(accelerator, model, "image", loaded, len(indices), batch_size)


def encode_captions(accelerator: Accelerator, model: ClipModel, captions: Sequence[str], batch_size: int) -> Tensor:
    """Return the features of captions, float32 [M, D] on the CPU of every process."""
    own_chunks = chunks_of(accelerator, len(captions), batch_size)
    tokens = (model.tokenizer([captions[item] for item in chunk]).to(accelerator.device) for chunk in own_chunks)
    return encode(accelerator, model, "text", tokens, len(captions), batch_size)


def chunks_of(accelerator: Accelerator, num_items: int, batch_size: int) -> list[range]:
    """Return the chunks of items that belong to this process."""
    chunks = [range(start, min(start + batch_size, num_items)) for start in range(0, num_items, batch_size)]
    return chunks[accelerator.process_index :: accelerator.num_processes]


def encode(
    accelerator: Accelerator,
    model: ClipModel,
    side: str,
    own_chunks: Iterable[Tensor | str],
    num_items: int,
    batch_size: int,
) -> Tensor:
    """Return the features of all items, float32 [num_items, D]; a chunk that is a text is an error to raise on all.

    side: `image` or `text`. The bare model is called: DDP's forward would broadcast buffers.
    """
    width = model.model_config["embed_dim"]
    features = torch.empty(num_items, width)
    chunks = iter(own_chunks)
    encoders: dict[str, Callable[..., Tensor]] = {"image": encode_image, "text": encode_text}
    with evaluation_mode(model.clip), torch.no_grad(), accelerator.autocast():
        for start in range(0, num_items, batch_size * accelerator.num_processes):
            chunk = next(chunks, None)  # None: in the last round some processes have nothing to encode
            raise_together(accelerator, chunk if isinstance(chunk, str) else None)
            rows = torch.zeros(batch_size, width, device=accelerator.device)
            if isinstance(chunk, Tensor):
                rows[: len(chunk)] = encoders[side](model.clip, chunk)
            gathered = accelerator.gather(rows)
            features[start : start + len(gathered)] = gathered[: num_items - start].cpu()
    return features


def raise_together(accelerator: Accelerator, problem: str | None) -> None:
    """Raise `DataError` on all processes when one of them has a problem, so that none waits for one that is gone."""
    failed = accelerator.gather(torch.tensor([int(problem is not None)], device=accelerator.device))
    if failed.any():
        raise DataError(next(text for text in gather_object([problem]) if text is not None))


class Pictures(Dataset[Tensor | str]):
    """The pictures of a source, ready for the image tower; what cannot be used becomes a text that says why.

    Raised in a worker, an error would lose its type.
    """

    def __init__(self, source: Source, transform: Callable[[Image], Tensor], max_pixels: float) -> None:
        self.source, self.transform, self.max_pixels = source, transform, max_pixels

    def __getitem__(self, index: int) -> Tensor | str:
        try:
            return self.transform(decode_picture(self.source[index].image, self.max_pixels))
        except UnusableSample as problem:
            return describe(self.source, index, problem)
        except DataError as error:
            return str(error)


def describe(source: Source, index: int, problem: UnusableSample) -> str:
    """Return the line that ends an evaluation which meets an unusable sample."""
    return (
        f"{problem.path or source.key(index)}: sample {index} of {source.name} is {problem.reason}: {problem.detail}; "
        "evaluation needs every picture: repair it, or take it out of the source"
    )


def load(
    pictures: Pictures, own_chunks: list[list[int]], num_workers: int, device: torch.device
) -> Iterator[Tensor | str]:
    """Yield this process's chunks of pictures, float32 [n, 3, H, W] on the device, or what is wrong with one.

    A generator of its own keeps the loader from drawing on torch's, which belongs to the training.
    """
    messages = [split(chunk) for chunk in own_chunks]
    loader = DataLoader(
        pictures,
        batch_sampler=[message for chunk in messages for message in chunk],
        collate_fn=stack,
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=ignore_interrupt,
        generator=torch.Generator(),
    )
    received = iter(loader)
    for chunk in messages:
        yield join(list(islice(received, len(chunk))), device)


def split(chunk: list[int]) -> list[list[int]]:
    """Return a chunk in the portions that workers hand over."""
    return [chunk[start : start + PICTURES_PER_MESSAGE] for start in range(0, len(chunk), PICTURES_PER_MESSAGE)]


def join(messages: list[Tensor | str], device: torch.device) -> Tensor | str:
    """Return the portions of a chunk as one tensor on the device, or the first problem among them."""
    for message in messages:
        if isinstance(message, str):
            return message
    parts = [message.to(device, non_blocking=True) for message in messages if isinstance(message, Tensor)]
    return torch.cat(parts)


def stack(loaded: list[Tensor | str]) -> Tensor | str:
    """Return pictures as one tensor, or the first problem among them."""
    for item in loaded:
        if isinstance(item, str):
            return item
    return torch.stack([item for item in loaded if isinstance(item, Tensor)])
