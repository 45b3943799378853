"""The contrastive losses of the global batch and their closed-form gradients, tile by tile: no B × B matrix exists.

Symbols: B pairs in the batch of all processes, W processes, b = B / W own pairs, D width; x_i, y_i the image and text
features of pair i; s the logit scale (after exp), β the logit bias; t the rows and columns of a tile.

Softmax (Radford et al. 2021, arXiv 2103.00020, figure 3), logits L_ij = s x_i·y_j:

1. Gather the features of both sides in one tensor.
2. First sweep: running log-sum-exps of own rows, row_i = log Σ_j exp L_ij, and of own rows' part of every column.
3. Gather these; the parts of column j add up to col_j = log Σ_i exp L_ij.
4. Second sweep: with G_ij = exp(L_ij − row_i) + exp(L_ij − col_j), add up G Y for own images and Gᵀ X for own texts.
5. loss = 1/2B Σ_i (row_i + col_i − 2 s x_i·ȳ_i), ∂loss/∂X = s/2B (G Y − 2 Ȳ), ∂loss/∂Y = s/2B (Gᵀ X − 2 X̄), where ȳ_i is
   the mean of the texts that are right for image i: its own, unless `positives` says otherwise.

Sigmoid (Zhai et al. 2023, arXiv 2303.15343, algorithm 1), logits L_ij = s x_i·y_j + β, own pairs negated in Z:

1. Gather the features of both sides in one tensor.
2. One sweep: loss = 1/B Σ softplus(Z_ij); with G = σ(Z), own pairs negated again, ∂loss/∂X = s/B G Y,
   ∂loss/∂Y = s/B Gᵀ X and ∂loss/∂β = 1/B Σ G_ij.

A loss knows s only through s X, so ∂loss/∂s = Σ_i x_i·(∂loss/∂x_i) / s in both: it costs no sweep.

One process makes each tile of G once and multiplies it from both sides; several make own rows of G and of Gᵀ, which
costs a product more but moves no gradient between processes.

| per process | multiplications × 2         | numbers in memory besides inputs | gathers            |
|-------------|-----------------------------|----------------------------------|--------------------|
| softmax     | 8 B² D (W = 1), 10 b B D    | 2 t² + 2 b D (+ 2 B D if W > 1)  | 2 (0 if W = 1)     |
| sigmoid     | 6 B² D (W = 1), 8 b B D     | the same                         | 1 (0 if W = 1)     |
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from accel_clip.losses.gradient import at_least_float32, ieee_float32

# Bytes of the two live tiles. 2048 × 2048 in float32: from there on a product is as fast as with larger tiles, while the
# passes over a tile still find it in a server's cache; and it is little beside the features it serves.
TILE_BYTES = 32 * 2**20


class Processes(Protocol):
    """What is used of `Accelerator`."""

    @property
    def num_processes(self) -> int:
        """How many there are."""

    @property
    def process_index(self) -> int:
        """Which of them this is."""

    def gather(self, tensor: Tensor) -> Any:
        """Return the rows of all processes, in their order."""


@dataclass(frozen=True)
class OneProcess:
    """A process on its own."""

    num_processes: int = 1
    process_index: int = 0

    def gather(self, tensor: Tensor) -> Tensor:
        """Return the rows there are."""
        return tensor


@dataclass(frozen=True)
class Share:
    """What one process knows of the loss of the global batch.

    loss: scalar, its shares add up over processes. by_image_features, by_text_features: [b, D], the whole gradient of
    the global loss by own rows. by_logit_scale (after exp), by_logit_bias: of the shapes of these parameters, shares
    that add up over processes.
    """

    loss: Tensor
    by_image_features: Tensor
    by_text_features: Tensor
    by_logit_scale: Tensor
    by_logit_bias: Tensor


class Positives(Protocol):
    """Which pairs of an image and a text are right, and which are neither right nor wrong."""

    def gathered(self, processes: Processes) -> Positives:
        """Return the same for the pairs of all processes."""

    def mask_(self, tile: Tile) -> None:
        """Set the logits that shall not count to −inf."""

    def means(self, features: Tensor, own: slice) -> Tensor:
        """Return the mean of the right counterparts, [b, D], for own pairs of the `features` [B, D] of all."""


@dataclass(frozen=True)
class OwnPair:
    """The own counterpart alone is right and all others are wrong, as in CLIP."""

    def gathered(self, processes: Processes) -> OwnPair:
        """Return itself: there is nothing to know of other processes."""
        return self

    def mask_(self, tile: Tile) -> None:
        """Leave all logits."""

    def means(self, features: Tensor, own: slice) -> Tensor:
        """Return own counterparts."""
        return features[own]


@dataclass(frozen=True)
class EqualPairs:
    """All counterparts of equal hash are right, in equal parts (Khosla et al. 2020, arXiv 2004.11362, equation 2).

    hashes: int64 [b], equal where two pairs show the same, such as `Batch.caption_hash`.
    """

    hashes: Tensor

    def gathered(self, processes: Processes) -> EqualPairs:
        """Return the hashes of all processes."""
        return replace(self, hashes=processes.gather(self.hashes))

    def mask_(self, tile: Tile) -> None:
        """Leave all logits."""

    def means(self, features: Tensor, own: slice) -> Tensor:
        """Return the mean counterpart of each own pair's equals, found by sorting: nothing here grows with B²."""
        _, group, sizes = self.hashes.unique(return_inverse=True, return_counts=True)
        sums = features.new_zeros(len(sizes), features.shape[1]).index_add_(0, group, features)
        return sums.div_(sizes[:, None])[group[own]]


