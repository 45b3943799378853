"""Evaluation: retrieval, zero-shot, validation loss and encoding, against references and over several processes.

Run as a script, this file is one process of the tests that need several.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from math import ceil
from pathlib import Path

import numpy
import open_clip
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator, InitProcessGroupKwargs
from open_clip.loss import SigLipLoss
from PIL import Image
from torch import Tensor

from accel_clip.config import EvalConfig, LossConfig
from accel_clip.data.bad_samples import UnusableSample
from accel_clip.data.sources.base import Pair
from accel_clip.evaluation.encode import encode_captions, encode_pictures
from accel_clip.evaluation.evaluator import Evaluator
from accel_clip.evaluation.picture_grid import GREEN, GREY, GridRow, retrieval_grid
from accel_clip.evaluation.retrieval import nearest_examples, ranks, retrieval_metrics
from accel_clip.evaluation.validation import fixed_order, read_held_out
from accel_clip.evaluation.zero_shot import accuracy, class_features, read_labelled
from accel_clip.faults import DataError
from accel_clip.losses import clip, siglip  # noqa: F401 - registers the losses
from accel_clip.losses.base import Loss, build_loss
from accel_clip.models.build import ClipModel
from accel_clip.process.accelerator import forget_previous_accelerator
from accel_clip.process.signals import StopAsked
from accel_clip.process.waiting import Lookout
from helpers.commands import ROOT
from helpers.comparison import ADDITIONS_OF_A_STEP, EPSILON, assert_equal_to_rounding, in_float64, rounding
from helpers.patience import HANG_SECONDS

NAME = "evaluation-tiny"
TINY = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
}
MAX_PIXELS = 1e6
COLOURS = ["red", "green", "blue", "yellow", "purple", "orange", "black"]


class ListSource:
    """Pairs from a list; `keys` says which of them show one picture."""

    name = "a list"

    def __init__(self, pairs: list[Pair], keys: list[str] | None = None) -> None:
        self.pairs = pairs
        self.keys = keys or [f"picture-{index}.png" for index in range(len(pairs))]

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Pair:
        return self.pairs[index]

    def key(self, index: int) -> str:
        return self.keys[index]


def tiny_model(folder: Path, **options: float) -> ClipModel:
    """Return the same small model in every process."""
    (folder / f"{NAME}.json").write_text(json.dumps(TINY))
    if NAME not in open_clip.list_models():
        open_clip.add_model_config(folder / f"{NAME}.json")
    torch.manual_seed(0)
    model = open_clip.create_model(NAME, output_dict=True, **options)
    return ClipModel(model, open_clip.get_tokenizer(NAME), TINY, dict(model.visual.preprocess_cfg))


def noise_picture(seed: int) -> Image.Image:
    """Return a picture of coloured noise."""
    pixels = numpy.random.default_rng(seed).integers(0, 256, (40, 30 + seed % 9, 3), dtype=numpy.uint8)
    return Image.fromarray(pixels)


def noise_source(num_pairs: int) -> ListSource:
    """Return labelled pictures of noise; the first two are one picture, many share a caption, many have two."""
    colours = [COLOURS[index % len(COLOURS)] for index in range(num_pairs)]
    captions = [(f"a {colour} thing", f"number {index}")[: 1 + index % 3] for index, colour in enumerate(colours)]
    pairs = [
        Pair(noise_picture(max(index, 1)), texts, label)
        for index, (texts, label) in enumerate(zip(captions, colours, strict=True))
    ]
    return ListSource(pairs, [f"{max(index, 1)}.png" for index in range(num_pairs)])


def transform(model: ClipModel, picture: Image.Image) -> Tensor:
    """Return a picture as open_clip's own evaluation transform gives it."""
    return open_clip.image_transform(
        32, is_train=False, mean=model.clip.visual.image_mean, std=model.clip.visual.image_std
    )(picture)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ClipModel:
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    forget_previous_accelerator()
    yield Accelerator(cpu=True)
    forget_previous_accelerator()


@pytest.fixture
def loss() -> Loss:
    return build_loss(LossConfig("clip"))


# Retrieval


def slow_rank(scores: Tensor, own: set[int]) -> int:
    """Return the rank by the definition, from one query's scores."""
    best = max(scores[candidate].item() for candidate in own)
    return 1 + sum(scores[other].item() >= best for other in range(len(scores)) if other not in own)


