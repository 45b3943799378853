"""Captions: which of several a pair is shown with, and which have more tokens than the model reads."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from accel_clip import Config, train
from accel_clip.config import (
    CheckpointConfig,
    LossConfig,
    OptimConfig,
)
from accel_clip.data.batch import joined_batch
from accel_clip.data.captions import choose_caption, is_caption_cut
from accel_clip.data.examples import Preparation, batch_of
from accel_clip.data.order import Order
from accel_clip.data.sources.base import Pair
from accel_clip.faults import NonFiniteError
from accel_clip.losses.base import LOSSES
from helpers.commands import CPU_2, launch
from helpers.models import small_model
from helpers.runs import points_of, short_config
from helpers.stand_ins import NoNumberAtFifth

CONTEXT, NUM_PAIRS, BATCH = 32, 40, 8  # five batches an epoch
NUM_WORDS = [5 + 7 * (number % 6) for number in range(NUM_PAIRS)]  # 5, 12, 19, 26, 33, 40; with two ends 32 fit
IS_CUT = [words + 2 > CONTEXT for words in NUM_WORDS]


# --- one of several


def test_without_weights_the_choice_is_the_one_that_runs_so_far_have_made() -> None:
    drawn = {
        number: [
            int(choose_caption(tuple("abcde"[:number]), 7, epoch, sample).translate(str.maketrans("abcde", "01234")))
            for epoch in range(3)
            for sample in (0, 1, 2, 10, 999_999)
        ]
        for number in (1, 2, 3, 5)
    }
    assert drawn == {
        1: [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        2: [0, 1, 0, 0, 0, 1, 1, 0, 0, 1, 1, 1, 0, 0, 1],
        3: [1, 0, 0, 1, 2, 2, 1, 2, 1, 1, 2, 0, 1, 2, 2],
        5: [3, 3, 2, 3, 0, 4, 4, 3, 3, 2, 1, 2, 0, 0, 3],
    }


@pytest.mark.parametrize("weights", [(1.0, 3.0), (0.2, 0.5, 0.3), (1e-3, 1.0), (5.0, 5.0), (4.0,)])
def test_captions_are_drawn_as_often_as_their_weights_say(weights: tuple[float, ...]) -> None:
    captions = tuple("abcde"[: len(weights)])
    num_draws = 8000
    drawn = Counter(choose_caption(captions, 3, draw % 4, draw // 4, weights) for draw in range(num_draws))
    expected = {caption: num_draws * weight / sum(weights) for caption, weight in zip(captions, weights, strict=True)}
    chi_square = sum((drawn[caption] - number) ** 2 / number for caption, number in expected.items())
    assert chi_square < 14  # with two degrees of freedom 1 in 1,000 sets of draws is further off
    assert drawn.keys() <= set(captions)


def test_a_pair_is_shown_with_its_weights_anew_in_every_epoch_and_for_another_seed() -> None:
    pair = Pair(Image.new("RGB", (8, 8)), ("title", "alt"), weights=(1.0, 3.0))
    tokenizer = SimpleTokenizer()
    alt = tokenizer(["alt"])[0]

    def drawn(seed: int) -> list[bool]:
        preparation = Preparation(tokenizer, (8, 8), 1e6, seed)
        return [torch.equal(preparation.example(pair, "key", 5, epoch).tokens, alt) for epoch in range(200)]

    assert 120 < sum(drawn(0)) < 180
    assert drawn(0) == drawn(0) != drawn(1)


# --- captions that are too long


def words_of(number: int) -> str:
    return " ".join(["dog"] * number)


def saved_tokenizer(folder: Path, ends: bool = True, **special: str) -> str:
    """Write a tokenizer of words, each one token, to which two ends are added; [PAD] is 0 and the ends are 1 and 2."""
    words = {word: number for number, word in enumerate(("[PAD]", "[CLS]", "[SEP]", "[UNK]", "dog"))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if ends:
        single = "[CLS] $A [SEP]"
        tokenizer.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
        )
    kinds = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
    kinds |= {"bos_token": "[CLS]", "eos_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{**kinds, **special}).save_pretrained(folder)
    return str(folder)


KINDS: dict[str, tuple[int, Callable[[Path], Any]]] = {
    "open_clip": (2, lambda folder: SimpleTokenizer(context_length=CONTEXT)),
    "reduced": (2, lambda folder: SimpleTokenizer(context_length=CONTEXT, reduction_mask="simple")),
    "padding_0": (2, lambda folder: HFTokenizer(saved_tokenizer(folder), CONTEXT)),
    "padded_by_its_end": (2, lambda folder: HFTokenizer(saved_tokenizer(folder, pad_token="[SEP]"), CONTEXT)),
    "padded_on_the_left": (2, lambda folder: HFTokenizer(saved_tokenizer(folder, padding_side="left"), CONTEXT)),
    "no_ends": (0, lambda folder: HFTokenizer(saved_tokenizer(folder, ends=False), CONTEXT)),
    "ends_are_stripped": (2, lambda folder: HFTokenizer(saved_tokenizer(folder), CONTEXT, strip_sep_token=True)),
    "clips": (3, lambda folder: HFTokenizer(saved_tokenizer(folder), CONTEXT, tokenizer_mode="clips")),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_caption_is_cut_from_the_first_word_on_that_does_not_fit(kind: str, tmp_path: Path) -> None:
    num_own, build = KINDS[kind]
    tokenizer = build(tmp_path)
    for number in (1, *range(CONTEXT - 6, CONTEXT + 4), 3 * CONTEXT):
        caption = words_of(number)
        tokens = tokenizer([caption])[0]
        assert len(tokens) == CONTEXT
        assert is_caption_cut(caption, tokens, tokenizer) == (number + num_own > CONTEXT), number


def test_a_caption_whose_last_token_is_number_0_is_no_padding() -> None:
    tokenizer = SimpleTokenizer(context_length=CONTEXT)
    assert tokenizer.encode("!★")[0] == 0
    for number in range(CONTEXT - 6, CONTEXT + 1):
        caption = f"{words_of(number)} !★"
        tokens = tokenizer([caption])[0]
        num_tokens = number + len(tokenizer.encode("!★")) + 2
        assert is_caption_cut(caption, tokens, tokenizer) == (num_tokens > CONTEXT), number


def test_most_captions_are_tokenized_once() -> None:
    class Counting(SimpleTokenizer):
        calls = 0

        def encode(self, text: str) -> list[int]:
            Counting.calls += 1
            return super().encode(text)

    pair = Pair(Image.new("RGB", (8, 8)), (words_of(9),))
    preparation = Preparation(Counting(context_length=CONTEXT), (8, 8), 1e6, 0)
    examples = [preparation.example(pair, "key", 0, epoch) for epoch in range(5)]
    assert Counting.calls == 1 and not any(example.is_cut for example in examples)
    long = Pair(pair.image, (words_of(40),))
    examples += [preparation.example(long, "key", 0, epoch) for epoch in range(3)]
    assert Counting.calls == 3
    batch = batch_of(examples, [])
    assert batch.num_cut_captions == 3
    assert joined_batch([batch, batch_of(examples[:5], []), batch_of(examples[-1:], [])]).num_cut_captions == 4


# --- whole runs


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write 40 pictures with captions of 5 to 40 words, each word one token."""
    folder = tmp_path_factory.mktemp("pairs")
    rows = ["image,caption"]
    for number, words in enumerate(NUM_WORDS):
        Image.new("RGB", (32, 32), (6 * number, 90, 200)).save(folder / f"{number}.png")
        rows.append(f"{number}.png,{words_of(words)}")
    (folder / "pairs.csv").write_text("\n".join(rows), encoding="utf-8")
    small_model(folder)
    return folder / "pairs.csv"


