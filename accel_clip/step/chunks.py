"""A batch cut into the chunks that go through a tower at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from accel_clip.data.batch import Batch
from accel_clip.models.anatomy import Anatomy
from accel_clip.models.towers import length_groups, text_chunks, unique_captions
from accel_clip.process.transfer import to_device


@dataclass(frozen=True)
class Plan:
    """How a process's part of a batch is cut."""

    micro_batch_size: int
    """rows that go through a tower at once"""
    captions_per_chunk: int
    """captions that do: more than rows where all graphs are kept anyway and nothing is drawn, since a chunk costs a
    gradient of the whole vocabulary"""
    kept: dict[str, int]
    """how many of a side's last chunks keep their graph, by the side that is trained, image or text; by image for
    chunks of whole pairs"""
    cost_of_a_group: int
    """what a group of captions of nearly equal length costs beside its tokens, in tokens; large where work comes in
    large pieces"""


@dataclass(frozen=True)
class Chunk:
    """What goes through the model at once."""

    inputs: dict[str, Tensor | list[Tensor]]
    """by name: image, one tensor of pictures; text, a list of groups of captions, which may differ in length"""
    rows: Tensor
    """which items they are, int64 [n]"""

    @property
    def side(self) -> str:
        """Return image or text; chunks of whole pairs count as image."""
        return next(iter(self.inputs))

    def inputs_on(self, device: torch.device) -> dict[str, Any]:
        """Return what goes through the model, on its device."""
        return {
            name: to_device(each, device) if isinstance(each, Tensor) else [to_device(part, device) for part in each]
            for name, each in self.inputs.items()
        }

    def is_frozen(self, anatomy: Anatomy) -> bool:
        """Return whether nothing that this chunk passes through is trained."""
        return set(self.inputs) <= anatomy.frozen


@dataclass(frozen=True)
class ChunkedBatch:
    """The chunks of one process's batch."""

    chunks: list[Chunk]
    """all of them, in the order in which they go through the model"""
    text_of_pair: Tensor
    """which item of the text side the caption of each pair is, int64 [b]"""
    num_captions: int
    """items of the text side"""

    def on(self, device: torch.device) -> ChunkedBatch:
        """Return the same with all that says which row belongs where on a device, in one copy."""
        places = [self.text_of_pair, *(chunk.rows for chunk in self.chunks)]
        text_of_pair, *rows = to_device(torch.cat(places), device).split([len(each) for each in places])
        chunks = [replace(chunk, rows=each) for chunk, each in zip(self.chunks, rows, strict=True)]
        return replace(self, chunks=chunks, text_of_pair=text_of_pair)

    def to_pairs(self, name: str, items: Tensor) -> Tensor:
        """Return one row a pair from one row an item of the output `name`."""
        return items[self.text_of_pair] if name == "text_features" else items

    def to_items(self, name: str, rows: Tensor) -> Tensor:
        """Return the sum over the pairs of each item: how a gradient by pairs becomes one by items."""
        if name != "text_features":
            return rows
        return rows.new_zeros(self.num_captions, *rows.shape[1:]).index_add_(0, self.text_of_pair, rows)


def cut_batch(batch: Batch, anatomy: Anatomy, plan: Plan) -> ChunkedBatch:
    """Return a batch, on the CPU, in chunks as the plan says, pictures first.

    Where the towers are separate each is cut on its own, unless its features are known: equal captions become one item
    and captions are sorted by length, so that groups of them are trimmed, as far as that is exact for the model.
    """
    everything = torch.arange(len(batch))
    pieces = everything.split(plan.micro_batch_size)
    pictures = batch.image.split(plan.micro_batch_size)  # views: an index would copy them all, out of pinned memory
    if not anatomy.separate:
        captions = batch.tokens.split(plan.micro_batch_size)
        parts = zip(pictures, captions, pieces, strict=True)
        whole = [Chunk({"image": image, "text": [text]}, rows) for image, text, rows in parts]
        return ChunkedBatch(whole, everything, len(batch))
    chunks, text_of_pair, num_captions = [], everything, len(batch)
    if "image_features" not in batch.features:
        chunks += [Chunk({"image": image}, rows) for image, rows in zip(pictures, pieces, strict=True)]
    if "text_features" not in batch.features:
        tokens, text_of_pair = unique_captions(batch.tokens) if anatomy.deduplicates else (batch.tokens, everything)
        chunks += caption_chunks(tokens, anatomy, plan)
        num_captions = len(tokens)
    return ChunkedBatch(chunks, text_of_pair, num_captions)


def caption_chunks(tokens: Tensor, anatomy: Anatomy, plan: Plan) -> Iterator[Chunk]:
    """Yield the chunks of captions; no group has more rows than may go through a tower at once."""
    if anatomy.trims:
        for rows in text_chunks(tokens, plan.captions_per_chunk, anatomy.end):
            groups = length_groups(tokens[rows], plan.cost_of_a_group, anatomy.end)
            yield Chunk({"text": [part for group in groups for part in group.split(plan.micro_batch_size)]}, rows)
    else:
        for rows in torch.arange(len(tokens)).split(plan.captions_per_chunk):
            yield Chunk({"text": list(tokens[rows].split(plan.micro_batch_size))}, rows)
