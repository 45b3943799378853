"""The evaluation of a run: what is measured, on what, and in which order."""

from __future__ import annotations

from functools import partial

import numpy
from accelerate import Accelerator

from accel_clip.config import EvalConfig
from accel_clip.data.decode import decode_picture
from accel_clip.data.sources.base import Source
from accel_clip.evaluation.encode import encode_captions, encode_pictures
from accel_clip.evaluation.examples import GridRow, retrieval_grid
from accel_clip.evaluation.retrieval import Nearest, names_of_retrieval, nearest_examples, retrieval_metrics
from accel_clip.evaluation.validation import HeldOutPairs, read_held_out, validation_loss
from accel_clip.evaluation.zero_shot import LabelledPictures, accuracy, class_features, read_labelled
from accel_clip.losses.base import Loss
from accel_clip.models.build import ClipModel


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
        self.labelled = None if zero_shot is None else read_labelled(zero_shot)
        self.examples: list[Nearest] = []

    def metric_names(self) -> set[str]:
        """Return the names of what `run` will return."""
        names = set() if self.held_out is None else {"val/loss", *names_of_retrieval()}
        return names if self.labelled is None else names | {"zero_shot/top1", "zero_shot/top5"}

    def run(self) -> dict[str, float]:
        """Return all metrics of the model as it is now; leaves its training mode and the random state as they were.

        Raises `DataError` for a picture that cannot be used.
        """
        validation = {} if self.held_out is None else self.validate(self.held_out)
        classification = {} if self.labelled is None else self.classify(self.labelled)
        return validation | classification

    def validate(self, pairs: HeldOutPairs) -> dict[str, float]:
        """Return the validation loss and the retrieval metrics; the examples of the picture grid are kept."""
        accelerator, model, batch_size = self.accelerator, self.model, self.config.batch_size
        images = self.encode_pictures(pairs.source, pairs.indices)
        texts = encode_captions(accelerator, model, pairs.captions, batch_size)
        self.examples = nearest_examples(images, texts, pairs.image_of_pair, pairs.text_of_pair)
        loss = validation_loss(accelerator, self.loss, model.clip, images, texts, pairs, batch_size)
        return {
            "val/loss": loss,
            **retrieval_metrics(accelerator, images, texts, pairs.image_of_pair, pairs.text_of_pair),
        }

    def classify(self, labelled: LabelledPictures) -> dict[str, float]:
        """Return the zero-shot accuracy."""
        images = self.encode_pictures(labelled.source, labelled.indices)
        config = self.config
        classes = class_features(self.accelerator, self.model, labelled.classes, config.templates, config.batch_size)
        return accuracy(self.accelerator, images, classes, labelled.class_of_picture)

    def picture_grid(self) -> numpy.ndarray | None:
        """Return the nearest pictures of a few captions as found by the last `run`, uint8 [H, W, 3]; None without any.

        No collective: call it where it is shown.
        """
        if self.held_out is None or not self.examples:
            return None
        return numpy.asarray(retrieval_grid([self.grid_row(self.held_out, example) for example in self.examples]))

    def grid_captions(self) -> list[str]:
        """Return the captions of the picture grid in full, from top to bottom."""
        return [] if self.held_out is None else [self.held_out.captions[example.text] for example in self.examples]

    def grid_row(self, pairs: HeldOutPairs, example: Nearest) -> GridRow:
        """Return a caption with its nearest pictures, decoded again."""
        stored = [pairs.source[pairs.indices[image]].image for image in example.images]
        pictures = [decode_picture(image, self.max_pixels) for image in stored]
        return GridRow(pairs.captions[example.text], pictures, list(example.own))