def many_to_many(num_images: int, num_texts: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return pairs in which every picture and every text occurs, some several times, in mixed order."""
    generator = torch.Generator().manual_seed(seed)
    num_pairs = 2 * max(num_images, num_texts)
    images, texts = torch.arange(num_pairs) % num_images, torch.arange(num_pairs) % num_texts
    shuffled = torch.randperm(num_pairs, generator=generator)
    return images[shuffled], texts[torch.randperm(num_pairs, generator=generator)]


@pytest.mark.parametrize(("num_images", "num_texts"), [(1, 1), (5, 3), (3, 40), (128, 257), (300, 129)])
def test_retrieval_is_the_definition_with_many_to_many_pairs_and_ties(
    accelerator: Accelerator, num_images: int, num_texts: int
) -> None:
    generator = torch.Generator().manual_seed(num_images)
    images = torch.randint(-1, 2, (num_images, 4), generator=generator).float()  # whole numbers: ties are exact
    texts = torch.randint(-1, 2, (num_texts, 4), generator=generator).float()
    image_of_pair, text_of_pair = many_to_many(num_images, num_texts, seed=1)
    scores = images @ texts.T
    assert scores.unique().numel() < scores.numel() or scores.numel() == 1  # else no ties are tried

    metrics = retrieval_metrics(accelerator, images, texts, image_of_pair, text_of_pair)

    pairs = list(zip(image_of_pair.tolist(), text_of_pair.tolist(), strict=True))
    to_text = [slow_rank(scores[q], {text for image, text in pairs if image == q}) for q in range(num_images)]
    to_image = [slow_rank(scores[:, q], {image for image, text in pairs if text == q}) for q in range(num_texts)]
    for direction, expected in (("image_to_text", to_text), ("text_to_image", to_image)):
        for k in (1, 5, 10):
            assert metrics[f"val/{direction}_R@{k}"] == pytest.approx(numpy.mean([rank <= k for rank in expected]))
        assert metrics[f"val/{direction}_mean_rank"] == pytest.approx(numpy.mean(expected))
        assert metrics[f"val/{direction}_median_rank"] == numpy.median(expected)
    assert len(metrics) == 10


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_a_model_that_gives_all_the_same_score_is_last(accelerator: Accelerator, value: float) -> None:
    features = torch.full((50, 8), value)
    found = ranks(accelerator, features, features, torch.arange(50), torch.arange(50))
    assert found.tolist() == [50] * 50


def test_one_score_that_is_not_a_number_is_no_hit(accelerator: Accelerator) -> None:
    features = torch.eye(20)
    features[3] = torch.nan
    found = ranks(accelerator, features, torch.eye(20), torch.arange(20), torch.arange(20))
    assert found[3] == 20
    assert found[4] == 1


@pytest.mark.parametrize("num_candidates", [77, 1003])
def test_equal_candidates_score_equal_wherever_they_stand(accelerator: Accelerator, num_candidates: int) -> None:
    generator = torch.Generator().manual_seed(0)
    candidates = F.normalize(torch.randn(1, 512, generator=generator), dim=-1).repeat(num_candidates, 1)
    for num_queries in (1, 129):
        queries = F.normalize(torch.randn(num_queries, 512, generator=generator), dim=-1)
        own = torch.arange(num_queries) * 7 % num_candidates
        found = ranks(accelerator, queries, candidates, torch.arange(num_queries), own)
        assert found.tolist() == [num_candidates] * num_queries


def test_retrieval_agrees_with_clip_benchmark_where_nothing_is_tied(accelerator: Accelerator) -> None:
    reference = pytest.importorskip("clip_benchmark.metrics.zeroshot_retrieval")
    generator = torch.Generator().manual_seed(0)
    num_captions = [1 + index % 4 for index in range(60)]
    images = F.normalize(torch.randn(60, 8, generator=generator), dim=-1)
    image_of_text = torch.repeat_interleave(torch.arange(60), torch.tensor(num_captions))
    noise = torch.randn(len(image_of_text), 8, generator=generator)
    texts = F.normalize(images[image_of_text] + 0.5 * noise, dim=-1)

    class GivenFeatures:
        encode_image = staticmethod(lambda image: image)
        encode_text = staticmethod(lambda rows: texts[rows])

    rows = torch.arange(len(texts)).split(num_captions)
    loader = [
        (images[start : start + 16], [r.tolist() for r in rows[start : start + 16]]) for start in range(0, 60, 16)
    ]
    expected = reference.evaluate(GivenFeatures, loader, torch.tensor, "cpu", amp=False, recall_k_list=[1, 5, 10])

    metrics = retrieval_metrics(accelerator, images, texts, image_of_text, torch.arange(len(texts)))
    assert 0.1 < metrics["val/image_to_text_R@1"] < 0.9
    for k in (1, 5, 10):
        assert metrics[f"val/text_to_image_R@{k}"] == pytest.approx(expected[f"image_retrieval_recall@{k}"])
        assert metrics[f"val/image_to_text_R@{k}"] == pytest.approx(expected[f"text_retrieval_recall@{k}"])


# Encoding


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("batch_size", [4, 64])
def test_features_are_the_models_and_stand_at_their_index(
    accelerator: Accelerator, model: ClipModel, batch_size: int, num_workers: int
) -> None:
    source = noise_source(70)
    indices = [*range(69, 0, -2), 0]
    features, _ = encode_pictures(accelerator, model, source, indices, batch_size, MAX_PIXELS, num_workers)
    pictures = torch.stack([transform(model, source[index].image) for index in indices])
    captions = [f"number {index}" for index in range(13)]
    texts = encode_captions(accelerator, model, captions, batch_size)
    model.clip.eval()
    with torch.no_grad():
        expected, exact = (
            each.clip(image=pictures.to(each.clip.logit_scale.dtype), text=model.tokenizer(captions))
            for each in (model, in_float64(model))
        )
    assert features.dtype == texts.dtype == torch.float32
    made = {"image_features": features, "text_features": texts}
    assert_equal_to_rounding(made, *({name: each[name] for name in made} for each in (expected, exact)))
    assert (features[0] - features[1]).abs().max() > 1e-4  # else the order would not be seen


def test_evaluation_leaves_training_mode_and_random_state_alone(
    accelerator: Accelerator, model: ClipModel, loss: Loss
) -> None:
    model.clip.train()
    model.clip.visual.eval()  # as a frozen tower
    modes = [part.training for part in model.clip.modules()]
    state = torch.get_rng_state()
    source = noise_source(6)
    Evaluator(accelerator, model, EvalConfig(batch_size=4), source, source, loss, MAX_PIXELS, num_workers=1).run()
    assert [part.training for part in model.clip.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


def test_dropout_is_off_while_encoding(accelerator: Accelerator, tmp_path: Path) -> None:
    model = tiny_model(tmp_path)
    for block in model.clip.visual.transformer.resblocks:
        block.attn.dropout = 0.5
    model.clip.train()
    source = noise_source(4)
    first, second = (encode_pictures(accelerator, model, source, range(4), 4, MAX_PIXELS, 0)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_features_are_encoded_in_the_runs_precision(model: ClipModel) -> None:
    forget_previous_accelerator()
    captions = [f"number {index}" for index in range(3)]
    coarse = encode_captions(Accelerator(cpu=True, mixed_precision="bf16"), model, captions, 2)
    forget_previous_accelerator()
    fine = encode_captions(Accelerator(cpu=True), model, captions, 2)
    forget_previous_accelerator()
    assert coarse.dtype == torch.float32
    assert 100 * EPSILON < (coarse - fine).abs().max() < 4 * torch.finfo(torch.bfloat16).eps


# Validation loss


def test_held_out_pairs_count_pictures_and_captions_once(capsys: pytest.CaptureFixture[str]) -> None:
    picture = noise_picture(0)
    pairs = [
        Pair(picture, ("a", "b")),
        Pair(picture, ()),
        Pair(picture, ("b", " ")),
        Pair(picture, ("c", "a")),
        Pair(picture, ("  ",)),
        Pair(picture, ("b",)),
    ]
    read = read_held_out(ListSource(pairs, ["one", "two", "three", "one", "four", "one"]))
    assert read.indices == [0, 2]
    assert read.captions == ["a", "b", "c"]
    together = list(zip(read.image_of_pair.tolist(), read.text_of_pair.tolist(), strict=True))
    assert together == [(0, 0), (0, 1), (1, 1), (0, 2)]
    assert list(zip(read.image_of_row.tolist(), read.text_of_row.tolist(), strict=True)) == [
        (0, 0),
        (1, 1),
        (0, 2),
        (0, 1),
    ]
    said = capsys.readouterr().err
    assert "4 pairs, 2 pictures, 3 captions" in said
    assert "left out: no_caption 2" in said


def test_a_held_out_part_without_captions_is_an_error() -> None:
    with pytest.raises(DataError, match=r"data\.val.*a list"):
        read_held_out(ListSource([Pair(noise_picture(0), ())]))


class Broken(ListSource):
    """Pairs of which number 1 cannot be fetched."""

    def __getitem__(self, index: int) -> Pair:
        if index == 1:
            raise UnusableSample("missing_file", "why", "pictures/1.png")
        return super().__getitem__(index)


def test_pairs_that_cannot_be_fetched_are_left_out_and_counted(capsys: pytest.CaptureFixture[str]) -> None:
    source = Broken(noise_source(4).pairs)
    source.pairs[2] = Pair(noise_picture(2), ("word " * 40_000,))
    assert read_held_out(source).indices == [0, 3]
    assert "left out: caption_too_large 1, missing_file 1" in capsys.readouterr().err
    assert read_labelled(source).indices == [0, 3]
    assert "1 without a label left out; left out: missing_file 1" in capsys.readouterr().err
    with pytest.raises(DataError, match=r"data\.val.*missing_file 1"):
        read_held_out(Broken(source.pairs[2:3] + source.pairs[1:2]))


def with_broken_pictures(source: ListSource, places: tuple[int, ...]) -> ListSource:
    """Return the source with bytes that are no pictures at some places."""
    pairs = [
        Pair(b"no picture", each.captions, each.label) if index in places else each
        for index, each in enumerate(source.pairs)
    ]
    return ListSource(pairs, source.keys)


@pytest.mark.parametrize("broken", [(5,), (2, 3, 16)])
def test_broken_pictures_are_left_out_with_their_captions(
    accelerator: Accelerator,
    model: ClipModel,
    loss: Loss,
    capsys: pytest.CaptureFixture[str],
    broken: tuple[int, ...],
) -> None:
    """The metrics are those of the source without the pictures, but for the shape in which they meet the tower."""
    whole = noise_source(17)
    kept = [index for index in range(17) if index not in broken]
    rest = ListSource([whole.pairs[index] for index in kept], [whole.keys[index] for index in kept])
    source, config = with_broken_pictures(whole, broken), EvalConfig(batch_size=4)
    evaluator = Evaluator(accelerator, model, config, source, source, loss, MAX_PIXELS, 0)
    first, second = evaluator.run(), evaluator.run()
    expected = Evaluator(accelerator, model, config, rest, rest, loss, MAX_PIXELS, 0).run()
    assert first == second
    for name, value in expected.items():
        assert first[name] == pytest.approx(value, rel=rounding(ADDITIONS_OF_A_STEP)), name
    said = capsys.readouterr().err
    assert said.count(f"goes without {len(broken)} of ") == 1  # validation and zero-shot are on one source
    assert f"unreadable {len(broken)}; the first is {broken[0]}.png" in said
    assert evaluator.picture_grid() is not None


def test_evaluation_without_usable_pictures_is_an_error(
    accelerator: Accelerator, model: ClipModel, loss: Loss, tmp_path: Path
) -> None:
    source = with_broken_pictures(noise_source(3), (0, 1, 2))
    with pytest.raises(DataError, match=r"a list: evaluation cannot use 2 of 2 pictures: unreadable 2"):
        Evaluator(accelerator, model, EvalConfig(), source, None, loss, MAX_PIXELS, 0).run()
    missing = [
        Pair(tmp_path / "none.png" if index < 3 else each.image, each.captions)
        for index, each in enumerate(noise_source(5).pairs)
    ]
    with pytest.raises(DataError, match=r"3 of 5 pictures: missing_file 3.*is data\.image_root right"):
        Evaluator(accelerator, model, EvalConfig(), ListSource(missing), None, loss, MAX_PIXELS, 0).run()


@pytest.mark.parametrize(("name", "options"), [("clip", {}), ("siglip", {"init_logit_bias": -3.0})])
@pytest.mark.parametrize(("num_pairs", "batch_size", "num_batches"), [(7, 256, 1), (23, 5, 4)])
def test_validation_loss_is_the_mean_of_dense_losses(
    accelerator: Accelerator,
    tmp_path: Path,
    name: str,
    options: dict[str, float],
    num_pairs: int,
    batch_size: int,
    num_batches: int,
) -> None:
    model, source = tiny_model(tmp_path, **options), noise_source(num_pairs)
    loss = build_loss(LossConfig(name))
    config = EvalConfig(batch_size=batch_size)
    value = Evaluator(accelerator, model, config, source, None, loss, MAX_PIXELS, 0).run()["val/loss"]

    reference = open_clip.ClipLoss() if name == "clip" else SigLipLoss()
    order = fixed_order(num_pairs)
    assert sorted(order.tolist()) == list(range(num_pairs))
    expected = []
    model.clip.eval()
    for number in range(num_batches):
        size = min(batch_size, num_pairs)
        pairs = [source[index] for index in order[number * size : (number + 1) * size].tolist()]
        pictures = torch.stack([transform(model, pair.image) for pair in pairs])
        with torch.no_grad():
            outputs = model.clip(image=pictures, text=model.tokenizer([pair.captions[0] for pair in pairs]))
            expected.append(reference(**outputs).item())
    assert value == pytest.approx(numpy.mean(expected), rel=rounding(ADDITIONS_OF_A_STEP))


# Zero-shot classification


def test_zero_shot_agrees_with_open_clip(accelerator: Accelerator, model: ClipModel) -> None:
    labelled = read_labelled(noise_source(40))
    templates = ["a photo of a {}.", "{}", "the colour {}, I think"]
    classes = class_features(accelerator, model, labelled.classes, templates, batch_size=4)
    images, _ = encode_pictures(accelerator, model, labelled.source, labelled.indices, 8, MAX_PIXELS, 0)
    metrics = accuracy(accelerator, images, classes, labelled.class_of_picture)

    model.clip.eval()
    weights, exact = (
        open_clip.build_zero_shot_classifier(each.clip, model.tokenizer, sorted(COLOURS), templates)
        for each in (model, in_float64(model))
    )
    assert_equal_to_rounding(*({"classes": each} for each in (classes, weights.T, exact.T)))
    best = (images @ weights).topk(5).indices
    right = torch.tensor([sorted(COLOURS).index(pair.label) for pair in labelled.source.pairs])
    assert metrics["zero_shot/top1"] == pytest.approx((best[:, 0] == right).double().mean().item())
    assert metrics["zero_shot/top5"] == pytest.approx((best == right[:, None]).any(1).double().mean().item())
    assert 0 < metrics["zero_shot/top1"] < metrics["zero_shot/top5"] < 1


def test_zero_shot_ties_count_against_the_hit_and_top5_needs_more_than_five_classes(accelerator: Accelerator) -> None:
    same = torch.ones(5, 4)
    assert accuracy(accelerator, torch.ones(3, 4), same, torch.tensor([0, 1, 4])) == {"zero_shot/top1": 0.0}
    six = torch.eye(6)
    assert accuracy(accelerator, six, six, torch.arange(6)) == {"zero_shot/top1": 1.0, "zero_shot/top5": 1.0}


def test_pictures_without_a_label_are_left_out_and_said(capsys: pytest.CaptureFixture[str]) -> None:
    picture = noise_picture(0)
    labels = ["dog", None, "cat", "dog"]
    labelled = read_labelled(ListSource([Pair(picture, (), label) for label in labels]))
    assert labelled.indices == [0, 2, 3]
    assert labelled.classes == ["cat", "dog"]
    assert labelled.class_of_picture.tolist() == [1, 0, 1]
    assert "3 pictures of 2 classes; 1 without a label left out" in capsys.readouterr().err


def test_zero_shot_without_labels_is_an_error_that_names_the_settings() -> None:
    with pytest.raises(DataError, match=r"eval\.zero_shot.*eval\.label_key"):
        read_labelled(ListSource([Pair(noise_picture(0), ("a",))]))


# The whole evaluation, and its picture grid


def test_evaluator_measures_what_it_is_given(accelerator: Accelerator, model: ClipModel, loss: Loss) -> None:
    source, config = noise_source(9), EvalConfig(batch_size=4)

    def run(held_out: ListSource | None, zero_shot: ListSource | None) -> dict[str, float]:
        return Evaluator(accelerator, model, config, held_out, zero_shot, loss, MAX_PIXELS, 0).run()

    both = run(source, source)
    directions = [
        f"val/{way}_{what}"
        for way in ("image_to_text", "text_to_image")
        for what in ("R@1", "R@5", "R@10", "mean_rank", "median_rank")
    ]
    assert set(both) == {"val/loss", "zero_shot/top1", "zero_shot/top5", *directions}
    assert all(type(value) is float for value in both.values())
    assert run(source, None) | run(None, source) == both
    assert run(None, None) == {}


def test_nearest_examples_are_the_best_pictures_and_know_their_own() -> None:
    images = torch.eye(6)
    texts = torch.stack([images[2] + 0.5 * images[4], images[5], images[0]])
    first, second = nearest_examples(images, texts, torch.tensor([2, 3, 5, 0]), torch.tensor([0, 0, 1, 2]), 2, 3)
    assert (first.text, first.images, first.own) == (0, (2, 4, 0), (True, False, False))
    assert (second.text, second.images[0], second.own[0]) == (2, 0, True)
    assert len(nearest_examples(images[:2], texts[:1], torch.tensor([0]), torch.tensor([0]))[0].images) == 2


def test_the_grid_frames_own_pictures_in_green() -> None:
    pictures = [Image.new("RGB", size, "blue") for size in ((300, 20), (5, 5), (64, 64))]
    rows = [
        GridRow("a caption " * 40, pictures, [False, True, False]),
        GridRow("蓝色的方块在红色的圆形上面" * 9, pictures[:2], [True, False]),
    ]
    grid = numpy.asarray(retrieval_grid(rows))
    assert grid.dtype == numpy.uint8
    height, width = grid.shape[0] // 2, (grid.shape[1] - 288) // 3
    corners = [[tuple(grid[row * height, 288 + column * width].tolist()) for column in range(3)] for row in range(2)]
    assert corners == [[GREY, GREEN, GREY], [GREEN, GREY, (255, 255, 255)]]
    assert (grid[height : 2 * height, :288] < 128).any()  # something is drawn for the second caption


def test_every_round_of_an_evaluation_is_told_and_may_be_the_last(
    accelerator: Accelerator, model: ClipModel, loss: Loss, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("accel_clip.evaluation.retrieval.QUERIES_PER_CHUNK", 5)
    beats: list[str] = []
    evaluator = Evaluator(accelerator, model, EvalConfig(batch_size=4), noise_source(9), None, loss, MAX_PIXELS, 0)
    evaluator.run(Lookout(beat=beats.append))
    assert evaluator.examples is not None
    pairs = evaluator.examples.pairs
    num_pictures, num_captions, num_rows = len(pairs.indices), len(pairs.captions), len(pairs.image_of_row)
    rounds = ceil(num_pictures / 4) + ceil(num_captions / 4) + num_rows // 4 + ceil(num_pictures / 5)
    rounds += ceil(num_captions / 5)  # queries in both directions
    assert beats == ["evaluation"] * rounds
    for last in range(rounds):
        beats.clear()
        with pytest.raises(StopAsked):
            evaluator.run(Lookout(lambda last=last: len(beats) == last, beats.append))
        assert len(beats) == last


def test_the_evaluator_draws_its_last_examples(accelerator: Accelerator, model: ClipModel, loss: Loss) -> None:
    evaluator = Evaluator(accelerator, model, EvalConfig(), noise_source(9), None, loss, MAX_PIXELS, 0)
    assert evaluator.picture_grid() is None
    evaluator.run()
    grid = evaluator.picture_grid()
    assert grid is not None and grid.ndim == 3 and grid.shape[2] == 3
    assert evaluator.examples is not None and len(evaluator.examples.nearest) == 8


# Several processes


def evaluate_all(accelerator: Accelerator, model: ClipModel) -> dict:
    """Evaluate everything, in chunks that no number of processes divides."""
    source, loss = noise_source(17), build_loss(LossConfig("clip"))
    evaluator = Evaluator(accelerator, model, EvalConfig(batch_size=4), source, source, loss, MAX_PIXELS, 1)
    features = torch.randn(1000, 16, generator=torch.Generator().manual_seed(0))
    places = torch.arange(1000)
    return {
        "metrics": {name: value.hex() for name, value in evaluator.run().items()},
        "image": encode_pictures(accelerator, model, source, range(17), 4, MAX_PIXELS, 0)[0],
        "text": encode_captions(accelerator, model, [f"number {index}" for index in range(9)], 4),
        "ranks": ranks(accelerator, features, features.roll(1, 1), places, places),
    }


def meet_bad_picture(accelerator: Accelerator, model: ClipModel) -> dict:
    """Evaluate a source whose picture 6, in the second process's first chunk, cannot be read."""
    source, loss = with_broken_pictures(noise_source(17), (6,)), build_loss(LossConfig("clip"))
    _, problems = encode_pictures(accelerator, model, source, range(17), 4, MAX_PIXELS, 1)
    metrics = Evaluator(accelerator, model, EvalConfig(batch_size=4), source, source, loss, MAX_PIXELS, 1).run()
    return {
        "problems": {place: (problem.reason, problem.path) for place, problem in problems.items()},
        "metrics": {name: value.hex() for name, value in metrics.items()},
    }


class Failing(ListSource):
    """Pairs of which number 6 ends the evaluation."""

    def __getitem__(self, index: int) -> Pair:
        if index == 6:
            raise DataError("the source is gone")
        return super().__getitem__(index)


def meet_failure(accelerator: Accelerator, model: ClipModel) -> tuple[str, int]:
    """Encode a source that fails at picture 6, in the second process's first chunk; return the error."""
    try:
        encode_pictures(accelerator, model, Failing(noise_source(17).pairs), range(17), 4, MAX_PIXELS, 1)
    except DataError as error:
        return str(error), error.exit_code
    return "no error", 0


def main(folder: Path) -> None:
    """Be one of several processes and write down what it finds."""
    torch.set_num_threads(1)
    limit = InitProcessGroupKwargs(timeout=timedelta(seconds=60))
    accelerator = Accelerator(cpu=True, kwargs_handlers=[limit])
    assert accelerator.num_processes == int(os.environ["WORLD_SIZE"])
    own = folder / str(accelerator.process_index)
    own.mkdir()
    model = tiny_model(own)
    error, bad = meet_failure(accelerator, model), meet_bad_picture(accelerator, model)
    torch.save({"all": evaluate_all(accelerator, model), "error": error, "bad": bad}, own / "found.pt")
    accelerator.end_training()


@pytest.fixture(scope="module")
def found_by_two(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What each of two processes finds; fails when one does not end."""
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    environment = {**os.environ, **meeting, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests"), environment.get("PYTHONPATH", "")])
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(folder)], env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        )
        for rank in range(2)
    ]
    try:
        assert [process.wait(timeout=HANG_SECONDS) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    return [torch.load(folder / str(rank) / "found.pt") for rank in range(2)]


def test_the_result_does_not_depend_on_the_number_of_processes(
    accelerator: Accelerator, model: ClipModel, found_by_two: list[dict]
) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = evaluate_all(accelerator, model)
    torch.set_num_threads(threads)
    assert alone["image"].shape == (17, 64)
    assert alone["image"].abs().sum(1).min() > 0
    assert len(alone["metrics"]) == 13
    for found in found_by_two:
        assert found["all"]["metrics"] == alone["metrics"]
        assert all(torch.equal(found["all"][name], alone[name]) for name in ("image", "text", "ranks"))


def test_a_source_that_fails_on_one_process_ends_all(found_by_two: list[dict]) -> None:
    assert [found["error"] for found in found_by_two] == [("the source is gone", 3)] * 2


def test_a_bad_picture_on_one_process_is_left_out_by_all(
    accelerator: Accelerator, model: ClipModel, found_by_two: list[dict]
) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = meet_bad_picture(accelerator, model)
    torch.set_num_threads(threads)
    assert alone["problems"] == {6: ("unreadable", "6.png")}
    assert [found["bad"] for found in found_by_two] == [alone] * 2


if __name__ == "__main__":
    main(Path(sys.argv[1]))
