"""What evaluators measure a model by: the features of any pictures and captions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from accel_clip.console import say
from accel_clip.data.bad_samples import reasons_of
from accel_clip.data.sources.base import Pair
from accel_clip.evaluation.encode import encode_captions, encode_pictures, usable_places
from accel_clip.evaluation.validation import HeldOutPairs
from accel_clip.evaluation.zero_shot import LabelledPictures
from accel_clip.faults import DataError
from accel_clip.models.build import ClipModel
from accel_clip.process.waiting import UNWATCHED, Lookout

StoredPicture = Image.Image | bytes | Path | str
Pictures = TypeVar("Pictures", HeldOutPairs, LabelledPictures)


@dataclass(frozen=True)
class Encoders:
    """The two towers of a model as evaluators use them; all processes encode together, and all get the same.

    Every process calls the methods alike: with the same pictures and captions, in the same order.
    """

    accelerator: Accelerator
    """device, precision and processes"""
    model: ClipModel
    """the one that is measured"""
    batch_size: int
    """pictures or captions encoded at once, on one process"""
    max_pixels: float
    """largest picture that is decoded, in pixels"""
    num_workers: int
    """loader processes per process"""
    lookout: Lookout = UNWATCHED
    """whom the rounds of encoding are told"""
    asked_by: str = ""
    """name of the evaluator that measures"""
    announced: set[str] = field(default_factory=set)
    """sources whose unusable pictures were told already"""

    def captions(self, captions: Sequence[str]) -> Tensor:
        """Return the features of captions, unit-norm float32 [M, D] on the CPU; raises `StopAsked`."""
        return encode_captions(self.accelerator, self.model, captions, self.batch_size, self.lookout)

    def pictures(self, pictures: Sequence[StoredPicture]) -> Tensor:
        """Return the features of pictures, unit-norm float32 [N, D] on the CPU.

        Each is a PIL picture, the bytes of a file or a path; they are decoded in worker processes, where a lazy
        sequence is asked for its items, and go through open_clip's evaluation transform. Raises `DataError` naming the
        first that cannot be used, and `StopAsked`.
        """
        listed = ListedPictures(pictures, f"the pictures of the evaluator '{self.asked_by}'")
        features, problems = encode_pictures(
            self.accelerator,
            self.model,
            listed,
            range(len(pictures)),
            self.batch_size,
            self.max_pixels,
            self.num_workers,
            self.lookout,
        )
        for place, problem in problems.items():
            raise DataError(f"picture {place} of {len(pictures)} cannot be used: {problem.reason}: {problem.detail}")
        return features

    def usable(self, pictures: Pictures) -> tuple[Tensor, Pictures]:
        """Return the features of the pictures that can be used, and what is left when the others are taken out.

        What is left out is said once a source. Raises `DataError` when no other is left, or when most are missing
        files, and `StopAsked`.
        """
        source, num_pictures = pictures.source, len(pictures.indices)
        images, problems = encode_pictures(
            self.accelerator,
            self.model,
            source,
            pictures.indices,
            self.batch_size,
            self.max_pixels,
            self.num_workers,
            self.lookout,
        )
        if not problems:
            return images, pictures
        usable = usable_places(source, num_pictures, problems)
        if source.name not in self.announced:
            reasons = reasons_of(list(problems.values()))
            say(f"evaluation on {source.name} goes without {len(problems)} of {num_pictures} pictures: {reasons}")
        self.announced.add(source.name)
        return images[usable], pictures.only(usable)


class ListedPictures:
    """Pictures in a list as a source of pairs without captions."""

    def __init__(self, pictures: Sequence[StoredPicture], name: str) -> None:
        self.pictures, self.name = pictures, name

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> Pair:
        picture = self.pictures[index]
        return Pair(Path(picture) if isinstance(picture, str) else picture, ())

    def key(self, index: int) -> str:
        """Return what a picture is called."""
        picture = self.pictures[index]
        return str(picture) if isinstance(picture, (str, Path)) else f"picture {index}"
