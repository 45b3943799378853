"""python benchmarks/loader.py

Pictures per second and core that reach a batch of 224 x 224 pixels and tokens: accel_clip's loader beside
open_clip_train's `get_wds_dataset` on the same local tar shards, one worker process each. The clock is the processor
time of the training process and its worker together, so other programs disturb it little.

With --against decoding: the loader with its pictures decoded beforehand (data.image_cache_gib) beside the same without.

open_clip_train 3.3.0 needs webdataset 0.2.86 or older; a newer one ends its shards with an error. Where another is
installed: pip install --no-deps --target FOLDER webdataset==0.2.86, then PYTHONPATH=FOLDER.
"""

from __future__ import annotations

import argparse
import io
import os
import random
import resource
import tarfile
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import numpy
import open_clip
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from open_clip_train.data import get_wds_dataset
from PIL import Image
from timing import Timing, describe_machine

from accel_clip.config import DataConfig
from accel_clip.data.caches.items import CachePlan, DifferentPictures
from accel_clip.data.caches.picture_building import build
from accel_clip.data.caches.pictures import PictureCache
from accel_clip.data.examples import Preparation
from accel_clip.data.loader import BatchPlaces, TrainingPairs, iterate
from accel_clip.data.order import Order
from accel_clip.data.sources.resolve import open_source

SIZES = ("640x480", "1600x1200")
PIXELS = 224
OTHER, DECODING = "open_clip_train", "decoding"
TOKENIZER = open_clip.get_tokenizer("ViT-B-32")
SLOPE = 1.25  # the amplitude of photographs falls with the frequency to about this power
CONTRAST = 55  # standard deviation of their values, 0 to 255
DIFFERENT_PICTURES = 16  # drawn; each is written many times, with captions of its own
WORDS = ("a", "photo", "of", "the", "red", "old", "small", "dog", "house", "river", "woman", "street", "with", "under")


def main() -> None:
    """Write shards, then measure both sides on each size."""
    parser = argparse.ArgumentParser(
        description="The loader, ours divided by open_clip_train's or by ours that decodes"
    )
    parser.add_argument("--against", choices=(OTHER, DECODING), default=OTHER)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), help="width x height of the JPEGs")
    parser.add_argument("--quality", type=int, default=80, help="of the JPEGs")
    parser.add_argument("--num-pictures", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=5, help="times that each side is measured")
    given = parser.parse_args()
    torch.set_num_threads(1)
    print(describe_machine("webdataset", "pillow"), flush=True)
    for size in given.sizes:
        width, height = map(int, size.split("x"))
        with tempfile.TemporaryDirectory() as folder:
            os.environ["XDG_CACHE_HOME"] = folder  # where the index of a shard is kept
            bits = write_shard(Path(folder) / "0.tar", width, height, given)
            timing = measure(Path(folder) / "0.tar", given)
        speeds = [given.num_pictures / min(seconds) for seconds in (timing.ours, timing.theirs)]
        print(
            f"{size}, {bits:.2f} bits a pixel: time {timing}; at best {speeds[0]:.0f} and {speeds[1]:.0f} pictures per "
            f"second and core, {1 / median(timing.ratios):.2f} times as many",
            flush=True,
        )


def median(values: list[float]) -> float:
    """Return the middle value."""
    return float(numpy.median(values))


