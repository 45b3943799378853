"""Bad samples: each kind gets its reason, is replaced, counted and listed once, and too many of them stop the run."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from accel_clip.config import DataConfig
from accel_clip.data.bad_samples import (
    REASONS,
    WITHOUT_PICTURE,
    BadSample,
    BadSampleLog,
    UnusableSample,
    may_be_the_root,
    too_few_usable,
)
from accel_clip.data.batch import Batch
from accel_clip.data.captions import LARGEST_CAPTION_BYTES, choose_caption
from accel_clip.data.examples import Preparation
from accel_clip.data.loader import BatchPlaces, TrainingPairs, iterate
from accel_clip.data.order import Order
from accel_clip.data.sources.base import Pair, Source
from accel_clip.data.sources.resolve import open_source
from accel_clip.data.sources.shards import reader as shard_reader
from accel_clip.faults import DataError
from accel_clip.process.accelerator import forget_previous_accelerator
from helpers import nasty
from helpers.pictures import encoded, noise

CONTEXT, SIZE = 77, 32
MAX_PIXELS = 50e6
CONTRACT = {  # of bad_samples.jsonl
    *("unreadable", "too_large", "missing_file", "outside_root", "no_caption", "caption_encoding"),
    *("caption_too_large", "truncated_shard"),
}


@pytest.fixture(autouse=True)
def no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_reader, "WAITS_SECONDS", ())


@pytest.fixture(scope="module")
def accelerator() -> Iterator[Accelerator]:
    forget_previous_accelerator()
    yield Accelerator(cpu=True)
    forget_previous_accelerator()


@pytest.fixture(scope="module")
def tokenizer() -> Callable[[list[str]], Tensor]:
    import open_clip

    return open_clip.get_tokenizer("ViT-B-32")


def batches_of(source: Source, order: Order, num_batches: int, tokenizer: Callable[[list[str]], Tensor]) -> list[Batch]:
    """Return the first batches of a run."""
    pairs = TrainingPairs(source, order, Preparation(tokenizer, (SIZE, SIZE), MAX_PIXELS, order.seed))
    return list(iterate(pairs, BatchPlaces(order, range(num_batches), 0, 1), DataConfig(), 0, pin_memory=False))


# --- a bag of samples


@pytest.mark.parametrize("form", nasty.FORMS)
def test_every_kind_is_told_apart_replaced_and_listed(form, tmp_path, accelerator, tokenizer):
    num_written, batch_size = 63 if form == "shard" else 64, 8
    samples = nasty.held_by(form, num_written)
    expected = nasty.expected_counts(samples) | ({"truncated_shard": 1} if form == "shard" else {})
    source = open_source(nasty.write(form, samples, tmp_path), DataConfig())
    assert len(source) == 64
    log = BadSampleLog(tmp_path / "bad_samples.jsonl", max_bad_fraction=1.0)
    usable = []
    for batch in batches_of(source, Order(64, batch_size, seed=1), 64 // batch_size, tokenizer):
        log.take_in(batch.bad_samples, batch_size)
        log.collect(accelerator)
        usable += batch.sample.tolist()
        assert batch.image.shape == (batch_size, 3, SIZE, SIZE) and batch.image.dtype == torch.uint8
        assert len(set(batch.sample.tolist())) == batch_size
        assert (batch.tokens == 49407).any(1).all()  # a long caption is cut and keeps its end token
    assert dict(log.counts) == expected
    assert log.num_met == sum(expected.values())  # each once, however often it was met in search of another
    lines = [json.loads(line) for line in log.file.read_text(encoding="utf-8").splitlines()]
    assert Counter(line["reason"] for line in lines) == expected
    assert set(lines[0]) == {"source", "sample", "reason", "path", "detail", "epoch"}
    bad_ones = {line["sample"] for line in lines}
    assert not bad_ones & set(usable) and bad_ones | set(usable) == set(range(64))


def test_the_bag_is_large_and_knows_every_reason():
    outcomes = {sample.outcome for sample in nasty.bag()}
    assert len(nasty.bag()) >= 25
    assert outcomes | {"truncated_shard"} == CONTRACT | {nasty.FINE} and set(REASONS) >= CONTRACT


# --- replacing


class Listed:
    """Pairs by their number; what is wrong with some of them."""

    name = "listed"

    def __init__(self, num_pairs: int, bad: dict[int, str]) -> None:
        self.num_pairs, self.bad, self.num_fetched = num_pairs, bad, 0

    def __len__(self) -> int:
        return self.num_pairs

    def __getitem__(self, index: int) -> Pair:
        self.num_fetched += 1
        if index in self.bad:
            raise UnusableSample(self.bad[index], "why", f"{index}.png")
        return Pair(Image.new("RGB", (40, 40)), (f"number {index}",))

    def key(self, index: int) -> str:
        return str(index)


def constant_tokens(captions: list[str]) -> Tensor:
    return torch.ones(len(captions), CONTEXT, dtype=torch.int64)


def test_all_that_are_met_in_search_of_a_replacement_are_recorded_and_one_counts():
    order = Order(12, 2, seed=0)
    slot = [order.sample(0, position) for position in (2, 4, 6)]
    source = Listed(12, dict.fromkeys(slot, "unreadable"))
    first, second, third, fourth = batches_of(source, order, 4, constant_tokens)
    assert [bad.sample for bad in second.bad_samples] == slot
    assert [bad.its_turn for bad in second.bad_samples] == [True, False, False]
    assert [bad.sample for bad in third.bad_samples] == slot[1:]
    assert second.sample[0] == third.sample[0] == fourth.sample[0] == order.sample(0, 8)
    assert not first.bad_samples


def test_a_slot_without_usable_samples_is_an_error_with_the_reasons():
    source = Listed(12, dict.fromkeys(range(12), "unreadable"))
    with pytest.raises(DataError, match=r"position 0 of epoch 0: unreadable 6; the first is \d+\.png: why") as caught:
        batches_of(source, Order(12, 2, seed=0), 1, constant_tokens)
    assert "image_root" not in str(caught.value)


def test_a_wrong_root_is_asked_for_before_all_files_are_tried():
    source = Listed(100_000, dict.fromkeys(range(100_000), "missing_file"))
    with pytest.raises(DataError, match=r"missing_file 100.*is data\.image_root right"):
        batches_of(source, Order(100_000, 10, seed=0), 1, constant_tokens)
    assert source.num_fetched <= 10 * 100


def test_a_root_is_not_asked_for_where_pictures_are_in_shards_or_at_addresses():
    problems = [
        UnusableSample("missing_file", WITHOUT_PICTURE, "17"),
        UnusableSample("missing_file", WITHOUT_PICTURE, "/data/0000.tar/17"),
        UnusableSample("missing_file", "No such file or directory", "/data/0000.tar"),
        UnusableSample("missing_file", "5 attempts have failed", "https://x.invalid/0000.tar.gz"),
        UnusableSample("missing_file", "5 attempts have failed", "hf-stream:org/name, shard 3"),
    ]
    assert not any(map(may_be_the_root, problems))
    assert "image_root" not in str(too_few_usable("nothing", problems))
    tables = [
        UnusableSample("missing_file", "No such file", path) for path in ("a.png", "/data/a.tars/b.png", "C:/a.png")
    ]
    assert all(map(may_be_the_root, tables)) and "image_root" in str(too_few_usable("nothing", tables))


# --- counting


def bad(sample: int, reason: str = "unreadable", its_turn: bool = True, source: str = "a") -> BadSample:
    return BadSample(source, sample, reason, f"{sample}.png", "why", 0, its_turn)


@pytest.fixture
def log(tmp_path: Path) -> BadSampleLog:
    return BadSampleLog(tmp_path / "bad_samples.jsonl", 0.01)


def listed(log: BadSampleLog) -> list[tuple[str, int]]:
    lines = [json.loads(line) for line in log.file.read_text(encoding="utf-8").splitlines()]
    return [(line["source"], line["sample"]) for line in lines]


def test_a_sample_is_listed_once_by_source_even_within_one_step(log, accelerator):
    log.take_in((bad(1), bad(5, its_turn=False)), 8)
    log.take_in((bad(5), bad(1, source="b")), 8)
    log.collect(accelerator)
    log.take_in((bad(1),), 8)
    log.collect(accelerator)
    assert listed(log) == [("a", 1), ("a", 5), ("b", 1)]
    assert dict(log.counts) == {"unreadable": 3} and (log.num_met, log.num_seen) == (4, 24)


@pytest.mark.parametrize("num_seen, epoch_ended, stops", [(999, False, False), (1000, False, True), (500, True, True)])
def test_the_ceiling_is_looked_at_after_1000_samples_and_at_an_epochs_end(
    num_seen, epoch_ended, stops, log, accelerator
):
    log.take_in(tuple(bad(sample) for sample in range(11)), num_seen)
    log.collect(accelerator)
    if stops:
        with pytest.raises(DataError, match=rf"11 of {num_seen} .*unreadable 11.*max_bad_fraction = 0\.01.*jsonl"):
            log.check(epoch_ended)
    else:
        log.check(epoch_ended)


def test_exactly_the_ceiling_is_allowed_and_said_at_the_epochs_end(log, accelerator, capsys):
    log.take_in((*(bad(sample) for sample in range(9)), bad(9, "too_large"), bad(3, its_turn=False)), 1000)
    log.collect(accelerator)
    log.check(False)
    assert not capsys.readouterr().err
    log.check(True)
    assert "too_large 1, unreadable 9" in capsys.readouterr().err


@pytest.mark.parametrize("num_missing, stops", [(50, False), (51, True)])
def test_more_than_half_of_the_first_100_missing_asks_for_the_root(num_missing, stops, log, accelerator):
    for first in range(0, 100, 10):
        log.take_in(tuple(bad(n, "missing_file") for n in range(first, min(first + 10, num_missing))), 10)
        log.collect(accelerator)
        if first == 90 and stops:
            with pytest.raises(DataError, match=r"51 of the first 100 .*is data\.image_root right"):
                log.check(False)
        else:
            log.check(False)


def test_the_root_is_asked_for_at_the_start_only(log, accelerator):
    log.max_bad_fraction = 1.0
    log.take_in((), 100)
    log.check(False)
    log.take_in(tuple(bad(n, "missing_file") for n in range(200)), 200)
    log.collect(accelerator)
    log.check(True)


def test_a_log_that_goes_on_from_its_state_is_as_if_it_had_never_stopped(log, accelerator):
    log.max_bad_fraction = 1.0
    log.take_in((bad(1), bad(2, "missing_file")), 50)
    log.collect(accelerator)
    log.check(True)
    state, size = json.loads(json.dumps(log.state_dict())), log.file.stat().st_size
    later = (bad(2, "missing_file"), bad(3, "too_large"))
    log.take_in(later, 950)
    log.collect(accelerator)
    other = BadSampleLog(log.file, 1.0)
    other.load_state_dict(state)
    os.truncate(log.file, size)  # as the run folder does
    assert listed(other) == [("a", 1), ("a", 2)]
    other.take_in(later, 950)
    other.collect(accelerator)
    assert other.state_dict() == log.state_dict()
    assert listed(other) == [("a", 1), ("a", 2), ("a", 3)]


# --- captions


@pytest.mark.parametrize("caption, usable", [("x" * LARGEST_CAPTION_BYTES, True), ("é" * 32_769, False)])
def test_captions_above_the_limit_never_reach_a_tokenizer(caption, usable):
    if usable:
        assert choose_caption((caption,), 0, 0, 0) == caption
    else:
        with pytest.raises(UnusableSample) as caught:
            choose_caption(("short", caption), 0, 0, 0)
        assert caught.value.reason == "caption_too_large"


def test_caption_files_that_cannot_be_read_do_not_keep_a_folder_from_opening(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.png").write_bytes(encoded(noise()))
    (tmp_path / "a.txt").write_text("fine")
    (tmp_path / "b.txt").symlink_to("nothing.txt")
    (tmp_path / "c.txt").write_bytes(b"\xe9" * 200_000)
    source = open_source(str(tmp_path), DataConfig())
    assert source[0].captions == ("fine",)
    for index, reason in ((1, "no_caption"), (2, "caption_too_large")):
        with pytest.raises(UnusableSample) as caught:
            source[index]
        assert caught.value.reason == reason
