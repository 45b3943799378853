"""A batch cut into the chunks that go through a tower at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from accel_clip.data.batch import Batch
from accel_clip.models.anatomy import Anatomy
from accel_clip.models.towers import text_chunks, trimmed, unique_captions


@dataclass(frozen=True)
class Chunk:
    """What goes through the model at once: `inputs` by name (image, text), and which items they are, int64 [n]."""

    inputs: dict[str, Tensor]
    rows: Tensor

    @property
    def side(self) -> str:
        """Return image or text; chunks of whole pairs count as image."""
        return next(iter(self.inputs))

    def is_frozen(self, anatomy: Anatomy) -> bool:
        """Return whether nothing that this chunk passes through is trained."""
        return set(self.inputs) <= anatomy.frozen


@dataclass(frozen=True)
class Cut:
    """The chunks of one process's batch. Caption i of the batch is item `text_of_pair[i]` of the text side."""

    chunks: list[Chunk]
    text_of_pair: Tensor

    def to_pairs(self, name: str, items: Tensor) -> Tensor:
        """Return one row a pair from one row an item of the output `name`."""
        return items[self.text_of_pair.to(items.device)] if name == "text_features" else items

    def to_items(self, name: str, rows: Tensor) -> Tensor:
        """Return the sum over the pairs of each item: how a gradient by pairs becomes one by items."""
        if name != "text_features":
            return rows
        num_items = int(self.text_of_pair.max()) + 1
        return rows.new_zeros(num_items, *rows.shape[1:]).index_add_(0, self.text_of_pair.to(rows.device), rows)


def cut_batch(batch: Batch, anatomy: Anatomy, micro_batch_size: int) -> Cut:
    """Return a batch, on the CPU, in chunks of at most `micro_batch_size` rows, pictures first.

    Where the towers are separate each is cut on its own: equal captions become one item and captions are sorted by
    length, so that every chunk is trimmed to its own longest one, as far as that is exact for the model.
    """
    everything = torch.arange(len(batch))
    if not anatomy.separate:
        rows = everything.split(micro_batch_size)
        return Cut([Chunk({"image": batch.image[each], "text": batch.tokens[each]}, each) for each in rows], everything)
    tokens, text_of_pair = unique_captions(batch.tokens) if anatomy.deduplicates else (batch.tokens, everything)
    pictures = [
        Chunk({"image": image}, rows)
        for image, rows in zip(batch.image.split(micro_batch_size), everything.split(micro_batch_size), strict=True)
    ]
    return Cut([*pictures, *caption_chunks(tokens, anatomy, micro_batch_size)], text_of_pair)


def caption_chunks(tokens: Tensor, anatomy: Anatomy, micro_batch_size: int) -> Iterator[Chunk]:
    """Yield the chunks of captions."""
    if anatomy.trims:
        for rows in text_chunks(tokens, micro_batch_size, anatomy.end):
            yield Chunk({"text": trimmed(tokens[rows], anatomy.end)}, rows)
    else:
        for rows in torch.arange(len(tokens)).split(micro_batch_size):
            yield Chunk({"text": tokens[rows]}, rows)