def config_for(table: Path, output: Path, **sections: Any) -> Config:
    """Return settings of a run of eleven steps of 8 pairs, one epoch each five."""
    model = str(table.with_name("small.json"))
    return short_config(output, str(table), model, 11, **{"seed": 3, "optim": OptimConfig(lr=1e-3), **sections})


def counted_by_hand(num_batches: int) -> list[int]:
    """Return how many captions were cut by the end of each batch of the order."""
    order = Order(NUM_PAIRS, BATCH, 3)
    samples = [[next(order.candidates(place)) for place in order.places(k, 0, 1)] for k in range(num_batches)]
    return numpy.cumsum([sum(IS_CUT[sample] for sample in batch) for batch in samples]).tolist()


def counts_of(config: Config) -> list[tuple[int, int]]:
    return [(point["samples"] // BATCH, point["cut_captions"]) for point in points_of(config) if "loss" in point]


@pytest.mark.parametrize(("accumulate", "workers"), [(1, 2), (2, 0)])
def test_every_point_has_the_count_so_far_and_every_epoch_says_it(
    accumulate: int, workers: int, table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = counted_by_hand(22)
    config = config_for(table, tmp_path / "run")
    settings = replace(config.train, accumulate=accumulate)
    config = replace(config, train=settings, data=replace(config.data, workers=workers))
    train(config)
    assert counts_of(config) == [(accumulate * k, expected[accumulate * k - 1]) for k in range(1, 12)]
    said = [line for line in capsys.readouterr().err.splitlines() if "captions longer" in line]
    ends = {1: (5, 10, 11), 2: (6, 10, 16, 20, 22)}[accumulate]
    lines = [f"captions longer than 32 tokens: {expected[k - 1]} of {8 * k} pairs so far" for k in ends]
    assert [line.partition(";")[0].rpartition("accel-clip: ")[2] for line in said] == lines
    assert all(line.endswith("; only the first 32 are read") for line in said)


def test_nothing_is_said_where_no_caption_is_cut(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = table.with_name("short.csv")
    lines = table.read_text().splitlines()
    short.write_text("\n".join(line.replace(" dog" * 30, "") for line in lines))
    config = config_for(table, tmp_path / "run")
    train(replace(config, data=replace(config.data, train=[str(short)]), train=replace(config.train, steps=6)))
    assert "captions longer" not in capsys.readouterr().err
    assert {cut for _, cut in counts_of(config)} == {0}


def test_the_count_goes_on_where_a_run_was_stopped(table: Path, tmp_path: Path, own_entries: None) -> None:
    @LOSSES.register("test_stops")
    class Stops:
        calls = 0

        def __call__(self, image_features: torch.Tensor, text_features: torch.Tensor) -> torch.Tensor:
            Stops.calls += image_features.requires_grad
            loss = -(image_features * text_features).sum(dim=-1).mean()
            return loss * math.nan if Stops.calls == 8 else loss  # the first one is a trial

    config = config_for(table, tmp_path / "run", loss=LossConfig("test_stops"))
    config = replace(config, checkpoint=CheckpointConfig(every=4))
    with pytest.raises(NonFiniteError, match="step 7 is not finite"):
        train(config)
    train(config)
    assert counts_of(config) == list(enumerate(counted_by_hand(11), start=1))


def test_the_count_goes_on_past_the_batches_that_a_rollback_leaves(
    table: Path, tmp_path: Path, own_entries: None
) -> None:
    LOSSES.register("test_nan_once")(NoNumberAtFifth)
    config = config_for(table, tmp_path / "run", loss=LossConfig("test_nan_once"))
    config = replace(config, train=replace(config.train, non_finite="rollback"))
    train(replace(config, checkpoint=CheckpointConfig(every=2)))
    expected, batches = counted_by_hand(13), [1, 2, *range(5, 14)]
    assert counts_of(config) == [(k, expected[k - 1]) for k in batches]


@pytest.mark.slow
def test_two_processes_count_as_one(table: Path, tmp_path: Path) -> None:
    words = ["--data.train", str(table), "--data.val_fraction", "0", "--data.workers", "0", "--seed", "3"]
    words += ["--model.name", str(table.with_name("small.json")), "--train.batch_size", "8", "--train.steps", "6"]
    words += ["--track.to", "[]", "--track.every", "1", "--output_dir", str(tmp_path / "run")]
    done = launch(*words, folder=tmp_path, launcher=CPU_2)
    assert done.code == 0, done.err
    config = config_for(table, tmp_path / "run")
    assert counts_of(config) == list(enumerate(counted_by_hand(6), start=1))
