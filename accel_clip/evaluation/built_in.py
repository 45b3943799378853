"""The evaluators that come with the package: retrieval with the validation loss, and zero-shot classification."""

from __future__ import annotations

from accel_clip.config import EvalConfig
from accel_clip.data.sources.base import Source
from accel_clip.evaluation.base import EVALUATORS
from accel_clip.evaluation.encoders import Encoders
from accel_clip.evaluation.examples import RetrievalExamples, mean_cosine
from accel_clip.evaluation.retrieval import names_of_retrieval, nearest_examples, retrieval_metrics
from accel_clip.evaluation.validation import read_held_out, validation_loss
from accel_clip.evaluation.zero_shot import accuracy, class_features, names_of_accuracy, read_labelled
from accel_clip.losses.base import Loss


@EVALUATORS.register("retrieval")
class Retrieval:
    """Retrieval both ways and the validation loss, on the held-out pairs."""

    def __init__(self, held_out: Source, loss: Loss) -> None:
        self.loss, self.pairs = loss, read_held_out(held_out)
        self.examples: RetrievalExamples | None = None

    def metric_names(self) -> set[str]:
        """Return the names of the loss and of both directions."""
        return {"val/loss", *names_of_retrieval()}

    def evaluate(self, encoders: Encoders) -> dict[str, float]:
        """Return the validation loss and the retrieval metrics; the examples are kept."""
        accelerator, clip, lookout = encoders.accelerator, encoders.model.clip, encoders.lookout
        images, pairs = encoders.usable(self.pairs)
        texts = encoders.captions(pairs.captions)
        together = pairs.image_of_pair, pairs.text_of_pair
        cosines = {"pictures": mean_cosine(images), "captions": mean_cosine(texts)}
        nearest = nearest_examples(images, texts, *together)
        self.examples = RetrievalExamples(pairs, nearest, cosines, encoders.max_pixels)
        loss = validation_loss(accelerator, self.loss, clip, images, texts, pairs, encoders.batch_size, lookout)
        return {"val/loss": loss, **retrieval_metrics(accelerator, images, texts, *together, lookout)}


@EVALUATORS.register("zero_shot")
class ZeroShot:
    """Zero-shot classification of the labelled pictures, by the names of their classes."""

    def __init__(self, zero_shot: Source, eval_config: EvalConfig) -> None:
        self.labelled = read_labelled(zero_shot, eval_config.label_key)
        self.templates = eval_config.templates

    def metric_names(self) -> set[str]:
        """Return the names of the accuracies."""
        return set(names_of_accuracy(len(self.labelled.classes)))

    def evaluate(self, encoders: Encoders) -> dict[str, float]:
        """Return the zero-shot accuracy."""
        accelerator, lookout = encoders.accelerator, encoders.lookout
        images, labelled = encoders.usable(self.labelled)
        classes = class_features(
            accelerator, encoders.model, labelled.classes, self.templates, encoders.batch_size, lookout
        )
        return accuracy(accelerator, images, classes, labelled.class_of_picture, lookout)