def write_shard(path: Path, width: int, height: int, given: Namespace) -> float:
    """Write pairs into a shard; return the bits that a pixel takes."""
    draw = random.Random(0)
    pictures = [jpeg(width, height, seed, given.quality) for seed in range(DIFFERENT_PICTURES)]
    with tarfile.open(path, "w") as archive:
        for number in range(given.num_pictures):
            caption = " ".join(draw.choices(WORDS, k=draw.randint(6, 14))) + f" number {number}"
            for extension, content in (("jpg", pictures[number % len(pictures)]), ("txt", caption.encode())):
                member = tarfile.TarInfo(f"{number:06d}.{extension}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return 8 * sum(map(len, pictures)) / len(pictures) / (width * height)


def jpeg(width: int, height: int, seed: int, quality: int) -> bytes:
    """Return a picture with the spectrum and the contrast of a photograph, as a JPEG."""
    generator = numpy.random.default_rng(seed)
    frequency = numpy.hypot(numpy.fft.fftfreq(height)[:, None], numpy.fft.rfftfreq(width)[None])
    frequency[0, 0] = numpy.inf
    noise = generator.normal(size=(2, 3, *frequency.shape))
    channels = numpy.fft.irfft2((noise[0] + 1j * noise[1]) / frequency**SLOPE, (height, width))
    grey = channels.mean(0, keepdims=True)
    values = grey + 0.35 * (channels - grey)  # photographs are greyer than three channels on their own
    pixels = numpy.clip(128 + CONTRAST * values / values.std(), 0, 255).astype(numpy.uint8).transpose(1, 2, 0)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def measure(shard: Path, given: Namespace) -> Timing:
    """Return the processor seconds of both sides, in the order A B, B A, …; a first run of each is not counted."""
    decoding = partial(our_batches, shard, given)
    cached = given.against == DECODING
    ours = partial(decoding, pictures=decoded(shard)) if cached else decoding
    theirs = decoding if cached else partial(their_batches, shard, given)
    for side in (ours, theirs):
        seconds_of(side, given.num_pictures)
    timing = Timing([], [], given.against)
    for number in range(given.pairs):
        order = [(ours, timing.ours), (theirs, timing.theirs)]
        for side, seconds in order if number % 2 == 0 else reversed(order):
            seconds.append(seconds_of(side, given.num_pictures))
    return timing


def seconds_of(side: Callable[[], Iterable[int]], num_pictures: int) -> float:
    """Return the processor seconds of a pass over the shard, those of the worker included, which has ended by then."""
    before = processor_seconds()
    found = sum(side())
    if found != num_pictures:
        raise SystemExit(f"{found} pictures came, and not {num_pictures}: make it a multiple of the batch")
    return processor_seconds() - before


def processor_seconds() -> float:
    """Return the processor seconds of this process and of those that it started and that have ended."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def decoded(shard: Path) -> PictureCache:
    """Return the decoded pictures of a shard."""
    data = DataConfig(train=[str(shard)])
    source = open_source(str(shard), data)
    decode = Preparation(TOKENIZER, (PIXELS, PIXELS), data.max_pixels, seed=0).decoded
    folder = shard.with_name("pictures")
    pictures = DifferentPictures(source, decode)
    list(build(pictures, CachePlan.of_all(pictures), folder, {}, room_gib=100, num_workers=1))
    return PictureCache(folder)


def our_batches(shard: Path, given: Namespace, pictures: PictureCache | None = None) -> Iterable[int]:
    """Yield the sizes of the batches of one epoch."""
    data = DataConfig(train=[str(shard)])
    source = open_source(str(shard), data)
    order = Order(len(source), given.batch_size, seed=0)
    preparation = Preparation(TOKENIZER, (PIXELS, PIXELS), data.max_pixels, order.seed, pictures=pictures)
    pairs = TrainingPairs(source, order, preparation)
    places = BatchPlaces(order, range(order.batches_per_epoch), process=0, num_processes=1)
    for batch in iterate(pairs, places, data, num_workers=1, pin_memory=False):
        yield len(batch.image)


def their_batches(shard: Path, given: Namespace) -> Iterable[int]:
    """Yield the sizes of the batches of one epoch."""
    args = Namespace(
        train_data=str(shard),
        train_num_samples=given.num_pictures,
        train_data_upsampling_factors=None,
        dataset_resampled=False,
        seed=0,
        workers=1,
        world_size=1,
        batch_size=given.batch_size,
    )
    transform = image_transform_v2(PreprocessCfg(size=PIXELS), is_train=True)
    data = get_wds_dataset(args, transform, is_train=True, tokenizer=TOKENIZER)
    for images, _ in data.dataloader:
        yield len(images)


if __name__ == "__main__":
    main()
