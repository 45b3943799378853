"""The held-out pairs: which pictures and captions there are, what belongs together, and the loss on them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from accel_clip.console import say
from accel_clip.data.bad_samples import UnusableSample, by_reason
from accel_clip.data.captions import require_caption_size
from accel_clip.data.held_out import FEW_PAIRS, few_in_words
from accel_clip.data.sources.base import Source
from accel_clip.faults import DataError
from accel_clip.losses.base import Loss, total
from accel_clip.losses.precision import ieee_float32
from accel_clip.process.waiting import UNWATCHED, Lookout
from accel_clip.randomness import derive_seed


@dataclass(frozen=True)
class HeldOutPairs:
    """The pairs of a held-out source, its N pictures and M captions counted once."""

    source: Source
    """what the pictures are fetched from"""
    indices: list[int]
    """where in the source each of the N pictures stands"""
    captions: list[str]
    """the M texts"""
    image_of_pair: Tensor
    """the picture of every pair with every caption of it, int64 [P]"""
    text_of_pair: Tensor
    """the caption of these, int64 [P]"""
    image_of_row: Tensor
    """the picture of each pair with its first caption only, int64 [R]"""
    text_of_row: Tensor
    """the caption of these, int64 [R]"""

    def only(self, pictures: list[int]) -> HeldOutPairs:
        """Return the pairs of some of the pictures; captions that are left without any go too."""
        chosen = torch.tensor(pictures)
        with_picture = torch.isin(self.image_of_pair, chosen)
        texts = self.text_of_pair[with_picture].unique()
        rows = torch.isin(self.image_of_row, chosen)
        return replace(
            self,
            indices=[self.indices[place] for place in pictures],
            captions=[self.captions[text] for text in texts.tolist()],
            image_of_pair=torch.searchsorted(chosen, self.image_of_pair[with_picture]),
            text_of_pair=torch.searchsorted(texts, self.text_of_pair[with_picture]),
            image_of_row=torch.searchsorted(chosen, self.image_of_row[rows]),
            text_of_row=torch.searchsorted(texts, self.text_of_row[rows]),
        )


def read_held_out(source: Source) -> HeldOutPairs:
    """Return the pairs of a source that can be fetched and have a caption, and say how many there are.

    Pairs with one key are one picture, equal texts one caption. Raises `DataError` when no pair is left. Pictures are
    not decoded here.
    """
    images: dict[str, int] = {}
    texts: dict[str, int] = {}
    indices: list[int] = []
    rows: list[tuple[int, int]] = []
    pairs: dict[tuple[int, int], None] = {}  # a dictionary keeps the order, a set does not
    left_out: Counter[str] = Counter()
    for index in range(len(source)):
        try:
            captions = captions_of(source, index)
        except UnusableSample as problem:
            left_out[problem.reason] += 1
            continue
        image = images.setdefault(source.key(index), len(images))
        if image == len(indices):
            indices.append(index)
        numbers = [texts.setdefault(caption, len(texts)) for caption in captions]
        rows.append((image, numbers[0]))
        pairs.update(dict.fromkeys((image, number) for number in numbers))
    if not rows:
        raise DataError(f"data.val: no pair of {source.name} can be used ({by_reason(left_out)}): nothing is evaluated")
    counts = f"{len(rows)} pairs, {len(images)} pictures, {len(texts)} captions"
    say(f"validation on {source.name}: {counts}{f'; left out: {by_reason(left_out)}' if left_out else ''}")
    if len(rows) < FEW_PAIRS:
        say(f"warning: {few_in_words(len(rows))}")
    return HeldOutPairs(
        source, indices, list(texts), *torch.tensor(list(pairs)).unbind(1), *torch.tensor(rows).unbind(1)
    )


def captions_of(source: Source, index: int) -> tuple[str, ...]:
    """Return the captions of a pair that are not blank; raises `UnusableSample` when there is none."""
    captions = tuple(caption for caption in source[index].captions if caption.strip())
    if not captions:
        raise UnusableSample("no_caption", "the caption is empty or missing")
    return require_caption_size(captions)


def validation_loss(
    accelerator: Accelerator,
    loss: Loss,
    clip: nn.Module,
    image_features: Tensor,
    text_features: Tensor,
    pairs: HeldOutPairs,
    batch_size: int,
    lookout: Lookout = UNWATCHED,
) -> float:
    """Return the mean loss over batches of `batch_size` pairs (all when fewer), the same on every process.

    image_features, text_features: unit-norm float32 [N, D] and [M, D]. A pair counts with its first caption. Batches
    are cut from one fixed order, a short last one is left out; they are divided over the processes. Raises `StopAsked`.
    """
    num_pairs = len(pairs.image_of_row)
    batch_size = min(batch_size, num_pairs)
    batches = fixed_order(num_pairs).split(batch_size)[: num_pairs // batch_size]
    losses = torch.zeros(len(batches), device=accelerator.device)
    with torch.no_grad(), ieee_float32():
        scalars = logit_scalars(clip)
        for number in lookout.rounds(accelerator, range(len(batches)), "evaluation"):
            rows = batches[number]
            images = image_features[pairs.image_of_row[rows]].to(accelerator.device)
            texts = text_features[pairs.text_of_row[rows]].to(accelerator.device)
            identity = {"caption_hash": pairs.text_of_row[rows], "picture_hash": pairs.image_of_row[rows]}
            identity = {name: each.to(accelerator.device) for name, each in identity.items()}
            losses[number] = total(loss({"image_features": images, "text_features": texts, **identity, **scalars}))
    return accelerator.reduce(losses, "sum").cpu().double().mean().item()


def fixed_order(num_pairs: int) -> Tensor:
    """Return a permutation of the pairs that is the same in every run.

    Tables often list the captions of one picture, or the pictures of one kind, in a row; in the table's order they
    would meet in one batch, and the loss would say more about the table than about the model.
    """
    generator = torch.Generator().manual_seed(derive_seed("validation loss"))
    return torch.randperm(num_pairs, generator=generator)


def logit_scalars(clip: nn.Module) -> dict[str, Tensor]:
    """Return the logit scale (after exp) and, where the model has one, the logit bias, in float32."""
    own = dict(clip.named_parameters(recurse=False))
    scalars = {"logit_scale": own["logit_scale"].float().exp()}
    return {**scalars, "logit_bias": own["logit_bias"].float()} if "logit_bias" in own else scalars