@dataclass(frozen=True)
class MaskedEqualPairs:
    """The own counterpart alone is right; others of equal hash are left out of the sums, being no negatives.

    hashes: int64 [b], equal where two pairs show the same, such as `Batch.caption_hash`.
    """

    hashes: Tensor

    def gathered(self, processes: Processes) -> MaskedEqualPairs:
        """Return the hashes of all processes."""
        return replace(self, hashes=processes.gather(self.hashes))

    def mask_(self, tile: Tile) -> None:
        """Set the logits of other pairs of equal hash to −inf."""
        first = tile.rows.start + tile.first
        equal = self.hashes[first : first + len(tile.logits), None] == self.hashes[None, tile.columns]
        equal.diagonal(tile.offset).fill_(False)
        tile.logits.masked_fill_(equal, -math.inf)

    def means(self, features: Tensor, own: slice) -> Tensor:
        """Return own counterparts."""
        return features[own]


OWN_PAIR = OwnPair()


@dataclass(frozen=True)
class Tile:
    """A block of logits, and memory of its shape to work in; both belong to the next tile afterwards.

    rows: of own pairs; columns: of all pairs; first: the column of own row 0.
    """

    logits: Tensor
    scratch: Tensor
    rows: slice
    columns: slice
    first: int

    @property
    def offset(self) -> int:
        """The diagonal of the tile on which images meet their own texts; it may lie outside."""
        return self.first + self.rows.start - self.columns.start

    @property
    def own_pairs(self) -> Tensor:
        """A view of the logits of images with their own texts."""
        return self.logits.diagonal(self.offset)


@dataclass(frozen=True)
class Side:
    """Own features of one side, the rows [b, D], against all features of the other, the columns [B, D]."""

    rows: Tensor
    columns: Tensor
    first: int

    @property
    def own(self) -> slice:
        """The columns of own pairs."""
        return slice(self.first, self.first + len(self.rows))

    def tiles(self, logit_scale: Tensor, tile_rows: int | None) -> Iterator[Tile]:
        """Yield the logits of all rows with all columns in square tiles, row by row, in memory taken once."""
        edge = math.isqrt(TILE_BYTES // (2 * self.rows.element_size())) if tile_rows is None else tile_rows
        memory = self.rows.new_empty(2, min(edge, len(self.rows)) * min(edge, len(self.columns)))
        for rows in parts(len(self.rows), edge):
            scaled = self.rows[rows] * logit_scale
            for columns in parts(len(self.columns), edge):
                shape = (len(scaled), columns.stop - columns.start)
                logits, scratch = memory[:, : math.prod(shape)].view(2, *shape)
                torch.mm(scaled, self.columns[columns].T, out=logits)
                yield Tile(logits, scratch, rows, columns, self.first)


def softmax_share(
    accelerator: Processes,
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    positives: Positives = OWN_PAIR,
    tile_rows: int | None = None,
) -> Share:
    """Return this process's share of the softmax loss over all texts and over all images of the global batch.

    image_features, text_features: own rows, unit-norm [b, D], b the same on every process; logit_scale: one number,
    after exp; positives: what to do with pairs that show the same (one more gather); tile_rows: rows and columns of a
    tile, by default what `TILE_BYTES` holds. Computed in float32, or float64 when the features are.
    """
    with torch.no_grad(), ieee_float32():
        images, texts = sides(accelerator, image_features, text_features)
        scale = logit_scale.to(images.rows).reshape(())
        positives = positives.gathered(accelerator) if accelerator.num_processes > 1 else positives
        row, column = log_sum_exps(accelerator, images, softmax_logits(images, scale, positives, tile_rows))
        own = images.own
        image_weights = softmax_weights(softmax_logits(images, scale, positives, tile_rows), row[own], column)
        text_weights = softmax_weights(softmax_logits(texts, scale, positives, tile_rows), column[own], row)
        by_image, by_text = products(accelerator, images, texts, image_weights, text_weights)
        right_texts = positives.means(images.columns, own)
        by_image.sub_(right_texts, alpha=2)
        by_text.sub_(positives.means(texts.columns, own), alpha=2)
        loss = (row[own] / 2 + column[own] / 2 - scale * (images.rows * right_texts).sum(1)).sum() / len(row)
        ...
