"""The evaluation of a run: what is measured, on what, and in which order."""

from __future__ import annotations

from functools import partial
from typing import TypeVar

import numpy
from accelerate import Accelerator
from torch import Tensor

from accel_clip.config import EvalConfig
from accel_clip.console import say
from accel_clip.data.bad_samples import reasons_of
from accel_clip.data.pictures.decode import decode_picture
from accel_clip.data.sources.base import Source
from accel_clip.evaluation.encode import encode_captions, encode_pictures, usable_places
from accel_clip.evaluation.picture_grid import GridRow, retrieval_grid
from accel_clip.evaluation.retrieval import Nearest, names_of_retrieval, nearest_examples, retrieval_metrics
from accel_clip.evaluation.validation import HeldOutPairs, read_held_out, validation_loss
from accel_clip.evaluation.zero_shot import LabelledPictures, accuracy, class_features, read_labelled
from accel_clip.losses.base import Loss
from accel_clip.models.build import ClipModel
from accel_clip.process.waiting import UNWATCHED, Lookout

Pictures = TypeVar("Pictures", HeldOutPairs, LabelledPictures)


class Evaluator:
    """Measures a model on held-out pairs and on labelled pictures; every process must call it, and gets the same.

    held_out, zero_shot: what is None is not measured. Their captions and labels are read once, here.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: ClipModel,
        config: EvalConfig,
        held_out: Source | None,
        zero_shot: Source | None,
        loss: Loss,
        max_pixels: float,
        num_workers: int,
    ) -> None:
        self.accelerator, self.model, self.config, self.loss = accelerator, model, config, loss
        self.max_pixels = max_pixels
        self.encode_pictures = partial(
            encode_pictures,
            accelerator,
            model,
            batch_size=config.batch_size,
            max_pixels=max_pixels,
            num_workers=num_workers,
        )
        self.held_out = None if held_out is None else read_held_out(held_out)
        self.labelled = None if zero_shot is None else read_labelled(zero_shot, config.label_key)
        self.shown = self.held_out
        self.examples: list[Nearest] = []
        self.announced: set[str] = set()
        self.mean_cosines: dict[str, float] = {}

    def metric_names(self) -> set[str]:
        """Return the names of what `run` will return."""
        names = set() if self.held_out is None else {"val/loss", *names_of_retrieval()}
        return names if self.labelled is None else names | {"zero_shot/top1", "zero_shot/top5"}

    def run(self, lookout: Lookout = UNWATCHED) -> dict[str, float]:
        """Return all metrics of the model as it is now; leaves its training mode and the random state as they were.

        Pictures that cannot be used are left out, which is said once. Raises `DataError` when no other is left, or when
        most are missing files, and `StopAsked` when a process is asked to stop.
        """
        validation = {} if self.held_out is None else self.validate(self.held_out, lookout)
        classification = {} if self.labelled is None else self.classify(self.labelled, lookout)
        return validation | classification

    def validate(self, pairs: HeldOutPairs, lookout: Lookout) -> dict[str, float]:
        """Return the validation loss and the retrieval metrics; the examples of the picture grid are kept."""
        accelerator, model, batch_size = self.accelerator, self.model, self.config.batch_size
        images, pairs = self.encode_usable(pairs, lookout)
        texts = encode_captions(accelerator, model, pairs.captions, batch_size, lookout)
        self.shown = pairs
        self.mean_cosines = {"pictures": mean_cosine(images), "captions": mean_cosine(texts)}
        self.examples = nearest_examples(images, texts, pairs.image_of_pair, pairs.text_of_pair)
        loss = validation_loss(accelerator, self.loss, model.clip, images, texts, pairs, batch_size, lookout)
        return {
            "val/loss": loss,
            **retrieval_metrics(accelerator, images, texts, pairs.image_of_pair, pairs.text_of_pair, lookout),
        }

    def classify(self, labelled: LabelledPictures, lookout: Lookout) -> dict[str, float]:
        """Return the zero-shot accuracy."""
        images, labelled = self.encode_usable(labelled, lookout)
        accelerator, config = self.accelerator, self.config
        classes = class_features(
            accelerator, self.model, labelled.classes, config.templates, config.batch_size, lookout
        )
        return accuracy(accelerator, images, classes, labelled.class_of_picture, lookout)

    def encode_usable(self, pictures: Pictures, lookout: Lookout) -> tuple[Tensor, Pictures]:
        """Return the features of the pictures that can be used, and what is left when the others are taken out."""
        images, problems = self.encode_pictures(pictures.source, pictures.indices, lookout=lookout)
        if not problems:
            return images, pictures
        usable = usable_places(pictures.source, len(images), problems)
        name, reasons = pictures.source.name, reasons_of(list(problems.values()))
        if name not in self.announced:
            say(f"evaluation on {name} goes without {len(problems)} of {len(images)} pictures: {reasons}")
        self.announced.add(name)
        return images[usable], pictures.only(usable)

    def picture_grid(self) -> numpy.ndarray | None:
        """Return the nearest pictures of a few captions as found by the last `run`, uint8 [H, W, 3]; None without any.

        No collective: call it where it is shown.
        """
        if self.shown is None or not self.examples:
            return None
        return numpy.asarray(retrieval_grid([self.grid_row(self.shown, example) for example in self.examples]))

    def grid_captions(self) -> list[str]:
        """Return the captions of the picture grid in full, from top to bottom."""
        return [] if self.shown is None else [self.shown.captions[example.text] for example in self.examples]

    def grid_row(self, pairs: HeldOutPairs, example: Nearest) -> GridRow:
        """Return a caption with its nearest pictures, decoded again."""
        stored = [pairs.source[pairs.indices[image]].image for image in example.images]
        pictures = [decode_picture(image, self.max_pixels) for image in stored]
        return GridRow(pairs.captions[example.text], pictures, list(example.own))


def mean_cosine(features: Tensor) -> float:
    """Return the mean cosine between unit-norm features [N, D], each with itself included; near 1 all are alike."""
    return float(features.float().mean(0).square().sum())
