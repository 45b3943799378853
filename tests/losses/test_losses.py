"""Losses and their gradients against dense float64 references, and the recipes that must fail."""

from __future__ import annotations

import math
from collections.abc import Callable

import open_clip
import pytest
import torch
from open_clip.loss import SigLipLoss
from torch import Tensor

from accel_clip.config import LossConfig
from accel_clip.faults import ConfigError
from accel_clip.losses.base import LOSSES, Loss, build_loss, total
from accel_clip.losses.gradient import (
    LossGradient,
    global_loss_gradient,
    rows_surrogate,
    scalars_surrogate,
    warn_of_dense_logits,
)
from helpers.emulation import on_all


def dense_clip(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    logits = [[scale * (a * b).sum() for b in y] for a in x]
    rows = torch.stack([torch.stack(row) for row in logits])
    picked = torch.stack([rows[i, i] for i in range(len(rows))])
    return ((rows.exp().sum(1).log() - picked) + (rows.exp().sum(0).log() - picked)).mean() / 2


def dense_siglip(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    terms = [
        -torch.log(1 / (1 + torch.exp((-1 if i == j else 1) * (scale * (x[i] * y[j]).sum() + bias))))
        for i in range(len(x))
        for j in range(len(y))
    ]
    return torch.stack(terms).sum() / len(x)


def surrogate(num_processes: int, loss: Loss, mine: dict[str, Tensor], gradient: LossGradient) -> Tensor:
    rows = torch.arange(len(mine["image_features"]))
    return rows_surrogate(num_processes, rows, mine, gradient.by_row) + scalars_surrogate(loss, mine, gradient)


REFERENCES = {"clip": dense_clip, "siglip": dense_siglip, "coca": dense_clip}


def outputs(num_pairs: int, scale: float = 10.0) -> dict[str, Tensor]:
    torch.manual_seed(num_pairs)
    features = torch.nn.functional.normalize(torch.randn(2, num_pairs, 6, dtype=torch.float64), dim=-1)
    made = {"image_features": features[0], "text_features": features[1]}
    made |= {"logit_scale": torch.tensor(scale).double(), "logit_bias": torch.tensor(-2.0).double()}
    return {key: value.clone().requires_grad_() for key, value in made.items()}


@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize("num_pairs", [1, 2, 3, 8])
def test_losses_equal_a_dense_reference(name: str, num_pairs: int) -> None:
    given = outputs(num_pairs)
    got = total(build_loss(LossConfig(name))(given))
    expected = REFERENCES[name](*given.values())
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_every_registered_loss_has_a_reference() -> None:
    assert set(LOSSES.names()) == {*REFERENCES, "distill"}, "distill needs a teacher: its reference is in test_distill"


def ours(name: str) -> Loss:
    return build_loss(LossConfig(name))


def user_clip(image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Tensor:
    return dense_clip(image_features, text_features, logit_scale, logit_scale)


def user_siglip(image_features: Tensor, text_features: Tensor, logit_scale: Tensor, logit_bias: Tensor) -> Tensor:
    return dense_siglip(image_features, text_features, logit_scale, logit_bias)


def in_plain_autograd(name: str) -> Loss:
    """Return the dense reference as a user's loss, which takes the generic path."""
    return Loss(name, {"clip": user_clip, "siglip": user_siglip, "coca": user_clip}[name])


@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize("make", [ours, in_plain_autograd])
@pytest.mark.parametrize("num_processes", [1, 2, 3])
def test_shares_of_all_processes_add_up_to_the_gradient_of_the_global_batch(
    name: str, make: Callable[[str], Loss], num_processes: int
) -> None:
    whole = outputs(6)
    expected = torch.autograd.grad(REFERENCES[name](*whole.values()), list(whole.values()), allow_unused=True)
    gradients, value = averaged_gradients(make(name), whole, num_processes)
    torch.testing.assert_close(value, REFERENCES[name](*whole.values()).detach(), rtol=1e-12, atol=1e-12)
    for key, reference in zip(whole, expected, strict=True):
        dense = torch.zeros_like(whole[key]) if reference is None else reference
        torch.testing.assert_close(gradients[key], dense, rtol=1e-10, atol=1e-12, msg=key)


def averaged_gradients(
    loss: Loss, whole: dict[str, Tensor], num_processes: int, factor: Callable[[int], float] = lambda _: 1.0
) -> tuple[dict[str, Tensor], Tensor]:
    """Return what DDP would average the gradients of all processes to, features standing for towers, and the loss."""
    share = len(whole["image_features"]) // num_processes

    def rows_of(process: int) -> dict[str, Tensor]:
        own = slice(process * share, (process + 1) * share)
        return {key: value[own] if value.ndim else value for key, value in whole.items()}

    made, _ = on_all(num_processes, lambda process: global_loss_gradient(process, loss, rows_of(process.process_index)))
    summed = {key: torch.zeros_like(value) for key, value in whole.items()}
    for process, gradient in enumerate(made):
        scalar = factor(num_processes) * surrogate(num_processes, loss, rows_of(process), gradient)
        gradients = torch.autograd.grad(scalar, list(whole.values()), allow_unused=True)
        for key, slope in zip(whole, gradients, strict=True):
            if slope is not None:
                summed[key] += slope / num_processes
    return summed, torch.stack([total(gradient.terms) for gradient in made]).mean()


def test_without_the_factor_of_processes_the_towers_get_half_the_gradient() -> None:
    """The known wrong recipe must show in this comparison, else the comparison proves nothing."""
    whole = outputs(6)
    right, _ = averaged_gradients(build_loss(LossConfig("clip")), whole, 2)
    wrong, _ = averaged_gradients(build_loss(LossConfig("clip")), whole, 2, factor=lambda num: 1 / num)
    ratio = wrong["image_features"].norm() / right["image_features"].norm()
    assert ratio.item() == pytest.approx(0.5)


def test_local_negatives_alone_are_another_objective() -> None:
    whole = outputs(6)
    loss = build_loss(LossConfig("clip"))
    halves = [{k: v[part] if v.ndim else v for k, v in whole.items()} for part in (slice(0, 3), slice(3, 6))]
    local = torch.autograd.grad((total(loss(halves[0])) + total(loss(halves[1]))) / 2, whole["image_features"])[0]
    right = averaged_gradients(loss, whole, 2)[0]["image_features"]
    assert torch.nn.functional.cosine_similarity(local.flatten(), right.flatten(), dim=0) < 0.99


@pytest.mark.parametrize("name", REFERENCES)
def test_losses_stay_finite_at_the_largest_scale_with_identical_features(name: str) -> None:
    given = outputs(8, scale=100.0)
    with torch.no_grad():
        for key in ("image_features", "text_features"):
            given[key].copy_(given[key][:1].expand(8, -1))
    single = {key: value.detach().float().requires_grad_() for key, value in given.items()}
    result = total(build_loss(LossConfig(name))(single))
    gradients = torch.autograd.grad(result, list(single.values()), allow_unused=True)
    assert result.isfinite() and all(each.isfinite().all() for each in gradients if each is not None)


@pytest.mark.parametrize(("name", "theirs"), [("clip", open_clip.ClipLoss()), ("siglip", SigLipLoss())])
def test_open_clip_agrees(name: str, theirs: torch.nn.Module) -> None:
    given = outputs(8)
    if name == "clip":
        reference = total(theirs(**{k: v for k, v in given.items() if k != "logit_bias"}, output_dict=True))
    else:
        reference = total(theirs(**given, output_dict=True))
    torch.testing.assert_close(total(build_loss(LossConfig(name))(given)), reference, rtol=1e-10, atol=0.0)


@pytest.mark.parametrize("name", ["ClipLoss", "CLIPLoss", "SigLipLoss"])
def test_other_spellings_are_accepted(name: str) -> None:
    assert build_loss(LossConfig(name)).requires_bias() == name.startswith("Sig")


def test_functions_get_their_options_bound_and_classes_are_built_with_them(own_entries: None) -> None:
    @LOSSES.register("test_margin")
    def margin(image_features: Tensor, text_features: Tensor, margin: float = 0.1) -> dict[str, Tensor]:
        gap = margin - (image_features * text_features).sum(1)
        return {"margin_loss": gap.relu().mean(), "similarity": -gap.detach().mean()}

    LOSSES.register("test_theirs")(open_clip.ClipLoss)
    terms = build_loss(LossConfig("test_margin", {"margin": 3.0}))(outputs(4))
    assert total(terms) == terms["margin_loss"] and terms["margin_loss"] > 2
    assert build_loss(LossConfig("test_theirs", {"cache_labels": True})).function.cache_labels is True
    with pytest.raises(ConfigError, match=r"loss\.options: the loss 'test_margin' has no option 'margn'"):
        build_loss(LossConfig("test_margin", {"margn": 1}))


def test_a_loss_without_a_loss_term_is_refused() -> None:
    with pytest.raises(ConfigError, match="ending in _loss"):
        Loss("odd", lambda **_: {"value": torch.tensor(1.0)})({"logit_scale": torch.tensor(math.e)})


def test_a_losss_own_parameters_get_their_gradient_once() -> None:
    class Weighted(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.tensor(2.0).double())

        def forward(self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> dict[str, Tensor]:
            return {"weighted_loss": self.weight**2 * ((image_features - text_features) ** 2).sum() * logit_scale}

    loss, whole = Loss("weighted", Weighted()), outputs(4)
    expected = torch.autograd.grad(total(loss(whole)), loss.function.weight)[0]

    def rows_of(process: int) -> dict[str, Tensor]:
        own = slice(2 * process, 2 * process + 2)
        return {key: value[own] if value.ndim else value for key, value in whole.items()}

    made, _ = on_all(2, lambda process: global_loss_gradient(process, loss, rows_of(process.process_index)))
    for process, gradient in enumerate(made):
        scalar = surrogate(2, loss, rows_of(process), gradient)
        torch.testing.assert_close(torch.autograd.grad(scalar, loss.function.weight)[0], expected)


@pytest.mark.parametrize("same", ["caption", "picture"])
@pytest.mark.parametrize("duplicates", ["positives", "masked"])
def test_equal_pairs_over_processes_are_positives_or_left_out(duplicates: str, same: str) -> None:
    whole = outputs(6)
    groups = torch.tensor([0, 1, 0, 2, 1, 0])
    loss = build_loss(LossConfig("clip", {"duplicates": duplicates, "same": same}))
    equal = groups[:, None] == groups
    other = equal & ~torch.eye(6, dtype=torch.bool)
    logits = whole["logit_scale"] * whole["image_features"] @ whole["text_features"].T
    left_out = logits.masked_fill(other, -math.inf) if duplicates == "masked" else logits
    weights = equal.double() if duplicates == "positives" else torch.eye(6, dtype=torch.float64)
    targets = weights / weights.sum(1, keepdim=True)
    expected = sum(
        -(targets * (each.log_softmax(1)).masked_fill(targets == 0, 0)).sum(1).mean() / 2
        for each in (left_out, left_out.T)
    )

    def rows_of(process: int) -> dict[str, Tensor]:
        own = slice(3 * process, 3 * process + 3)
        mine = {key: value[own] if value.ndim else value for key, value in whole.items()}
        return {**mine, f"{same}_hash": groups[own]}

    made, num_gathers = on_all(2, lambda process: global_loss_gradient(process, loss, rows_of(process.process_index)))
    slopes = torch.cat([gradient.by_row["image_features"] for gradient in made])
    torch.testing.assert_close(
        slopes, torch.autograd.grad(expected, whole["image_features"])[0], rtol=1e-10, atol=1e-12
    )
    assert num_gathers == 3


def test_what_all_logits_cost_is_said_before_it_hurts(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("clip", "siglip", "coca"):
        warn_of_dense_logits(ours(name), 100_000, 512)
    warn_of_dense_logits(in_plain_autograd("clip"), 1024, 512)
    assert "warning" not in capsys.readouterr().err
    warn_of_dense_logits(in_plain_autograd("clip"), 16384, 512)
    said = capsys.readouterr().err
    assert "16384 x 16384 logits" in said and "4.0 GiB" in said and "1.6e+12 operations" in said
