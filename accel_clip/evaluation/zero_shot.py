"""Zero-shot classification: pictures find their class by the class's name alone.

Each class name goes into every prompt template; the class is the normalised mean of the unit-norm prompt features
(Radford et al. 2021, arXiv 2103.00020, section 3.1.4). Equal scores count against the hit.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor

from accel_clip.console import say
from accel_clip.data.bad_samples import UnusableSample, by_reason
from accel_clip.data.sources.base import Source
from accel_clip.data.sources.class_names import are_codes, some_names
from accel_clip.evaluation.encode import encode_captions
from accel_clip.evaluation.retrieval import ranks, recall_at
from accel_clip.faults import ConfigError, DataError
from accel_clip.models.build import ClipModel
from accel_clip.process.waiting import UNWATCHED, Lookout


@dataclass(frozen=True)
class LabelledPictures:
    """Pictures of a source and the class of each."""

    source: Source
    """what the pictures are fetched from"""
    indices: list[int]
    """where in the source each of the N pictures stands"""
    classes: list[str]
    """class names, sorted"""
    class_of_picture: Tensor
    """the number of each picture's class, int64 [N]"""

    def only(self, pictures: list[int]) -> LabelledPictures:
        """Return some of the pictures; all classes stay to be told apart."""
        indices = [self.indices[place] for place in pictures]
        return replace(self, indices=indices, class_of_picture=self.class_of_picture[pictures])


def read_labelled(source: Source, label_key: str | None = None) -> LabelledPictures:
    """Return the labelled pictures of a source that can be fetched, and say how many there are.

    label_key: the setting, which vouches for labels that are no words. Raises `DataError` when there are no labels at
    all, and `ConfigError` when they are numbers or codes that nothing vouches for.
    """
    found: dict[int, str | None] = {}
    left_out: Counter[str] = Counter()
    for index in range(len(source)):
        try:
            found[index] = source[index].label
        except UnusableSample as problem:
            left_out[problem.reason] += 1
    labels = {index: label for index, label in found.items() if label}
    if not labels:
        raise DataError(
            f"eval.zero_shot: {source.name} has no labels: name a folder per class, or set eval.label_key to the "
            "column with the class"
        )
    classes = sorted(set(labels.values()))
    if label_key is None and are_codes(classes):
        raise ConfigError(
            f"eval.label_key: the classes of {source.name} ({some_names(classes)}) are no words, by which a text tower "
            "could find them: name a column with the names of classes, or the one with these if they are meant so"
        )
    number = {name: place for place, name in enumerate(classes)}
    without = len(found) - len(labels)
    unlabelled = f"; {without} without a label left out" if without else ""
    unusable = f"; left out: {by_reason(left_out)}" if left_out else ""
    say(f"zero-shot on {source.name}: {len(labels)} pictures of {len(classes)} classes{unlabelled}{unusable}")
    return LabelledPictures(source, list(labels), classes, torch.tensor([number[label] for label in labels.values()]))


def class_features(
    accelerator: Accelerator,
    model: ClipModel,
    classes: list[str],
    templates: list[str],
    batch_size: int,
    lookout: Lookout = UNWATCHED,
) -> Tensor:
    """Return the features of classes, unit-norm float32 [C, D]; `{}` in a template stands for the class name."""
    prompts = [template.replace("{}", name) for name in classes for template in templates]
    features = encode_captions(accelerator, model, prompts, batch_size, lookout)
    by_class = F.normalize(features, dim=-1).view(len(classes), len(templates), -1)
    return F.normalize(by_class.mean(dim=1), dim=-1)


def accuracy(
    accelerator: Accelerator,
    image_features: Tensor,
    class_features: Tensor,
    class_of_picture: Tensor,
    lookout: Lookout = UNWATCHED,
) -> dict[str, float]:
    """Return `zero_shot/top1` (0 to 1), and `zero_shot/top5` where there are more than five classes."""
    pictures = torch.arange(len(image_features))
    found = ranks(accelerator, image_features, class_features, pictures, class_of_picture, lookout)
    return {name: recall_at(k, found) for name, k in names_of_accuracy(len(class_features)).items()}


def names_of_accuracy(num_classes: int) -> dict[str, int]:
    """Return the names of what `accuracy` gives, and among how many of the first the class must be."""
    return {f"zero_shot/top{k}": k for k in ((1, 5) if num_classes > 5 else (1,))}
