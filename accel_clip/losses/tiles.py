"""The contrastive losses of the global batch and their closed-form gradients, tile by tile: no B × B matrix exists.

Symbols: B pairs in the batch of all processes, W processes, b = B / W own pairs, D width; x_i, y_i the image and text
features of pair i; s the logit scale (after exp), β the logit bias; t the rows and the columns of a tile.

Softmax (Radford et al. 2021, arXiv 2103.00020, figure 3), logits L_ij = s x_i·y_j:

1. Gather the features of both sides in one tensor.
2. First sweep: running log-sum-exps of own rows, row_i = log Σ_j exp L_ij, and of own rows' part of every column.
3. Gather these; the parts of column j join to col_j = log Σ_i exp L_ij.
4. Second sweep: with G_ij = exp(L_ij − row_i) + exp(L_ij − col_j) − 2 δ_ij, add up G Y for own images and Gᵀ X for own
   texts; loss = 1/2B Σ_i (row_i + col_i − 2 L_ii), ∂loss/∂X = s/2B G Y, ∂loss/∂Y = s/2B Gᵀ X.
5. Where pairs are equal and `positives` says that all their texts are right, their mean ȳ_i takes the place of y_i in
   L_ii and in −2 y_i, and likewise x̄_i: B D numbers, no sweep.

Sigmoid (Zhai et al. 2023, arXiv 2303.15343, algorithm 1), logits L_ij = s x_i·y_j + β, and Z = L with L_ii negated:

1. Gather the features of both sides in one tensor.
2. One sweep: loss = 1/B Σ softplus(Z_ij); with G = σ(Z), its diagonal negated again, ∂loss/∂X = s/B G Y,
   ∂loss/∂Y = s/B Gᵀ X and ∂loss/∂β = 1/B Σ G_ij.

Both know s only through s X, so ∂loss/∂s = Σ_i x_i·(∂loss/∂x_i) / s costs no sweep.
One process makes each tile of G once and multiplies it from both sides; several make own rows of G and of Gᵀ, which
costs one product more but moves no gradient between processes.

| per process | operations in products | numbers in memory besides the inputs | gathers |
|---|---|---|---|
| softmax | 8 B² D; W > 1: 10 b B D | 2 t² + 2 b D; W > 1: + 2 B D | 2, and 1 for `positives`; W = 1: 0 |
| sigmoid | 6 B² D; W > 1: 8 b B D | the same | 1; W = 1: 0 |
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from torch import Tensor

from accel_clip.losses.precision import at_least_float32, ieee_float32

if TYPE_CHECKING:
    from typing_extensions import Self

# Bytes of the two live tiles: 2048 × 2048 each in float32, whatever B is. So many that a product (4e9 operations at
# D = 512) dwarfs what it costs to start it on any device, and so few that the passes over a tile find it in the cache.
TILE_BYTES = 32 * 2**20


@dataclass(frozen=True)
class Share:
    """What one process brings to the loss of the global batch and its gradient."""

    loss: Tensor
    """a scalar; shares add up over processes"""
    by_image_features: Tensor
    """[b, D], the whole gradient of the global loss by own rows"""
    by_text_features: Tensor
    """[b, D], the whole gradient of the global loss by own rows"""
    by_logit_scale: Tensor
    """a scalar, by the scale after exp; shares add up over processes"""
    by_logit_bias: Tensor
    """a scalar; shares add up over processes"""


class OneProcess:
    """Stands for `Accelerator` where a process is alone."""

    num_processes = 1
    process_index = 0

    def gather(self, tensor: Tensor) -> Tensor:
        """Return the rows of the only process."""
        return tensor


@dataclass(frozen=True)
class Tile:
    """A block of logits, and memory to work in; the next tile overwrites both."""

    logits: Tensor
    """of `rows` and `columns`"""
    scratch: Tensor
    """memory of the same shape"""
    rows: slice
    """of own pairs"""
    columns: slice
    """of all pairs"""
    offset: int
    """the diagonal on which pairs meet themselves, maybe outside"""

    @property
    def own_pairs(self) -> Tensor:
        """The logits of images with their own texts, a view."""
        return self.logits.diagonal(self.offset)

    @property
    def own_rows(self) -> slice:
        """The rows that meet themselves in this tile."""
        first = self.rows.start + max(0, -self.offset)
        return slice(first, first + len(self.own_pairs))


@dataclass(frozen=True)
class Side:
    """Own features of one side against all of the other."""

    rows: Tensor
    """own features of one side, [b, D]"""
    columns: Tensor
    """all features of the other side, [B, D]"""
    own: slice
    """the columns of own pairs"""

    def tiles(self, scale: Tensor, tile_rows: int | None) -> Iterator[Tile]:
        """Yield the logits of all rows with all columns in square tiles, in memory that is taken once."""
        edge = math.isqrt(TILE_BYTES // (2 * self.rows.element_size())) if tile_rows is None else tile_rows
        memory = self.rows.new_empty(2, min(edge, len(self.rows)) * min(edge, len(self.columns)))
        for rows in row_slices(len(self.rows), edge):
            scaled = self.rows[rows] * scale
            for columns in row_slices(len(self.columns), edge):
                shape = (len(scaled), columns.stop - columns.start)
                logits, scratch = (each[: math.prod(shape)].view(shape) for each in memory)
                torch.mm(scaled, self.columns[columns].T, out=logits)
                yield Tile(logits, scratch, rows, columns, self.own.start + rows.start - columns.start)


class OwnPair:
    """Positives of CLIP: the own counterpart is right and all others are wrong."""

    def gathered(self, processes: Accelerator | OneProcess) -> OwnPair:
        """Return the same for the pairs of all processes."""
        return self

    def masked(self, logits: Iterator[Tile], own: slice) -> Iterator[Tile]:
        """Yield the tiles with those logits −inf that shall not count: here none."""
        return logits

    def beyond_own(self, side: Side) -> Tensor:
        """Return the mean of the right counterparts of own pairs less the own counterparts, [b, D]: here zero."""
        return side.rows.new_zeros(())


@dataclass(frozen=True)
class PairsByHash(OwnPair):
    """Positives that depend on which pairs show the same."""

    hashes: Tensor
    """int64 [b], equal for pairs that show the same, such as `Batch.caption_hash`"""

    def gathered(self, processes: Accelerator | OneProcess) -> Self:
        """Return the same for the pairs of all processes."""
        return replace(self, hashes=processes.gather(self.hashes))


@dataclass(frozen=True)
class EqualPairs(PairsByHash):
    """Every counterpart of an equal pair is right, in equal parts (Khosla et al. 2020, arXiv 2004.11362, equation 2).

    hashes: int64 [b], equal for pairs that show the same, such as `Batch.caption_hash`.
    """

    def beyond_own(self, side: Side) -> Tensor:
        """Return the mean of the right counterparts less the own ones, [b, D], from sums over groups of equal pairs."""
        _, group, sizes = self.hashes.unique(return_inverse=True, return_counts=True)
        sums = side.columns.new_zeros(len(sizes), side.columns.shape[1]).index_add_(0, group, side.columns)
        return sums.div_(sizes[:, None])[group[side.own]].sub_(side.columns[side.own])


@dataclass(frozen=True)
class MaskedEqualPairs(PairsByHash):
    """The own counterpart is right, those of other equal pairs are neither right nor wrong: left out of all sums.

    hashes: int64 [b], equal for pairs that show the same, such as `Batch.caption_hash`.
    """

    def masked(self, logits: Iterator[Tile], own: slice) -> Iterator[Tile]:
        """Yield the tiles with the logits of other equal pairs −inf."""
        for tile in logits:
            equal = self.hashes[own][tile.rows, None] == self.hashes[tile.columns]
            equal.diagonal(tile.offset).fill_(False)
            tile.logits.masked_fill_(equal, -math.inf)
            yield tile


OWN_PAIR = OwnPair()


def softmax_share(
    accelerator: Accelerator | OneProcess,
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    positives: OwnPair = OWN_PAIR,
    tile_rows: int | None = None,
) -> Share:
    """Return this process's share of the global softmax loss over all texts and over all images.

    image_features, text_features: own rows [b, D], b the same on every process; logit_scale: one number, after exp;
    positives: what equal pairs are to each other; tile_rows: rows and columns of a tile, if not those that `TILE_BYTES`
    hold. Computed in float32, or in float64 when the features are.
    """
    with torch.no_grad(), ieee_float32():
        processes = OneProcess() if accelerator.num_processes == 1 else accelerator
        images, texts = sides(processes, image_features, text_features)
        scale, positives = feature_scalar(logit_scale, images), positives.gathered(processes)

        def logits(side: Side) -> Iterator[Tile]:
            return positives.masked(side.tiles(scale, tile_rows), side.own)

        row, column, own_logits = softmax_sums(processes, images, logits(images))
        own_row, own_column = row[:, images.own], column[:, images.own]
        image_weights = softmax_weights(logits(images), own_row, column)
        text_weights = softmax_weights(logits(texts), own_column, row)
        by_image, by_text = products(images, texts, image_weights, text_weights)
        other_texts = positives.beyond_own(images)
        by_image.sub_(other_texts, alpha=2)
        by_text.sub_(positives.beyond_own(texts), alpha=2)
        right_logits = own_logits + scale * (images.rows * other_texts).sum(1)
        loss = sum((largest - right_logits + total.log()).sum() for largest, total in (own_row, own_column))
        return averaged(images, logit_scale, 2 * len(images.columns), loss, by_image, by_text, torch.zeros_like(scale))


def sigmoid_share(
    accelerator: Accelerator | OneProcess,
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    tile_rows: int | None = None,
) -> Share:
    """Return this process's share of the global pairwise sigmoid loss.

    image_features, text_features: own rows [b, D], b the same on every process; logit_scale: one number, after exp;
    logit_bias: one number; tile_rows and the precision as in `softmax_share`.
    """
    with torch.no_grad(), ieee_float32():
        processes = OneProcess() if accelerator.num_processes == 1 else accelerator
        images, texts = sides(processes, image_features, text_features)
        scale, bias = feature_scalar(logit_scale, images), feature_scalar(logit_bias, images)
        loss, by_bias = torch.zeros_like(bias), torch.zeros_like(bias)
        image_logits = adding_up(negated_own_pairs(images.tiles(scale, tile_rows), bias), softplus, loss)
        image_weights = adding_up(sigmoid_weights(image_logits), lambda tile: tile.logits, by_bias)
        text_weights = sigmoid_weights(negated_own_pairs(texts.tiles(scale, tile_rows), bias))
        by_image, by_text = products(images, texts, image_weights, text_weights)
        by_bias = by_bias.reshape(logit_bias.shape)
        return averaged(images, logit_scale, len(images.columns), loss, by_image, by_text, by_bias)


def tiled_clip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    positives: OwnPair = OWN_PAIR,
    tile_rows: int | None = None,
) -> Tensor:
    """Return the softmax loss of the pairs of this process, differentiable once, with no B × B matrix.

    Arguments as in `softmax_share`. The gradient is computed with the loss and kept: 2 B D numbers until `backward`.
    """
    compute = partial(softmax_share, OneProcess(), positives=positives, tile_rows=tile_rows)
    return GradientWithLoss.apply(compute, image_features, text_features, logit_scale)


def tiled_siglip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    tile_rows: int | None = None,
) -> Tensor:
    """Return the pairwise sigmoid loss of the pairs of this process, differentiable once, with no B × B matrix.

    Arguments as in `sigmoid_share`. The gradient is computed with the loss and kept: 2 B D numbers until `backward`.
    """
    compute = partial(sigmoid_share, OneProcess(), tile_rows=tile_rows)
    return GradientWithLoss.apply(compute, image_features, text_features, logit_scale, logit_bias)


class GradientWithLoss(torch.autograd.Function):
    """A loss whose gradient is known when its value is."""

    @staticmethod
    def forward(ctx: Any, compute: Callable[..., Share], *inputs: Tensor) -> Tensor:
        """Return the loss of a `Share` and keep its gradient by `inputs`, which are in its order."""
        made = compute(*inputs)
        gradient = (made.by_image_features, made.by_text_features, made.by_logit_scale, made.by_logit_bias)
        ctx.save_for_backward(*gradient[: len(inputs)])
        return made.loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, by_loss: Tensor) -> tuple[Tensor | None, ...]:
        """Multiply the gradient by that of what was made of the loss."""
        return (None, *(by_loss * each for each in ctx.saved_tensors))


def sides(processes: Accelerator | OneProcess, image_features: Tensor, text_features: Tensor) -> tuple[Side, Side]:
    """Return own images against all texts, and own texts against all images; one gather of both."""
    own_images, own_texts = at_least_float32(image_features), at_least_float32(text_features)
    images, texts = own_images, own_texts
    if processes.num_processes > 1:
        images, texts = processes.gather(torch.cat([own_images, own_texts], dim=1)).chunk(2, dim=1)
    first = processes.process_index * len(own_images)
    own = slice(first, first + len(own_images))
    return Side(own_images, texts, own), Side(own_texts, images, own)


def softmax_sums(
    processes: Accelerator | OneProcess, side: Side, logits: Iterator[Tile]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return log-sum-exps of all rows and all columns, each [2, B] as in `sums_of`, and own pairs' logits [b]."""
    lowest = torch.finfo(side.rows.dtype).min
    row, column = (side.rows.new_zeros(2, len(each)) for each in (side.rows, side.columns))
    row[0], column[0] = lowest, lowest
    own_logits = side.rows.new_empty(len(side.rows))
    for tile in logits:
        row[:, tile.rows] = joined_sums(torch.stack([row[:, tile.rows], sums_of(tile, 1)]))
        column[:, tile.columns] = joined_sums(torch.stack([column[:, tile.columns], sums_of(tile, 0)]))
        own_logits[tile.own_rows] = tile.own_pairs
    everyone = processes.gather(torch.cat([row, column], dim=1)[None])
    rows, columns = everyone[..., : len(side.rows)], everyone[..., len(side.rows) :]
    return rows.movedim(0, 1).flatten(1), joined_sums(columns), own_logits


