"""Every different picture or caption of a source, loaded once: by worker processes, in chunks, behind a progress bar.

What cannot be used is handed on as the error that says why, for `cache_folder.py` to keep beside the data.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from PIL.Image import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from accel_clip.console import is_first_process, say
from accel_clip.data.bad_samples import UnusableSample
from accel_clip.data.cache_folder import CacheFolder, Fingerprint
from accel_clip.data.captions import hash_of
from accel_clip.data.loader import usable_or_raise, worker_settings
from accel_clip.data.sources.base import Pair, Source
from accel_clip.faults import DataError

NUM_AHEAD = 2  # chunks that each worker has ready
Loaded = Tensor | UnusableSample | DataError
Join = Callable[[list[Tensor]], Any]
"""From the items of a chunk to what is handed on of them."""


class Items(Dataset[Loaded]):
    """The different pictures or captions of a source.

    keys: int64 [n], ascending; what cannot be used is returned as the error: raised in a worker it would lose its type.
    """

    keys: numpy.ndarray

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, item: int) -> Loaded:
        try:
            return self.load(item)
        except (UnusableSample, DataError) as error:
            return error

    def load(self, item: int) -> Tensor:
        """Return an item as it is needed; raises `UnusableSample` and `DataError`."""
        raise NotImplementedError


class DifferentPictures(Items):
    """The pictures of a source, decoded; those with one key once."""

    def __init__(self, source: Source, decode: Callable[[Image | bytes | Path], Tensor]) -> None:
        self.source, self.decode = source, decode
        hashes = (hash_of("picture", source.key(sample)) for sample in range(len(source)))
        self.key_of_sample = numpy.fromiter(hashes, numpy.int64, len(source))
        self.keys, self.first_sample = numpy.unique(self.key_of_sample, return_index=True)

    def load(self, item: int) -> Tensor:
        """Return the pixels of a picture."""
        return self.decode(self.fetch(item).image)

    def fetch(self, item: int) -> Pair:
        """Return the first pair with a picture; another where that one has a fault of its own, in its caption."""
        try:
            return self.source[int(self.first_sample[item])]
        except UnusableSample:
            for sample in numpy.flatnonzero(self.key_of_sample == self.keys[item])[1:]:
                with suppress(UnusableSample):
                    return self.source[int(sample)]
            raise


@dataclass(frozen=True)
class LoadedChunk:
    """A chunk of items: the usable ones joined, where they stand in it, and what is wrong with the others."""

    inputs: Any
    usable: list[int]
    problems: dict[int, UnusableSample] = field(default_factory=dict)


def load(items: Items, chunks: Sequence[range], num_workers: int, join: Join) -> Iterator[LoadedChunk]:
    """Yield chunks of items behind a progress bar on the first process; raises what a worker could not get over."""
    loader = DataLoader(
        items,
        batch_sampler=[list(chunk) for chunk in chunks],
        collate_fn=partial(collate, join),
        **worker_settings(num_workers, NUM_AHEAD),
    )
    interval = 0.2 if sys.stderr.isatty() else 5.0  # seconds; in a log file every redraw is a line
    for chunk in tqdm(loader, unit="chunk", leave=False, disable=not is_first_process(), mininterval=interval):
        yield usable_or_raise(chunk)


def collate(join: Join, loaded: list[Loaded]) -> LoadedChunk | DataError:
    """Return items as one chunk, or the first error that ends the run."""
    for each in loaded:
        if isinstance(each, DataError):
            return each
    usable = {row: each for row, each in enumerate(loaded) if isinstance(each, Tensor)}
    problems = {row: each for row, each in enumerate(loaded) if isinstance(each, UnusableSample)}
    return LoadedChunk(join(list(usable.values())) if usable else None, list(usable), problems)


def fingerprint_of(source: Source, items: Items) -> Fingerprint:
    """Return what tells the items from those of another source."""
    keys = hashlib.blake2b(items.keys.tobytes(), digest_size=16)
    return {"source": source.name, "length": len(source), "keys": keys.hexdigest()}


def must_build(
    accelerator: Accelerator, kind: type[CacheFolder], folder: Path, fingerprint: Fingerprint, what: str
) -> bool:
    """Return whether the data is not on disk, and say why: the first process looks for all."""
    changed = kind.what_changed(folder, fingerprint) if accelerator.is_main_process else None
    [changed] = broadcast_object_list([changed])
    if changed:
        say(f"the {what} in {folder} were computed with other {', '.join(changed)}: they are replaced")
    elif changed is not None:
        say(f"the {what} in {folder} are used again")
    return changed != []


def say_unusable(num_problems: int, num_items: int) -> None:
    """Say how many items cannot be used, if any."""
    if num_problems:
        say(f"{num_problems:,} of {num_items:,} are unusable; the run says so where it meets them")
