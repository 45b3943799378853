"""The decoded pictures of all training data, decoded once before the first step where they fit the room given to them.

1. Find the different pictures, by hash, and which are on disk already, decoded in the same way from files that are as
   they were; those that could not be used are tried again.
2. If some are not, decode a few of them in the first process, to see whether all will fit.
3. The workers of the first process decode them and it writes all (`pictures.py`), the others from the old cache;
   the other processes wait. Workers are as many as all processes of its machine have, since theirs have nothing to do.
4. All processes map the finished file.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from PIL import __version__ as pillow_version
from torch import Tensor

from accel_clip.checkpoint.storage import available_bytes
from accel_clip.config import GIB, Config
from accel_clip.console import say
from accel_clip.data.bad_samples import UnusableSample
from accel_clip.data.caches.folder import Fingerprint
from accel_clip.data.caches.items import (
    CachePlan,
    DifferentPictures,
    LoadedChunk,
    load_chunks,
    plan_cache,
    say_unusable,
)
from accel_clip.data.caches.pictures import PictureCache, PictureWriter
from accel_clip.data.examples import preparation_for
from accel_clip.data.pictures.augmentation import TRAINING_CROP_RATIO, TRAINING_CROP_SCALE
from accel_clip.data.sources.base import Source
from accel_clip.data.workers import Workers, usable_or_raise
from accel_clip.faults import StorageError
from accel_clip.files.kinds import PICTURES
from accel_clip.files.marked import remove_folder
from accel_clip.models.build import ClipModel
from accel_clip.process.accelerator import num_local_processes
from accel_clip.process.signals import StopAsked
from accel_clip.process.waiting import UNWATCHED, Lookout

NUM_TO_ESTIMATE = 64
PICTURES_AT_ONCE = 16  # what a worker hands over in one piece: a few MB of shared memory
COPIED_AT_ONCE = 64  # from an old cache: some MB
Building = Generator[bool | None, None, None]
"""None after every piece, and at last whether the pictures are on disk"""


@dataclass(frozen=True)
class BuildingJob:
    """Which pictures are decoded and written, and where there is room for how much."""

    pictures: DifferentPictures
    """all of them"""
    plan: CachePlan
    """which are decoded, and which are kept from the cache there is"""
    folder: Path
    """where they are written"""
    fingerprint: Fingerprint
    """what their pixels depend on beside their files"""
    room_gib: float
    """what they may take"""
    workers: Workers
    """who decodes them"""


def open_pictures(
    accelerator: Accelerator,
    source: Source,
    model: ClipModel,
    config: Config,
    folder: Path,
    num_workers: int,
    lookout: Lookout = UNWATCHED,
) -> PictureCache | None:
    """Return the decoded pictures of a source, from disk or decoded now, None where they do not fit; collective.

    Raises `StorageError` where they cannot be written, or read by every process, and `StopAsked`.
    """
    pictures = DifferentPictures(source, preparation_for(model, config).decoded)
    fingerprint = decoding_of(model, config)
    plan = plan_cache(accelerator, PictureCache, folder, fingerprint, pictures, "decoded pictures")
    if len(plan.todo):
        workers = Workers(num_workers * num_local_processes(), is_asked=lookout.is_asked)
        job = BuildingJob(pictures, plan, folder, fingerprint, config.data.image_cache_gib, workers)
        if not wait_for(accelerator, build(job), lookout):
            return None
    try:
        return PictureCache(folder)
    except (OSError, ValueError) as error:
        raise StorageError(
            f"{folder}: {error}: every machine of the run must see output_dir, or set data.image_cache_gib to 0"
        ) from error


def decoding_of(model: ClipModel, config: Config) -> Fingerprint:
    """Return what the pixels of a picture depend on beside its file."""
    return {
        "augmentation": config.data.augmentation,
        "preprocessing": json.dumps(model.preprocess_config, sort_keys=True, default=str),
        "crop": json.dumps([TRAINING_CROP_SCALE, TRAINING_CROP_RATIO]),
        "max_pixels": config.data.max_pixels,
        "pillow": pillow_version,
    }


def wait_for(accelerator: Accelerator, building: Building, lookout: Lookout) -> bool:
    """Let the first process build, and return in all whether it did; they meet after every piece, so none gives up.

    Raises `StopAsked` on all.
    """
    is_built = None
    with closing(building):
        while is_built is None:
            with suppress(StopAsked):  # the others learn of it where they meet
                is_built = next(building) if accelerator.is_main_process else None
            [is_built] = broadcast_object_list([is_built])
            lookout.meet(accelerator, "decoding pictures")
    return is_built


def build(job: BuildingJob) -> Building:
    """Decode what is planned and write all, if there is room: yield None after every piece, and at last whether it is.

    Raises `StorageError` where the disk has less room than they need, and `StopAsked`.
    """
    old = PictureCache(job.folder) if len(job.plan.kept) else None
    if old is None:
        remove_old(job.folder)
    expected = yield from expected_picture_bytes(job.pictures, job.plan.todo)
    expected += 0 if old is None else old.bytes_of(job.plan.rows)
    if expected > job.room_gib * GIB:
        give_up(job, f"would take about {in_gib(expected)}, more")
        yield False
        return
    require_space(job.folder, expected)
    yield from write_all(job, old)


def remove_old(folder: Path) -> None:
    """Remove decoded pictures that cannot be used, since they would take room too; raises `StorageError`."""
    try:
        remove_folder(folder, PICTURES)
    except OSError as error:
        raise StorageError(f"{folder}: {error}") from error


def give_up(job: BuildingJob, finding: str) -> None:
    """Let the pictures be decoded in every epoch, and say why."""
    remove_old(job.folder)
    say(f"the decoded pictures {finding} than data.image_cache_gib = {job.room_gib:g}: they are decoded in every epoch")


def write_all(job: BuildingJob, old: PictureCache | None) -> Building:
    """Write all pictures until they take too much room; yields what `build` does."""
    pictures, plan = job.pictures, job.plan
    problems: dict[int, UnusableSample] = {}
    with PictureWriter(job.folder) as writer:
        for values, shapes in joined_chunks(job, old, problems):
            writer.append(values, shapes)
            if writer.num_bytes > job.room_gib * GIB:
                break
            yield None
        else:
            if old is None or not plan.is_needless(old.unusable, problems):
                places = plan.in_order(writer.array_of_places())
                writer.finish(pictures.keys, job.fingerprint, problems, stamps=pictures.stamps, places=places)
    if writer.num_bytes > job.room_gib * GIB:
        give_up(job, "take more")
        yield False
        return
    say(f"pictures: {len(plan.todo) - len(problems):,} decoded once, {in_gib(writer.num_bytes)} in {job.folder}")
    say_unusable(len(problems), len(pictures))
    yield True


def joined_chunks(
    job: BuildingJob, old: PictureCache | None, problems: dict[int, UnusableSample]
) -> Iterator[tuple[Tensor, list[tuple[int, ...]]]]:
    """Yield the values and the shapes of pictures: those that are decoded, then those of the old cache.

    problems: takes in what cannot be used, by key.
    """
    pictures, plan = job.pictures, job.plan
    chunks = plan.chunks(PICTURES_AT_ONCE)
    for chunk, loaded in zip(chunks, load_chunks(pictures, chunks, job.workers, joined_pixels), strict=True):
        problems.update({int(pictures.keys[chunk[row]]): each for row, each in loaded.problems.items()})
        yield in_places(loaded, len(chunk))
    if old is None or plan.is_needless(old.unusable, problems):
        return
    for start in range(0, len(plan.rows), COPIED_AT_ONCE):
        yield joined_pixels([old.picture(row) for row in plan.rows[start : start + COPIED_AT_ONCE]])


def in_places(loaded: LoadedChunk, num_pictures: int) -> tuple[Tensor, list[tuple[int, ...]]]:
    """Return the values of a chunk's pictures, and the shape of each, zeros for an unusable one."""
    values, shapes = loaded.inputs or (torch.empty(0, dtype=torch.uint8), [])
    by_row = dict(zip(loaded.usable, shapes, strict=True))
    return values, [by_row.get(row, (0, 0, 0)) for row in range(num_pictures)]