def sums_of(tile: Tile, dim: int) -> Tensor:
    """Return log-sum-exps along `dim` as two numbers each, [2, t]: the largest logit m, and Σ exp(logit − m).

    Two, because m + log Σ rounds to 4e-6 at 100 in float32, which the gradient of a small loss would show.
    """
    largest = tile.logits.amax(dim, keepdim=True).clamp_(min=torch.finfo(tile.logits.dtype).min)
    return torch.stack([largest.squeeze(dim), torch.sub(tile.logits, largest, out=tile.scratch).exp_().sum(dim)])


def joined_sums(sums: Tensor) -> Tensor:
    """Return the log-sum-exps [2, n] of k parts [k, 2, n], each as in `sums_of`."""
    largest = sums[:, 0].amax(0)
    return torch.stack([largest, (sums[:, 1] * (sums[:, 0] - largest).exp()).sum(0)])


def softmax_weights(logits: Iterator[Tile], row: Tensor, column: Tensor) -> Iterator[Tile]:
    """Turn logits into G, by the log-sum-exps of their rows [2, b] and columns [2, B], as in `sums_of`."""
    for tile in logits:
        (row_largest, row_total), (column_largest, column_total) = row[:, tile.rows, None], column[:, tile.columns]
        torch.sub(tile.logits, column_largest, out=tile.scratch).exp_()
        tile.logits.sub_(row_largest).exp_().div_(row_total).addcdiv_(tile.scratch, column_total)
        tile.own_pairs.sub_(2)
        yield tile


