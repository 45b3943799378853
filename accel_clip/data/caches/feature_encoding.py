"""The features of a frozen tower for all training data, encoded once by all processes together.

1. Find the different pictures or captions, by hash, and of which the features are on disk already, and no file has
   changed since; those that could not be used are tried again.
2. Cut the others into chunks and deal them to the processes (`process/rounds.py`).
3. In each round every process encodes a chunk as the training step does and fills it up with zeros; the rows of all
   are gathered, and the first process writes them, and those that are known (`features.py`).
4. All processes map the finished files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy
import torch
from accelerate.utils import gather_object
from PIL.Image import Image
from torch import Tensor

from accel_clip.console import say
from accel_clip.data.bad_samples import UnusableSample
from accel_clip.data.caches.features import FeatureCache, FeatureWriter
from accel_clip.data.caches.folder import Fingerprint
from accel_clip.data.caches.items import CachePlan, DifferentPictures, Items, load_chunks, plan_cache, say_unusable
from accel_clip.data.captions import identity_hash
from accel_clip.data.pictures.augmentation import evaluation_pixels
from accel_clip.data.pictures.decode import decode_picture
from accel_clip.data.sources.base import Source
from accel_clip.data.workers import Workers
from accel_clip.faults import DataError, StorageError
from accel_clip.models.frozen_tower import FrozenTower
from accel_clip.process.rounds import in_rounds, own_chunks
from accel_clip.process.waiting import UNWATCHED, Lookout, unheard

MOST_ROWS = 256  # that one worker loads for a forward pass: a larger one is no faster
NOUNS = {"image": "pictures", "text": "captions"}


class DifferentCaptions(Items):
    """The captions of a source: tokens, int [L] each, equal captions once; all pairs are read to find them."""

    def __init__(
        self, source: Source, tokenizer: Callable[[list[str]], Tensor], beat: Callable[[str], object] = unheard
    ) -> None:
        self.source, self.tokenizer = source, tokenizer
        found = numpy.array(list(hashed_captions(source, beat)), numpy.int64).reshape(-1, 3)
        self.keys, first = numpy.unique(found[:, 0], return_index=True)
        self.places = found[first, 1:]

    def load(self, item: int) -> Tensor:
        """Return the tokens of a caption."""
        sample, number = self.places[item]
        return self.tokenizer([self.source[int(sample)].captions[number]])[0]


def hashed_captions(source: Source, beat: Callable[[str], object]) -> Iterator[tuple[int, int, int]]:
    """Yield every caption's hash, its sample, and which of the sample's captions it is."""
    for sample in range(len(source)):
        beat("reading captions")
        with suppress(UnusableSample):  # the loader will meet it again, and says so then
            for number, caption in enumerate(source[sample].captions):
                yield identity_hash("caption", caption), sample, number


def decoded(pixels: Callable[[Image], Tensor], max_pixels: float, image: Image | bytes | Path) -> Tensor:
    """Return a stored picture as its tower takes it, uint8 [3, H, W]."""
    return pixels(decode_picture(image, max_pixels))


def open_features(
    tower: FrozenTower,
    source: Source,
    max_pixels: float,
    folder: Path,
    num_workers: int,
    lookout: Lookout = UNWATCHED,
) -> FeatureCache:
    """Return the features of a frozen tower for all pairs of a source, from disk or encoded now; collective.

    Raises `StorageError` where they cannot be written, or read by every process, and `StopAsked`.
    """
    items: Items
    if tower.side == "image":
        items = DifferentPictures(
            source, partial(decoded, evaluation_pixels(tower.model.preprocess_config), max_pixels)
        )
    else:
        items = DifferentCaptions(source, tower.model.tokenizer, lookout.beat)
    if not len(items):
        raise DataError(f"data.train: {source.name} holds no usable {NOUNS[tower.side]}")
    fingerprint: Fingerprint = {**tower.fingerprint(), "max_pixels": max_pixels}
    plan = plan_cache(tower.accelerator, FeatureCache, folder, fingerprint, items, "features")
    if len(plan.todo):
        say(f"encoding {len(plan.todo):,} different {NOUNS[tower.side]} once; their features are kept in {folder}")
        encode_all(tower, items, plan, folder, fingerprint, num_workers, lookout)
    try:
        return FeatureCache(folder)
    except (OSError, ValueError) as error:
        raise StorageError(
            f"{folder}: {error}: every machine of the run must see output_dir, or leave train.cache_features away"
        ) from error


def encode_all(
    tower: FrozenTower,
    items: Items,
    plan: CachePlan,
    folder: Path,
    fingerprint: Fingerprint,
    num_workers: int,
    lookout: Lookout,
) -> None:
    """Encode what is planned, each process its share, and write all features; raises `StopAsked` on all processes."""
    accelerator, num_rows = tower.accelerator, min(tower.rows, MOST_ROWS)
    width = tower.model.model_config["embed_dim"]
    writer = FeatureWriter(folder, len(items), width) if accelerator.is_main_process else None
    own_problems: list[tuple[int, UnusableSample]] = []
    chunks = [plan.todo[each.start : each.stop].tolist() for each in own_chunks(accelerator, len(plan.todo), num_rows)]
    tower.parallel.model.train()  # as in the step, which leaves a frozen tower in evaluation mode
    loaded = load_chunks(items, chunks, Workers(num_workers, is_asked=lookout.is_asked), torch.stack)
    rounds = in_rounds(accelerator, zip(chunks, loaded, strict=True), len(plan.todo), num_rows, lookout, "encoding")
    for items_of_round, own in rounds:
        rows = torch.zeros(num_rows, width, device=accelerator.device)
        if own is not None:
            own_items, chunk = own
            if chunk.inputs is not None:
                rows[chunk.usable] = tower.encode(chunk.inputs)
            own_problems += [(int(items.keys[own_items[row]]), each) for row, each in chunk.problems.items()]
        gathered = accelerator.gather(rows)
        if writer is not None:
            writer.append(gathered[: len(items_of_round)])
    problems = dict(gather_object(own_problems))
    if writer is not None:
        write_features(writer, items, plan, fingerprint, problems)
    say_unusable(len(problems), len(items))
    accelerator.wait_for_everyone()


def write_features(
    writer: FeatureWriter,
    items: Items,
    plan: CachePlan,
    fingerprint: Fingerprint,
    problems: dict[int, UnusableSample],
) -> None:
    """Write the features that are kept behind those that were encoded, unless nothing came of these."""
    with writer:
        old = FeatureCache(writer.folder) if len(plan.kept) else None
        if old is not None:
            if plan.is_needless(old.unusable, problems):
                return
            writer.append_from(old, plan.rows)
        places = plan.in_order(numpy.arange(len(items)))
        writer.finish(items.keys, fingerprint, problems, stamps=items.stamps, places=places)
