"""Tiled losses against dense float64 references, over emulated processes, and what they allocate and multiply."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import open_clip
import pytest
import torch
from open_clip.loss import SigLipLoss
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from accel_clip.losses.tiles import (
    TILE_BYTES,
    EqualPairs,
    MaskedEqualPairs,
    OwnPair,
    Share,
    sigmoid_share,
    softmax_share,
    tiled_clip_loss,
    tiled_siglip_loss,
)
from helpers.comparison import rounding
from helpers.emulation import Process, on_all

FIELDS = ("loss", "by_image_features", "by_text_features", "by_logit_scale", "by_logit_bias")


def added_up(shares: list[Share]) -> list[Tensor]:
    """Return loss and gradient of the global batch: rows side by side, scalars summed."""
    columns = {field: [getattr(share, field) for share in shares] for field in FIELDS}
    return [torch.cat(each) if "features" in field else torch.stack(each).sum(0) for field, each in columns.items()]


def dense_softmax(x: Tensor, y: Tensor, scale: Tensor, targets: Tensor, left_out: Tensor) -> Tensor:
    """Return the mean of both cross-entropies for explicit targets [B, B], without the logits that are left out."""
    logits = (scale * x @ y.T).masked_fill(left_out, -torch.inf)
    by_row = torch.where(targets > 0, logits.log_softmax(1), 0) * targets
    by_column = torch.where(targets > 0, logits.log_softmax(0), 0) * targets
    return -(by_row + by_column).sum() / (2 * len(x))


def dense_clip(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, hashes: Tensor) -> Tensor:
    own = torch.eye(len(x), dtype=x.dtype)
    return dense_softmax(x, y, scale, own, own > 1)


def dense_equal(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, hashes: Tensor) -> Tensor:
    equal = (hashes[:, None] == hashes).to(x.dtype)
    return dense_softmax(x, y, scale, equal / equal.sum(1, keepdim=True), equal > 1)


def dense_masked(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, hashes: Tensor) -> Tensor:
    own = torch.eye(len(x), dtype=x.dtype)
    return dense_softmax(x, y, scale, own, (hashes[:, None] == hashes) & (own == 0))


def dense_siglip(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, hashes: Tensor) -> Tensor:
    signs = 2 * torch.eye(len(x), dtype=x.dtype) - 1
    return -torch.nn.functional.logsigmoid(signs * (scale * x @ y.T + bias)).sum() / len(x)


Compute = Callable[..., Share]


def clip(process: Any, x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, hashes: Tensor, tile: int | None) -> Share:
    return softmax_share(process, x, y, scale, tile_rows=tile)


def equal(process: Any, x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, hashes: Tensor, tile: int | None) -> Share:
    return softmax_share(process, x, y, scale, EqualPairs(hashes), tile)


def masked(process: Any, x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, hashes: Tensor, tile: int | None) -> Share:
    return softmax_share(process, x, y, scale, MaskedEqualPairs(hashes), tile)


def siglip(process: Any, x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, hashes: Tensor, tile: int | None) -> Share:
    return sigmoid_share(process, x, y, scale, bias, tile)


LOSSES = [(clip, dense_clip), (equal, dense_equal), (masked, dense_masked), (siglip, dense_siglip)]
each_loss = pytest.mark.parametrize(("compute", "dense"), LOSSES, ids=[compute.__name__ for compute, _ in LOSSES])


def batch(num_pairs: int, scale: float = 10.0, width: int = 6) -> list[Tensor]:
    """Return image and text features, logit scale, logit bias and hashes of which a third of the pairs share some."""
    torch.manual_seed(num_pairs)
    x, y = torch.nn.functional.normalize(torch.randn(2, num_pairs, width, dtype=torch.float64), dim=-1)
    hashes = torch.randint(-(2**62), 2**62, (num_pairs,))[torch.randint(2 * num_pairs // 3 + 1, (num_pairs,))]
    return [x, y, torch.tensor(scale).double(), torch.tensor(-scale / 3).double(), hashes]


def reference(dense: Callable[..., Tensor], given: list[Tensor]) -> list[Tensor]:
    *inputs, hashes = given
    leaves = [value.double().clone().requires_grad_() for value in inputs]
    loss = dense(*leaves, hashes)
    return [loss.detach(), *torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)]


def shares_of(compute: Compute, given: list[Tensor], num_processes: int, tile: int | None) -> tuple[list[Tensor], int]:
    x, y, scale, bias, hashes = given
    size = len(x) // num_processes

    def on_one(process: Process) -> Share:
        own = slice(process.process_index * size, (process.process_index + 1) * size)
        return compute(process, x[own], y[own], scale, bias, hashes[own], tile)

    shares, num_gathers = on_all(num_processes, on_one)
    return added_up(shares), num_gathers


def check(got: list[Tensor], expected: list[Tensor], tolerance: float = 1e-10) -> None:
    for field, ours, theirs in zip(FIELDS, got, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance, msg=lambda m, f=field: f + m)


def of_float32_logits(scale: float, width: int = 6) -> float:
    """Return what rounding changes in logits so large, and so, relative to its slope, in a loss of them."""
    return scale * rounding(width)


@each_loss
@pytest.mark.parametrize("num_processes", [1, 2, 3])
@pytest.mark.parametrize("own_pairs", [1, 2, 7])
@pytest.mark.parametrize("tile", [1, 3, 5, None])
def test_shares_add_up_to_the_dense_loss_and_its_gradient(
    compute: Compute, dense: Callable[..., Tensor], num_processes: int, own_pairs: int, tile: int | None
) -> None:
    given = batch(own_pairs * num_processes)
    check(shares_of(compute, given, num_processes, tile)[0], reference(dense, given))


def test_batches_of_the_comparison_have_equal_pairs_within_and_across_processes() -> None:
    hashes = batch(21)[-1].reshape(3, 7)
    assert any(len(own.unique()) < 7 for own in hashes) and set(hashes[0].tolist()) & set(hashes[2].tolist())


@each_loss
@pytest.mark.parametrize("num_processes", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_identical_features_at_the_largest_scale(
    compute: Compute, dense: Callable[..., Tensor], num_processes: int, dtype: torch.dtype
) -> None:
    features, *_, hashes = batch(8)
    same = features[:1].to(dtype).expand(8, -1)
    given = [same, same, torch.tensor(100.0), torch.tensor(-30.0), hashes]
    tolerance = 1e-10 if dtype is torch.float64 else of_float32_logits(100)
    check(shares_of(compute, given, num_processes, 3)[0], reference(dense, given), tolerance)


@each_loss
@pytest.mark.parametrize("num_processes", [1, 2])
def test_all_pairs_equal(compute: Compute, dense: Callable[..., Tensor], num_processes: int) -> None:
    given = batch(8, scale=100.0)
    given[-1] = torch.full((8,), 7)
    check(shares_of(compute, given, num_processes, 3)[0], reference(dense, given))


@each_loss
def test_logits_far_beyond_what_exp_takes(compute: Compute, dense: Callable[..., Tensor]) -> None:
    """Rows whose logits are all near −300 or +300: float32 has no exp of either, nor of their difference."""
    x, _, scale, _, hashes = batch(8, scale=300.0)
    x = torch.cat([x[:1] + 1e-3 * x[:4], -x[:1] + 1e-3 * x[4:]]).float()
    given = [x, x.flip(0).contiguous(), scale, torch.tensor(0.5), hashes]
    check(shares_of(compute, given, 2, 3)[0], reference(dense, given), of_float32_logits(300))


@pytest.mark.parametrize("positives", [OwnPair(), EqualPairs(torch.arange(9)), MaskedEqualPairs(torch.arange(9))])
def test_open_clips_softmax_loss_agrees_where_no_pairs_are_equal(positives: OwnPair) -> None:
    inputs = [value.requires_grad_() for value in batch(9)[:3]]
    ours, theirs = tiled_clip_loss(*inputs, positives, tile_rows=4), open_clip.ClipLoss()(*inputs)
    check_gradients(ours, theirs, inputs)


def test_open_clips_sigmoid_loss_agrees() -> None:
    inputs = [value.requires_grad_() for value in batch(9)[:4]]
    check_gradients(tiled_siglip_loss(*inputs, tile_rows=4), SigLipLoss()(*inputs), inputs)


def check_gradients(ours: Tensor, theirs: Tensor, inputs: list[Tensor]) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=0)
    for got, expected in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(theirs, inputs), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


def test_float32_is_as_exact_as_open_clip_when_the_loss_is_small() -> None:
    x, y, _, _, _ = batch(512, width=128)
    inputs = [x, torch.nn.functional.normalize(x + y, dim=-1), torch.tensor(20.0)]
    exact = gradients(open_clip.ClipLoss(), [value.double() for value in inputs])
    single = [value.float() for value in inputs]
    ours, theirs = gradients(tiled_clip_loss, single), gradients(open_clip.ClipLoss(), single)
    for got, other, expected in zip(ours, theirs, exact, strict=True):
        assert (got - expected).norm() <= 1.5 * (other - expected).norm()


def gradients(loss: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    leaves = [value.clone().requires_grad_() for value in inputs]
    value = loss(*leaves)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


@pytest.mark.parametrize("positives", [OwnPair(), EqualPairs, MaskedEqualPairs])
def test_gradcheck_of_the_softmax_loss(positives: Any) -> None:
    x, y, scale, _, hashes = batch(5)
    positives = positives if isinstance(positives, OwnPair) else positives(hashes)
    inputs = [value.requires_grad_() for value in (x, y, scale)]
    assert torch.autograd.gradcheck(lambda *each: 3 * tiled_clip_loss(*each, positives, tile_rows=2).exp(), inputs)


def test_gradcheck_of_the_sigmoid_loss() -> None:
    inputs = [value.requires_grad_() for value in batch(5)[:4]]
    assert torch.autograd.gradcheck(lambda *each: 3 * tiled_siglip_loss(*each, tile_rows=2).exp(), inputs)


def test_gradients_have_the_shapes_and_types_of_the_inputs() -> None:
    """A bf16 model whose scale and bias have shape [1], as open_clip builds on request, under autocast."""
    inputs = [value.bfloat16() for value in batch(9)[:4]]
    inputs = [value.reshape(-1) if value.ndim == 0 else value for value in inputs]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = gradients(tiled_siglip_loss, inputs)
    expected = reference(dense_siglip, [*(value.double() for value in inputs), torch.arange(9)])
    assert got[0].dtype == torch.float32 and got[0].item() == pytest.approx(expected[0].item(), rel=rounding(9 * 9))
    for each, value, exact in zip(got[1:], inputs, expected[1:], strict=True):
        assert each.shape == value.shape and each.dtype == value.dtype
        torch.testing.assert_close(
            each.double(), exact, rtol=torch.finfo(torch.bfloat16).eps, atol=of_float32_logits(10)
        )


@pytest.mark.parametrize("num_processes", [1, 2, 3])
@pytest.mark.parametrize(("compute", "num_gathers"), [(clip, 2), (equal, 3), (masked, 3), (siglip, 1)])
def test_number_of_gathers(compute: Compute, num_processes: int, num_gathers: int) -> None:
    assert shares_of(compute, batch(6), num_processes, 2)[1] == (num_gathers if num_processes > 1 else 0)


class Watch(TorchDispatchMode):
    """Notes the numbers in the largest tensor that an operation returns, and the operations in matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.largest, self.operations = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in tree_leaves(result):
            if isinstance(each, Tensor):
                self.largest = max(self.largest, each.numel(), each.untyped_storage().nbytes() // each.itemsize)
        if func.overloadpacket.__name__ in ("mm", "addmm_", "addmm"):
            left, right = args[-2:]
            self.operations += 2 * left.shape[0] * left.shape[1] * right.shape[1]
        return result


@pytest.mark.parametrize("num_processes", [1, 3])
@pytest.mark.parametrize("compute", [clip, equal, masked, siglip])
def test_no_tensor_of_the_size_of_all_logits(compute: Compute, num_processes: int) -> None:
    given = batch(96, width=4)
    with Watch() as watch:
        shares_of(compute, given, num_processes, 16)
    assert watch.largest <= 2 * max(16 * 16, 96 * 4)
    with Watch() as dense_watch:
        dense_clip(*given)
    assert dense_watch.largest >= 96 * 96


@pytest.mark.parametrize(("num_pairs", "dtype"), [(3072, torch.float32), (2048, torch.float64)])
def test_tiles_keep_to_their_bytes_by_default(num_pairs: int, dtype: torch.dtype) -> None:
    x, y = torch.nn.functional.normalize(torch.randn(2, num_pairs, 4, dtype=dtype), dim=-1)
    with Watch() as watch:
        tiled_clip_loss(x, y, torch.tensor(10.0))
    assert watch.largest * x.element_size() <= TILE_BYTES and watch.largest < num_pairs**2


@pytest.mark.parametrize(("compute", "alone", "together"), [(clip, 8, 10), (siglip, 6, 8)])
@pytest.mark.parametrize("num_processes", [1, 3])
def test_operations_in_products(compute: Compute, alone: int, together: int, num_processes: int) -> None:
    operations = []

    def watched(*given: Any) -> Share:
        with Watch() as watch:
            share = compute(*given)
        operations.append(watch.operations)
        return share

    shares_of(watched, batch(12), num_processes, 5)
    own_pairs, pairs, width = 12 // num_processes, 12, 6
    assert set(operations) == {(alone if num_processes == 1 else together) * own_pairs * pairs * width}
