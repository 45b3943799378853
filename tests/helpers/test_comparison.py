"""The comparison itself: it takes another order of summation for equal, and every known wrong recipe for wrong."""

from __future__ import annotations

import ast
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from open_clip import CLIP, SimpleTokenizer
from torch import Tensor
from torch.nn import functional

from accel_clip.models import towers
from helpers.comparison import ADDITIONS_OF_A_STEP, assert_equal_to_rounding, rounding

NUM_PAIRS, CONTEXT = 12, 16
VISION = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8, "patch_dropout": 0.5}
TEXT = {"context_length": CONTEXT, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
TOKENIZER = SimpleTokenizer(context_length=CONTEXT)
Gradients = dict[str, Tensor]


def build(**text: Any) -> CLIP:
    torch.manual_seed(1)
    return CLIP(embed_dim=32, vision_cfg=VISION, text_cfg={**TEXT, **text})


def loss_of(scale: Tensor, images: Tensor, texts: Tensor) -> Tensor:
    logits, labels = scale * images @ texts.T, torch.arange(len(images))
    return (functional.cross_entropy(logits, labels) + functional.cross_entropy(logits.T, labels)) / 2


def gradients(clip: CLIP, parts: int = 1, seed: int = 5, scale: Callable[[Tensor], Tensor] = torch.exp) -> Gradients:
    """Return the gradients of the mean of the losses of so many parts of one batch."""
    generator = torch.Generator().manual_seed(2)
    pixels = torch.randn(NUM_PAIRS, 3, 32, 32, generator=generator).to(clip.logit_scale.dtype)
    tokens = TOKENIZER([f"{number} birds" for number in range(NUM_PAIRS)])
    torch.manual_seed(seed)
    images, texts = clip.encode_image(pixels, normalize=True), clip.encode_text(tokens, normalize=True)
    clip.zero_grad()
    pieces = zip(images.chunk(parts), texts.chunk(parts), strict=True)
    (sum(loss_of(scale(clip.logit_scale), *piece) for piece in pieces) / parts).backward()
    return {name: torch.zeros_like(each) if each.grad is None else each.grad for name, each in clip.named_parameters()}


@pytest.fixture(scope="module")
def clip() -> CLIP:
    return build()


@pytest.fixture(scope="module")
def references(clip: CLIP) -> tuple[Gradients, Gradients]:
    """Return the gradient in float32 and in float64."""
    return gradients(deepcopy(clip)), gradients(deepcopy(clip).double())


def halved_in_one_number(right: Gradients) -> Gradients:
    """Return a gradient in which one number is wrong: one as large as the numbers of its tensor typically are."""
    wrong = {name: each.clone() for name, each in right.items()}
    numbers = wrong["visual.proj"].flatten()
    numbers[numbers.abs().argsort()[len(numbers) // 2]] /= 2
    wrong["visual.proj"] = numbers.view_as(wrong["visual.proj"])
    return wrong


WRONG: dict[str, Callable[[CLIP, Gradients], Gradients]] = {
    "twice, for two processes": lambda clip, right: {name: 2 * each for name, each in right.items()},
    "a quarter, for four accumulated batches": lambda clip, right: {name: each / 4 for name, each in right.items()},
    "a mean of chunk means": lambda clip, right: gradients(clip, parts=3),
    "a logit scale that is detached": lambda clip, right: gradients(clip, scale=lambda each: each.detach().exp()),
    "a logit scale that counts twice": lambda clip, right: {**right, "logit_scale": 2 * right["logit_scale"]},
    "other random numbers": lambda clip, right: gradients(clip, seed=6),
    "one number": lambda clip, right: halved_in_one_number(right),
    "bfloat16": lambda clip, right: {name: each.bfloat16().float() for name, each in right.items()},
}


@pytest.mark.parametrize("recipe", WRONG)
def test_every_known_wrong_recipe_is_refused(clip: CLIP, references: tuple[Gradients, Gradients], recipe: str) -> None:
    single, exact = references
    with pytest.raises(AssertionError, match="is allowed for rounding"):
        assert_equal_to_rounding(WRONG[recipe](deepcopy(clip), single), single, exact)


@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_another_order_of_summation_is_equal(
    clip: CLIP, references: tuple[Gradients, Gradients], num_threads: int
) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        given = gradients(deepcopy(clip))
    finally:
        torch.set_num_threads(threads)
    assert_equal_to_rounding(given, *references)


def test_trimming_for_a_pooling_that_looks_further_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    clip, tokens = build(pool_type="last").eval(), TOKENIZER(["a frog", "two birds on one branch", ""])
    monkeypatch.setattr(towers, "ignores_what_follows", lambda tower: True)
    with torch.no_grad():
        single = clip.encode_text(tokens, normalize=True)
        exact = deepcopy(clip).double().encode_text(tokens, normalize=True)
        given = towers.encode_text(clip, towers.trimmed(tokens))
    with pytest.raises(AssertionError, match="is allowed for rounding"):
        assert_equal_to_rounding({"features": given}, {"features": single}, {"features": exact})


def guessed_tolerances(tree: ast.AST) -> list[int]:
    """Return the lines in which a comparison is given a number that only float32 could have asked for."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    given = [word.value for call in calls for word in call.keywords if word.arg in ("rtol", "atol", "rel", "abs")]
    return [
        each.lineno
        for each in given
        if isinstance(each, ast.Constant) and isinstance(each.value, float) and 1e-9 < each.value < 1e-2
    ]


def test_no_tolerance_is_guessed() -> None:
    assert guessed_tolerances(ast.parse("assert_close(a, b, rtol=1e-5)\nx == approx(y, abs=1e-12)\n")) == [1]
    files = sorted(Path(__file__).parents[1].rglob("*.py"))
    trees = {file.name: ast.parse(file.read_text(encoding="utf-8")) for file in files}
    guessed = {name: lines for name, tree in trees.items() if (lines := guessed_tolerances(tree))}
    assert not guessed, f"comparison.py derives them: {guessed}"


def test_a_number_that_the_reference_hits_by_chance_may_be_missed_by_rounding() -> None:
    exact = {"scale": torch.tensor(3.0).double(), "weights": torch.randn(100, dtype=torch.float64)}
    single = {name: each.float() for name, each in exact.items()}
    near = {**single, "scale": single["scale"] * (1 + 2 * torch.finfo(torch.float32).eps)}
    assert_equal_to_rounding(near, single, exact)
    with pytest.raises(AssertionError, match="scale"):
        assert_equal_to_rounding({**near, "scale": single["scale"] + 1e-4}, single, exact)


def test_sums_in_another_order_differ_by_no_more_than_their_bound_and_not_by_much_less() -> None:
    numbers = numpy.random.default_rng(0).random((200, ADDITIONS_OF_A_STEP), dtype=numpy.float32)
    one, other = (each.cumsum(axis=1, dtype=numpy.float32)[:, -1] for each in (numbers, numbers[:, ::-1]))
    difference = (abs(one - other) / numbers.sum(axis=1, dtype=numpy.float64)).max()
    assert rounding(ADDITIONS_OF_A_STEP) / 50 < difference < rounding(ADDITIONS_OF_A_STEP) < 1e-4
