"""Several sources in every batch by their weights, and draws with replacement: quotas, epochs, chance and counts."""

from __future__ import annotations

import json
import math
import random
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image

from accel_clip import Config, cli, train
from accel_clip.command_line import load_config, parse_config, save_config
from accel_clip.config import (
    CheckpointConfig,
    DataConfig,
    LossConfig,
    OptimConfig,
    SourceConfig,
    TrainConfig,
)
from accel_clip.data import order as order_module
from accel_clip.data.bad_samples import UnusableSample
from accel_clip.data.examples import Preparation
from accel_clip.data.loader import BatchPlaces, TrainingPairs, iterate
from accel_clip.data.mixture import Mixture, describe_batch, interleaved, order_of, pairs_in_batch, quotas
from accel_clip.data.order import BatchOrder, Draws, Order, permutation
from accel_clip.data.pairs import open_training
from accel_clip.data.sources.base import Pair
from accel_clip.data.sources.combine import Concatenated, count_by_source, source_names
from accel_clip.faults import ConfigError
from accel_clip.losses.base import LOSSES
from helpers.commands import CPU_2, launch
from helpers.comparison import ADDITIONS_OF_A_STEP, rounding
from helpers.models import small_model
from helpers.runs import in_a_process, points_of, short_config
from helpers.stand_ins import NoNumberAtFifth


class Numbered:
    """Pairs whose caption is the source's name and the sample; those in `unusable` are not usable."""

    def __init__(self, name: str, length: int, unusable: Sequence[int] = ()) -> None:
        self.name, self.length, self.unusable = name, length, frozenset(unusable)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Pair:
        if index in self.unusable:
            raise UnusableSample("unreadable", "planted")
        return Pair(Image.new("RGB", (8, 8)), (f"{self.name} {index} a", f"{self.name} {index} b"))

    def key(self, index: int) -> str:
        return f"{self.name} {index}"


def concatenated(*lengths: int) -> Concatenated:
    return Concatenated([Numbered(f"source{number}", length) for number, length in enumerate(lengths)])


def samples_of(order: BatchOrder, num_batches: int, num_processes: int = 1, start: int = 0) -> list[list[int]]:
    """Return each contrastive batch as its samples, put together from the parts of all processes."""
    return [
        [
            next(iter(order.candidates(place)))
            for process in range(num_processes)
            for place in order.places(batch, process, num_processes)
        ]
        for batch in range(start, start + num_batches)
    ]


def chi_square(counts: Sequence[int]) -> float:
    """Return how many standard deviations the chi-square statistic of equally likely outcomes is from its mean."""
    expected, freedom = sum(counts) / len(counts), len(counts) - 1
    statistic = sum((count - expected) ** 2 / expected for count in counts)
    return (statistic - freedom) / math.sqrt(2 * freedom)


MIXTURES = [
    ([100, 40], [3.0, 1.0], 16),
    ([57, 301, 13], [1.0, 1.0, 0.5], 20),
    ([1000, 9], [1.0, 0.01], 64),
    ([50, 50, 50, 50], [0.1, 0.2, 0.3, 0.4], 24),
    ([12, 999], [1.0, 1.0], 24),
]


@pytest.mark.parametrize(("lengths", "weights", "batch_size"), MIXTURES)
@pytest.mark.parametrize("replacement", [False, True])
def test_every_batch_holds_the_quota_of_each_source_for_any_number_of_processes(
    lengths: list[int], weights: list[float], batch_size: int, replacement: bool
) -> None:
    source = concatenated(*lengths)
    order = order_of(source, weights, batch_size, 7, replacement)
    expected = quotas(weights, batch_size)
    assert (order.num_samples, order.batch_size) == (sum(lengths), batch_size)
    assert order.batches_per_epoch == sum(lengths) // batch_size
    batches = samples_of(order, 60)
    for processes in (2, 4):
        assert samples_of(order, 60, processes) == batches
        for process in range(processes):
            own = Counter(place.part for place in order.places(5, process, processes))
            for part, quota in enumerate(expected):
                assert abs(own[part] - quota / processes) < 2, (own, expected)
    for batch in batches:
        assert len(set(batch)) == batch_size
        assert list(count_by_source(source, numpy.array(batch)).values()) == expected
    assert samples_of(order, 3, start=41) == batches[41:44]  # a batch needs none of those before it


