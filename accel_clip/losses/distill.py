"""Distillation: the student chooses among the captions and the pictures of a batch as its teachers do.

Symbols: B pairs, K teachers; S the student's logits, T_k those of teacher k from its own features at its own scale.

1. Each teacher's features of the batch come as columns: a model makes them without gradient, or they lie in the data.
2. P = 1/K Σ_k softmax of the rows of T_k (captions of a picture), Q the same of its columns (pictures of a caption).
3. distill_loss = −weight / 2B Σ_ij (P_ij log softmax_row(S)_ij + Q_ij log softmax_column(S)_ij).

Cross-entropy is linear in its target, so this is the mean over teachers of open_clip's `DistillClipLoss`; it differs
from the divergence of Vasu et al. 2023 (MobileCLIP, arXiv 2311.17049, section 4.1) by the teachers' entropy, which no
weight changes. Every process holds about ten matrices of B² numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from accel_clip.config import ABOVE_ZERO, ModelConfig, require
from accel_clip.faults import ConfigError, nearest
from accel_clip.losses.base import LOSSES
from accel_clip.process.transfer import to_device
from accel_clip.typed import is_number

if TYPE_CHECKING:
    from accelerate import Accelerator

    from accel_clip.data.batch import Batch
    from accel_clip.models.build import ClipModel
    from accel_clip.models.teacher import Teacher

STORED_SCALE = 100.0  # where training stops nearly every CLIP model's logit scale
TEACHER_KEYS = ("name", "pretrained", "options")


@LOSSES.register("distill", "DistillLoss", "DistillClipLoss")
class DistillLoss:
    """CLIP's loss, and the cross-entropy between the choices of teachers and of the student (arXiv 2311.17049).

    teachers: models that run beside the student, each {name, pretrained, options} as in the `model` section;
    image_columns, text_columns: columns of the data with the features of further teachers, one of each a teacher: of
    whole pictures, and of the pair's one caption; teacher_scales: the logit scale (after exp) of every teacher, models
    first, where null is the model's own or 100 for columns; weight: factor of the distillation term.
    """

    def __init__(
        self,
        teachers: Sequence[dict[str, Any]] | dict[str, Any] = (),
        image_columns: Sequence[str] | str = (),
        text_columns: Sequence[str] | str = (),
        teacher_scales: Sequence[float | None] | float | None = None,
        weight: float = 1.0,
    ) -> None:
        self.configs = [teacher_config(each) for each in one_or_more(teachers, dict)]
        images, texts = one_or_more(image_columns, str), one_or_more(text_columns, str)
        rule = f"it needs one column for each of image_columns, {images}"
        require(len(images) == len(texts), "loss.options.text_columns", texts, rule)
        self.stored = list(zip(images, texts, strict=True))
        number = len(self.configs) + len(self.stored)
        way = "name one as teachers: [{name: …, pretrained: …}], or image_columns and text_columns of the data"
        require(number > 0, "loss.options.teachers", teachers, way)
        self.scales = one_or_more(teacher_scales, (int, float)) or [None] * number
        rule = f"it needs {number} numbers {ABOVE_ZERO.words}, or null, one for each teacher, models first"
        right = len(self.scales) == number and all(each is None or is_positive(each) for each in self.scales)
        require(right, "loss.options.teacher_scales", teacher_scales, rule)
        require(is_positive(weight), "loss.options.weight", weight, f"it must be {ABOVE_ZERO.words}")
        self.weight = weight
        self.running: list[Teacher] = []
        self.widths: list[int] = []

    def data_columns(self) -> tuple[str, ...]:
        """Return the columns of numbers that the data must have."""
        return tuple(dict.fromkeys(name for names in self.stored for name in names))

    def prepare(self, model: ClipModel, accelerator: Accelerator) -> None:
        """Build the teachers that are models; raises `ConfigError` for one that cannot read the student's tokens."""
        from accel_clip.models.teacher import build_teacher  # imports open_clip

        self.running = [build_teacher(config, model.tokenizer, accelerator) for config in self.configs]

    def columns(self, batch: Batch, device: torch.device) -> dict[str, Tensor]:
        """Return the features of this process's pairs, those of all teachers side by side, [b, ΣD] a column."""
        assert len(self.running) == len(self.configs), "prepare comes before training"
        running = [
            (each.image_features(batch.image, device), each.text_features(batch.tokens, device))
            for each in self.running
        ]
        stored = [tuple(to_device(batch.extra[name], device) for name in names) for names in self.stored]
        for (image, text), features in zip(self.stored, stored, strict=True):
            widths = [each.shape[1] for each in features]
            rule = f"'{image}' has {widths[0]} numbers and '{text}' {widths[1]}: name columns of one teacher"
            require(widths[0] == widths[1], "loss.options.text_columns", text, rule)
        images, texts = zip(*running, *stored, strict=True)
        self.widths = [each.shape[1] for each in images]
        return {"teacher_image_features": torch.cat(images, 1), "teacher_text_features": torch.cat(texts, 1)}

    def __call__(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        teacher_image_features: Tensor | None = None,
        teacher_text_features: Tensor | None = None,
        output_dict: bool = True,
    ) -> dict[str, Tensor]:
        """Return the loss of a batch that is whole: unit-norm features [B, D], logit_scale after exp.

        teacher_image_features, teacher_text_features: what `columns` gave for all pairs, [B, ΣD]; without them, as in
        validation, the contrastive term stands alone.
        """
        logits = logit_scale * image_features @ text_features.T
        caption_logs, picture_logs = logits.log_softmax(1), logits.log_softmax(0)
        contrastive = -(caption_logs.diagonal() + picture_logs.diagonal()).mean() / 2
        if teacher_image_features is None or teacher_text_features is None:
            return {"contrastive_loss": contrastive}
        captions, pictures = self.choices(teacher_image_features, teacher_text_features)
        agreement = (captions.to(logits) * caption_logs).sum() + (pictures.to(logits) * picture_logs).sum()
        return {"contrastive_loss": contrastive, "distill_loss": -self.weight * agreement / (2 * len(logits))}

    @torch.no_grad()
    def choices(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean of all teachers' P and Q, [B, B] each: probabilities of captions and of pictures."""
        captions, pictures = images.new_zeros(len(images), len(texts)), images.new_zeros(len(images), len(texts))
        sides = zip(images.split(self.widths, 1), texts.split(self.widths, 1), self.teacher_scales(), strict=True)
        for image, text, scale in sides:
            logits = scale * functional.normalize(image, dim=-1) @ functional.normalize(text, dim=-1).T
            captions += logits.softmax(1) / len(self.widths)
            pictures += logits.softmax(0) / len(self.widths)
        return captions, pictures

    def teacher_scales(self) -> list[float]:
        """Return the logit scale of every teacher, models first."""
        own = [*(teacher.logit_scale for teacher in self.running), *(STORED_SCALE for _ in self.stored)]
        return [given if asked is None else asked for asked, given in zip(self.scales, own, strict=True)]


def one_or_more(value: Any, kind: type | tuple[type, ...]) -> list[Any]:
    """Return the items of an option that takes a list or one bare value."""
    if value is None:
        return []
    return [value] if isinstance(value, kind) else list(value)


def is_positive(value: Any) -> bool:
    """Return whether an option is a number above zero, and not beyond all sense."""
    return is_number(value) and ABOVE_ZERO.holds(value)


def teacher_config(teacher: dict[str, Any]) -> ModelConfig:
    """Return the settings of a teacher that is a model; raises `ConfigError` for other keys."""
    setting = "loss.options.teachers"
    require(isinstance(teacher, dict), setting, teacher, "a teacher is written {name: …, pretrained: …}")
    keys = ", ".join(TEACHER_KEYS)
    for key in teacher:
        if key not in TEACHER_KEYS:
            raise ConfigError(f"{setting}: unknown key '{key}'{nearest(key, TEACHER_KEYS) or ';'} a teacher has {keys}")
    require(isinstance(teacher.get("name"), str), setting, teacher, "it needs a name, as model.name takes it")
    return ModelConfig(**teacher)