def negated_own_pairs(tiles: Iterator[Tile], bias: Tensor) -> Iterator[Tile]:
    """Add the bias to the logits and turn the sign of own pairs: the larger, the more wrong."""
    for tile in tiles:
        tile.logits.add_(bias)
        tile.own_pairs.neg_()
        yield tile


def sigmoid_weights(logits: Iterator[Tile]) -> Iterator[Tile]:
    """Turn logits with negated own pairs into the derivative of the loss by the logits."""
    for tile in logits:
        tile.logits.sigmoid_()
        tile.own_pairs.neg_()
        yield tile


def softplus(tile: Tile) -> Tensor:
    """Return log(1 + exp z) of a tile's logits; `F.softplus` is off by 2e-9 from 20 on."""
    return torch.logaddexp(tile.logits, tile.logits.new_zeros(()), out=tile.scratch)


def adding_up(tiles: Iterator[Tile], summand: Callable[[Tile], Tensor], total: Tensor) -> Iterator[Tile]:
    """Yield tiles as they are and add the sum of their summands to `total`."""
    for tile in tiles:
        total.add_(summand(tile).sum())
        yield tile


def products(
    images: Side, texts: Side, image_weights: Iterator[Tile], text_weights: Iterator[Tile]
) -> tuple[Tensor, Tensor]:
    """Return G Y for own images and Gᵀ X for own texts; where own rows are all rows, from `image_weights` alone."""
    if len(images.rows) < len(images.columns):
        return product(images, image_weights), product(texts, text_weights)
    by_image, by_text = torch.zeros_like(images.rows), torch.zeros_like(texts.rows)
    for tile in image_weights:
        by_image[tile.rows].addmm_(tile.logits, images.columns[tile.columns])
        by_text[tile.columns].addmm_(tile.logits.T, images.rows[tile.rows])
    return by_image, by_text


def product(side: Side, weights: Iterator[Tile]) -> Tensor:
    """Return weights × columns, [b, D]."""
    total = torch.zeros_like(side.rows)
    for tile in weights:
        total[tile.rows].addmm_(tile.logits, side.columns[tile.columns])
    return total


def averaged(
    images: Side, logit_scale: Tensor, count: int, loss: Tensor, by_image: Tensor, by_text: Tensor, by_bias: Tensor
) -> Share:
    """Divide sums over pairs by their count; turn the gradients by s X and s Y, in place, into those by X, Y and s."""
    by_scale = (images.rows * by_image).sum().div_(count).reshape(logit_scale.shape)
    factor = feature_scalar(logit_scale, images) / count
    return Share(loss / count, by_image.mul_(factor), by_text.mul_(factor), by_scale, by_bias / count)


def feature_scalar(value: Tensor, side: Side) -> Tensor:
    """Return a parameter of one number as a scalar of the kind of the features."""
    return value.to(side.rows).reshape(())


def row_slices(num_rows: int, part: int) -> Iterator[slice]:
    """Yield consecutive slices of `part` rows; the last may have fewer."""
    for start in range(0, num_rows, part):
        yield slice(start, min(start + part, num_rows))