@pytest.mark.parametrize(("lengths", "weights", "batch_size"), MIXTURES)
def test_each_source_shows_every_sample_once_in_an_epoch_of_its_own(
    lengths: list[int], weights: list[float], batch_size: int
) -> None:
    order = order_of(concatenated(*lengths), weights, batch_size, 3, replacement=False)
    starts = [sum(lengths[:number]) for number in range(len(lengths))]
    orders = set()
    for part, quota in enumerate(quotas(weights, batch_size)):
        batches_per_epoch = lengths[part] // quota
        own = range(starts[part], starts[part] + lengths[part])
        for epoch in range(3):
            batches = samples_of(order, batches_per_epoch, start=epoch * batches_per_epoch)
            seen = [sample for batch in batches for sample in batch if sample in own]
            assert len(seen) == len(set(seen)) == quota * batches_per_epoch > lengths[part] - quota
            orders.add(tuple(sample - own[0] for sample in seen))
            places = order.places(epoch * batches_per_epoch, 0, 1)
            assert {place.epoch for place in places if place.part == part} == {epoch}
    assert len(orders) == 3 * len(lengths)  # every source and every epoch is shuffled alone


def test_each_epoch_of_each_source_is_shuffled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mixture stands in an epoch of every source at once; making an order of 100 million samples takes seconds."""
    made: Counter[tuple[int, int]] = Counter()

    def counted(seed: int, epoch: int, num_samples: int) -> numpy.ndarray:
        made[num_samples, epoch] += 1
        return permutation(seed, epoch, num_samples)

    monkeypatch.setattr(order_module, "permutation", counted)
    order = order_of(concatenated(40, 41, 42, 43, 44, 90), [1, 1, 1, 1, 1, 1], 60, 0, replacement=False)
    samples_of(order, 9)
    expected = [(length, epoch) for length in range(40, 45) for epoch in range(3)] + [(90, 0)]
    assert made == Counter(expected)


def test_a_part_of_a_mixture_is_the_order_of_its_source_alone_and_other_seeds_differ() -> None:
    mixture = order_of(concatenated(30, 500), [1, 3], 16, 11, replacement=False)
    assert isinstance(mixture, Mixture)
    other_sizes = order_of(concatenated(30, 900), [1, 3], 16, 11, replacement=False)
    first = [[sample for sample in batch if sample < 30] for batch in samples_of(mixture, 20)]
    assert first == [[sample for sample in batch if sample < 30] for batch in samples_of(other_sizes, 20)]
    assert samples_of(mixture, 5) != samples_of(order_of(concatenated(30, 500), [1, 3], 16, 12, False), 5)


@pytest.mark.parametrize("replacement", [False, True])
def test_without_weights_the_sources_are_one(replacement: bool) -> None:
    order = order_of(concatenated(20, 30), None, 8, 5, replacement)
    assert order == (Draws if replacement else Order)(50, 8, 5)


def test_quotas_are_the_shares_to_within_one_pair_and_sum_up() -> None:
    assert quotas([3, 1], 256) == [192, 64]
    assert quotas([1, 1], 5) == [3, 2]
    assert quotas([0.7, 0.1, 0.2], 10) == [7, 1, 2]
    assert quotas([0.1, 0.7, 0.2], 12) == [1, 9, 2]  # 1.2, 8.4 and 2.4 as written; in binary 2.4 is a little more
    assert quotas([3, 1], 64, multiple=8) == [48, 16]
    assert quotas([0.45, 0.45, 0.1], 10) == [5, 4, 1]
    chance = random.Random(0)
    for _ in range(300):
        weights = [round(chance.uniform(0.01, 5), chance.randrange(1, 4)) + 0.01 for _ in range(chance.randrange(1, 7))]
        multiple, units = chance.choice([1, 2, 3, 8]), chance.randrange(1, 200)
        held = quotas(weights, multiple * units, multiple)
        assert sum(held) == multiple * units and all(number % multiple == 0 for number in held)
        exact = [Fraction(repr(weight)) for weight in weights]
        shares = [each * units / sum(exact) for each in exact]
        up = [number // multiple - math.floor(share) for number, share in zip(held, shares, strict=True)]
        assert set(up) <= {0, 1}
        remainders = [share - math.floor(share) for share in shares]
        up_ones = [r for r, one in zip(remainders, up, strict=True) if one]
        down_ones = [r for r, one in zip(remainders, up, strict=True) if not one]
        assert not up_ones or not down_ones or min(up_ones) >= max(down_ones)


def test_slots_interleave_the_sources() -> None:
    assert [part for part, _ in interleaved([4, 4])] == [0, 1] * 4
    assert [part for part, _ in interleaved([6, 2])] == [0, 0, 1, 0, 0, 0, 1, 0]
    slots = interleaved([5, 3, 1])
    assert sorted(slots) == [(part, number) for part, quota in enumerate([5, 3, 1]) for number in range(quota)]


# With replacement


@pytest.mark.parametrize(("num_samples", "batch_size"), [(2, 1), (5, 2), (10, 10), (37, 8), (1000, 250)])
def test_a_batch_is_the_beginning_of_a_permutation_and_its_slots_share_the_rest(
    num_samples: int, batch_size: int
) -> None:
    draws = Draws(num_samples, batch_size, seed=4)
    for batch in range(5):
        found = [list(draws.candidates(place)) for place in draws.places(batch, 0, 1)]
        assert len(found) == batch_size
        assert sorted(sample for slot in found for sample in slot) == list(range(num_samples))


def test_draws_are_uniform_and_independent_of_slot_and_of_the_batch_before() -> None:
    """Chi-square statistics within three standard deviations, with a seed that is fixed."""
    num_samples, batch_size, num_batches = 30, 6, 5000
    batches = samples_of(Draws(num_samples, batch_size, seed=1), num_batches)
    drawn = Counter(sample for batch in batches for sample in batch)
    assert abs(chi_square([drawn[sample] for sample in range(num_samples)])) < 3
    by_slot = Counter((slot, sample) for batch in batches for slot, sample in enumerate(batch))
    for slot in range(batch_size):
        assert abs(chi_square([by_slot[slot, sample] for sample in range(num_samples)])) < 3
    pairs = Counter((batch[0], batch[1]) for batch in batches)
    different = [(a, b) for a in range(num_samples) for b in range(num_samples) if a != b]
    assert abs(chi_square([pairs[pair] for pair in different])) < 3
    following = Counter((a[0], b[0]) for a, b in pairwise(batches))
    assert abs(chi_square([following[a, b] for a in range(num_samples) for b in range(num_samples)])) < 3
    shared = [len(set(a) & set(b)) for a, b in pairwise(batches)]
    # Hypergeometric: 6 of 30, twice.
    mean, variance = 6 * 6 / 30, 6 * 0.2 * 0.8 * (24 / 29)
    assert abs(sum(shared) / len(shared) - mean) < 3 * math.sqrt(variance / len(shared))


def test_an_order_of_all_samples_is_each_as_often_as_another() -> None:
    orders = Counter(tuple(samples_of(Draws(4, 4, seed), 1)[0]) for seed in range(6000))
    assert len(orders) == 24 and abs(chi_square(list(orders.values()))) < 3


def test_drawing_costs_no_memory_for_samples_that_are_not_drawn() -> None:
    draws = Draws(10**12, 4096, seed=0)  # an array of it would take 8 TB
    (batch,) = samples_of(draws, 1, start=123_456)
    assert len(set(batch)) == 4096
    assert abs(chi_square(numpy.histogram(batch, bins=16, range=(0, 10**12))[0].tolist())) < 3
    mixture = Mixture((draws, Draws(10**11, 10, 1)))
    assert max(samples_of(mixture, 1)[0]) < 11 * 10**11


# Through the loader


def constant_tokens(texts: list[str]) -> torch.Tensor:
    return torch.zeros(len(texts), 4, dtype=torch.int64)


def batches_of(source: Any, order: BatchOrder, num_batches: int, workers: int = 0) -> list[Any]:
    pairs = TrainingPairs(source, order, Preparation(constant_tokens, (8, 8), 1e6, 3))
    places = BatchPlaces(order, range(num_batches), 0, 1)
    return list(iterate(pairs, places, DataConfig(), workers, pin_memory=False))


@pytest.mark.parametrize("replacement", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
def test_unusable_samples_are_replaced_by_others_of_their_source_and_none_twice(
    replacement: bool, workers: int
) -> None:
    unusable = range(0, 30, 3)
    source = Concatenated([Numbered("a", 40, unusable), Numbered("b", 90, unusable)])
    order = order_of(source, [1, 2], 12, 2, replacement)
    met = set()
    for batch in batches_of(source, order, 30, workers):
        samples = batch.sample.tolist()
        assert len(set(samples)) == 12
        assert count_by_source(source, batch.sample.numpy()) == {"a": 4, "b": 8}
        assert not [sample for sample in samples if (sample if sample < 40 else sample - 40) in unusable]
        met |= {(bad.source, bad.sample) for bad in batch.bad_samples}
    assert met == {(name, sample) for name in "ab" for sample in unusable}


def test_captions_change_between_two_draws_of_a_sample_and_between_epochs_of_its_source() -> None:
    source = Concatenated([Numbered("a", 4), Numbered("b", 400)])
    for replacement in (False, True):
        order = order_of(source, [1, 1], 8, 2, replacement)
        captions: dict[int, set[int]] = {}
        for batch in batches_of(source, order, 12):
            for sample, caption in zip(batch.sample.tolist(), batch.caption_hash.tolist(), strict=True):
                captions.setdefault(sample, set()).add(caption)
        assert all(len(captions[sample]) == 2 for sample in range(4))  # 12 draws of two captions


# Settings


@pytest.mark.parametrize(
    ("lengths", "weights", "batch_size", "message"),
    [
        (
            [100, 100],
            [3, 0.001],
            64,
            r"data\.train: source1 has weight 0\.001 of 3\.001, and a batch of 64 pairs holds none of it: make "
            r"train\.batch_size 3001 or more, or its weight 0\.048 or more, or leave the source out",
        ),
        (
            [9, 9, 9],
            [1, 1, 1],
            2,
            "data.train: source2 has weight 1 of 3, .* train.batch_size 3 or more, or leave the source out",
        ),
        (
            [500, 20],
            [1, 1],
            64,
            r"data\.train: source1 has 20 samples to train on, and by its weight 1 of 2 a batch of 64 pairs takes 32 "
            r"different ones: lower its weight to 0\.45 or less, make train\.batch_size 40 or less, add data, or leave",
        ),
        ([500, 0], [1, 1], 64, "data.train: source1 has 0 samples .* different ones: add data, or leave the source"),
        ([50, 50], None, 128, "train.batch_size: 128 does not work: the training data holds 100 samples"),
    ],
)
@pytest.mark.parametrize("replacement", [False, True])
def test_batches_that_cannot_be_filled_are_refused_with_ways_out_that_work(
    lengths: list[int], weights: list[float] | None, batch_size: int, message: str, replacement: bool
) -> None:
    with pytest.raises(ConfigError, match=message):
        order_of(concatenated(*lengths), weights, batch_size, 0, replacement)


def test_the_ways_out_work() -> None:
    assert order_of(concatenated(100, 100), [3, 0.048], 64, 0, False) and quotas([3, 0.001], 3001) == [3000, 1]
    assert order_of(concatenated(500, 20), [1, 0.45], 64, 0, False)
    assert order_of(concatenated(500, 20), [1, 1], 40, 0, False)


@pytest.mark.parametrize(
    ("setting", "items", "message"),
    [
        ("train", [{"source": "a.csv", "weight": 0}], r"data\.train: weight of a\.csv: 0\S* does not work: .* above 0"),
        ("train", [{"source": "a.csv", "weight": -1}], r"data\.train: weight of a\.csv: -1\S* does not work"),
        ("val", [{"source": "a.csv", "weight": 2}], r"data\.val: weight of a\.csv: 2\S* .* data\.train alone"),
    ],
)
def test_weights_that_mean_nothing_are_refused(setting: str, items: list[Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config([f"--data.{setting}", json.dumps(items)], "train.py", "")
    with pytest.raises(ConfigError, match=message):
        DataConfig(**{setting: [SourceConfig(**each) for each in items]})


def test_weights_come_from_the_command_line_and_survive_the_saved_settings(tmp_path: Path) -> None:
    config = parse_config(
        ["--data.train", "[{source: a.csv, weight: 3}, b.csv]", "--data.replacement", "true"], "x", ""
    )
    assert config.data.source_weights == [3.0, 1.0] and config.data.replacement
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    assert DataConfig(train=["a.csv", "b.csv"]).source_weights is None
    assert DataConfig(train=[SourceConfig("a.csv", weight=2)]).source_weights is None


def test_sources_of_one_name_are_told_apart_and_a_batch_is_described() -> None:
    source = Concatenated([Numbered("photos.csv", 90), Numbered("clipart", 20), Numbered("photos.csv", 10)])
    assert source_names(source) == ["photos.csv", "clipart", "photos.csv (2)"]
    mixed = order_of(source, [2, 1, 1], 16, 0, False)
    expected = "a batch holds 8 pairs of photos.csv, 4 of clipart and 4 of photos.csv (2)"
    assert describe_batch(source, mixed) == expected
    as_one = order_of(source, None, 16, 0, False)
    assert pairs_in_batch(source, as_one) == {
        "photos.csv": 12.0,
        "clipart": pytest.approx(8 / 3),
        "photos.csv (2)": 4 / 3,
    }
    assert describe_batch(source, as_one) == (
        "a batch holds on average 12 pairs of photos.csv, 2.7 of clipart and 1.3 of photos.csv (2)"
    )
    assert describe_batch(source.sources[0], Order(90, 8, 0)) is None


# Whole runs


@pytest.fixture
def tables(tmp_path: Path) -> Path:
    """Write two tables of small pictures, of 40 and 15 rows; one row in each has no caption."""
    generator = numpy.random.default_rng(0)
    for name, number in (("photos", 40), ("clipart", 15)):
        rows = ["image,caption"]
        for row in range(number):
            pixels = generator.integers(0, 255, (40, 36, 3)).astype(numpy.uint8)
            Image.fromarray(pixels).save(tmp_path / f"{name}{row}.png")
            rows.append(f"{name}{row}.png,{'' if row == 3 else f'{name} number {row}'}")
        (tmp_path / f"{name}.csv").write_text("\n".join(rows))
    small_model(tmp_path)
    return tmp_path


def config_for(tables: Path, output: str, weights: Sequence[float | None] = (3, 1), **sections: Any) -> Config:
    """Return settings of a run over both tables, named relative to their folder."""
    files = [str(tables / f"{name}.csv") for name in ("photos", "clipart")]
    items = [SourceConfig(file, weight=weight) for file, weight in zip(files, weights, strict=True)]
    usual = {
        "data": DataConfig(train=list(items), val_fraction=0.2, workers=0, max_bad_fraction=0.5),
        "optim": OptimConfig(lr=1e-3, warmup=0),
        "checkpoint": CheckpointConfig(every=2),
    }
    return short_config(tables / output, "", str(tables / "small.json"), 9, **{**usual, **sections})


def counts_of(config: Config) -> list[tuple[int, int, int]]:
    """Return (pairs of photos, pairs of clipart, all pairs) of each training point."""
    points = [point for point in points_of(config) if "loss" in point or "lr" in point]
    photos, clipart = (f"pairs/{Path(config.output_dir).parent / name}.csv" for name in ("photos", "clipart"))
    return [(point[photos], point[clipart], point["samples"]) for point in points]


@pytest.mark.slow
@pytest.mark.parametrize("replacement", [False, True])
def test_a_run_counts_the_pairs_of_each_source_exactly_over_a_kill(
    tables: Path, replacement: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    whole, killed = (config_for(tables, name) for name in ("whole", "killed"))
    whole, killed = (replace(each, data=replace(each.data, replacement=replacement)) for each in (whole, killed))
    assert in_a_process(lambda: train(whole)) == 0
    said = capfd.readouterr().err
    assert f"a batch holds 6 pairs of {tables / 'photos.csv'} and 2 of {tables / 'clipart.csv'}" in said
    assert counts_of(whole) == [(6 * step, 2 * step, 8 * step) for step in range(1, 10)]
    assert in_a_process(lambda: train(killed), ACCEL_CLIP_FAULT="step:5") == 9
    assert in_a_process(lambda: train(killed)) == 0
    assert counts_of(killed) == counts_of(whole)
    weights = [Path(each.output_dir) / "export" / "open_clip_model.safetensors" for each in (whole, killed)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    other = replace(killed, data=replace(killed.data, replacement=not replacement))
    with pytest.raises(ConfigError, match=r"data\.replacement: .* holds a run with"):
        train(other)
    with pytest.raises(ConfigError, match=r"data\.train: .* holds a run with"):
        train(replace(killed, data=replace(killed.data, train=["demo"])))


def test_sources_without_weights_are_counted_too_and_accumulated_batches_add_up(tables: Path) -> None:
    config = config_for(tables, "run", (None, None), train=TrainConfig(batch_size=8, steps=6, threads=1, accumulate=2))
    config = replace(config, data=replace(config.data, val_fraction=0))
    train(config)
    counts = counts_of(config)
    assert [photos + clipart for photos, clipart, _ in counts] == [every for *_, every in counts]
    assert counts[2][2] == 48 and counts[2][0] in range(48 - 15, 41)  # an epoch of 6 batches: all but 7 pairs, once
    assert [every for *_, every in counts] == [16 * step for step in range(1, 7)]


def test_counts_go_on_past_the_batches_that_a_rollback_leaves(tables: Path, own_entries: None) -> None:
    LOSSES.register("no number")(NoNumberAtFifth)
    settings = TrainConfig(batch_size=8, steps=6, threads=1, non_finite="rollback")
    config = config_for(tables, "run", train=settings, loss=LossConfig("no number"))
    train(config)
    counts = counts_of(config)
    assert [every // 8 for *_, every in counts] == [1, 2, 5, 6, 7, 8]
    assert [(photos, clipart) for photos, clipart, _ in counts] == [(6 * k, 2 * k) for k in (1, 2, 5, 6, 7, 8)]


def test_the_held_out_part_leaves_sources_and_weights_aligned(tables: Path) -> None:
    config = config_for(tables, "run")
    found = open_training(config.data)
    pairs, held_out = found.source, found.held_out
    assert isinstance(pairs, Concatenated) and held_out is not None
    assert source_names(pairs) == [str(tables / "photos.csv"), str(tables / "clipart.csv")]
    assert len(pairs) + len(held_out) == 55 and len(pairs.sources[0]) < 40
    order = order_of(pairs, config.data.source_weights, 8, 0, False)
    captions = [pairs[sample].captions for batch in samples_of(order, 3) for sample in batch]
    assert Counter(words[0].split()[0] if words else "none" for words in captions)["photos"] in (17, 18)


def test_the_check_says_what_a_batch_holds(
    tables: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tables)
    items = "[{source: photos.csv, weight: 3}, clipart.csv]"
    words = ["--data.train", items, "--model.name", "small.json", "--seconds", "0", "--data.max_bad_fraction", "0.5"]

    def check(*more: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["accel-clip", "check", *words, *more])
        try:
            code = cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
        return code, capsys.readouterr().out

    code, out = check("--train.batch_size", "8", "--json")
    assert code == 0 and json.loads(out)["data"]["pairs_in_batch"] == {"photos.csv": 6, "clipart.csv": 2}
    _, out = check("--train.batch_size", "8")
    assert "6 of photos.csv" in out and "2 of clipart.csv" in out
    code, out = check("--train.batch_size", "54", "--data.val_fraction", "0")  # 41 of one, 13 of the other
    assert code == 2 and "data.train: photos.csv has 40 samples to train on" in out


@pytest.mark.slow
def test_two_processes_see_the_batches_of_one_and_count_them_together(tables: Path) -> None:
    words = [
        *("--data.train", "[{source: photos.csv, weight: 3}, clipart.csv]", "--model.name", "small.json"),
        *("--data.workers", "1", "--data.max_bad_fraction", "0.5", "--train.batch_size", "8", "--train.steps", "5"),
        *("--optim.warmup", "0", "--track.every", "1", "--track.to", "[]"),
    ]
    points = {}
    for processes, launcher in (("1", ("--num_processes", "1", "--cpu", "--num_machines", "1")), ("2", CPU_2)):
        done = launch(*words, "--output_dir", f"run{processes}", folder=tables, launcher=launcher)
        assert done.code == 0, done.err
        lines = (tables / f"run{processes}" / "metrics.jsonl").read_text().splitlines()
        points[processes] = [point for point in map(json.loads, lines) if "loss" in point]
        assert done.err.count("a batch holds 6 pairs of photos.csv and 2 of clipart.csv") == 1
    for one, two in zip(points["1"], points["2"], strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=rounding(5 * ADDITIONS_OF_A_STEP))
        assert (two["pairs/photos.csv"], two["pairs/clipart.csv"]) == (6 * two["step"], 2 * two["step"])