def joined_pixels(pictures: list[Tensor]) -> tuple[Tensor, list[tuple[int, ...]]]:
    """Return the values of pictures one after the other, which take one piece of shared memory, and their shapes."""
    return torch.cat([each.reshape(-1) for each in pictures]), [tuple(each.shape) for each in pictures]


def expected_picture_bytes(pictures: DifferentPictures, items: numpy.ndarray) -> Generator[None, None, int]:
    """Return about how many bytes some pictures, int64 [m] of one or more, take: from a sample spread over them.

    Yields after each picture of it.
    """
    sample = items[numpy.linspace(0, len(items) - 1, min(NUM_TO_ESTIMATE, len(items))).astype(int)]
    num_bytes = 0
    for item in sample:
        loaded = usable_or_raise(pictures[int(item)])
        num_bytes += loaded.nbytes if isinstance(loaded, Tensor) else 0
        yield
    return num_bytes * len(items) // len(sample)


def require_space(folder: Path, needed: int) -> None:
    """Raise `StorageError` unless so many bytes are free where the pictures will be."""
    available = available_bytes(folder)
    if available < needed:
        raise StorageError(
            f"disk full: the decoded pictures need about {needed} bytes and {available} are available at {folder}: "
            "free some space, lower data.image_cache_gib, or choose another output_dir"
        )


def in_gib(num_bytes: float) -> str:
    """Return a size in words."""
    gib = num_bytes / GIB
    return f"{gib:.2f} GiB" if 0.01 <= gib < 10 else f"{gib:.3g} GiB"
