"""Features of a frozen tower on disk: what training gives, once for each picture or caption, and never half of it."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from accelerate import Accelerator
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

from accel_clip import Config, train
from accel_clip.config import DataConfig, LossConfig, ModelConfig, TrainConfig
from accel_clip.data import examples
from accel_clip.data.batch import Batch
from accel_clip.data.caches import feature_encoding
from accel_clip.data.caches.feature_encoding import open_features
from accel_clip.data.caches.features import FeatureCache, FeatureWriter
from accel_clip.data.examples import Preparation
from accel_clip.data.loader import BatchPlaces, TrainingPairs, iterate
from accel_clip.data.order import Order
from accel_clip.data.pairs import open_training
from accel_clip.data.pictures.augmentation import evaluation_pixels
from accel_clip.data.pictures.decode import decode_picture
from accel_clip.data.sources.base import Source
from accel_clip.faults import ConfigError, DataError
from accel_clip.files.marked import settle
from accel_clip.models.anatomy import examine
from accel_clip.models.build import build_model
from accel_clip.models.data_parallel import DataParallel
from accel_clip.models.freezing import freeze
from accel_clip.models.frozen_tower import FrozenTower
from accel_clip.models.training_model import TrainingModel
from accel_clip.process.signals import StopAsked
from accel_clip.process.waiting import Lookout
from helpers.commands import CPU_2, launch, losses_of, train_py
from helpers.comparison import ADDITIONS_OF_A_STEP, assert_equal_to_rounding, rounding
from helpers.models import small_model

NUM_PICTURES, NUM_PAIRS, BROKEN = 18, 21, 5
DATA = DataConfig(caption_key=["caption", "title"], val_fraction=0, augmentation="none", workers=0)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Write 18 pictures of several shapes in 21 rows with two captions each; three rows show the first picture."""
    generator = numpy.random.default_rng(0)
    rows = ["image,caption,title"]
    for number in range(NUM_PICTURES):
        pixels = generator.integers(0, 255, (40 + number, 52 - number, 3)).astype(numpy.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
        rows.append(f"{number}.png,picture {number} {'very ' * (number % 7)}near,the other caption of {number}")
    rows += [f"0.png,the first picture in row {row},a word" for row in range(NUM_PAIRS - NUM_PICTURES)]
    (tmp_path / "pairs.csv").write_text("\n".join(rows), encoding="utf-8")
    return tmp_path / "pairs.csv"


@pytest.fixture
def pairs(table: Path) -> Source:
    return open_training(replace(DATA, train=[str(table)])).source


def tower_of(table: Path, side: str) -> FrozenTower:
    """Return a frozen tower of a small model that drops patches while its image tower is trained."""
    torch.manual_seed(0)
    model = build_model(ModelConfig(small_model(table.parent), options={"force_patch_dropout": 0.5}))
    freeze(model.clip, side)
    anatomy = examine(model.clip, model.tokenizer)
    accelerator = Accelerator(cpu=True)
    parallel = DataParallel(accelerator, accelerator.prepare(TrainingModel(model)))
    return FrozenTower(side, parallel, model, anatomy, rows=4)


def cache_of(tower: FrozenTower, pairs: Source, folder: Path, max_pixels: float = 1e6) -> FeatureCache:
    return open_features(tower, pairs, max_pixels, folder / "features" / tower.side, num_workers=0)


def batches_of(
    tower: FrozenTower, pairs: Source, features: dict[str, FeatureCache] | None = None, num_workers: int = 0
) -> list[Batch]:
    """Return the batches of three epochs."""
    order = Order(len(pairs), 5, seed=1)
    pixels = evaluation_pixels(tower.model.preprocess_config)
    data = TrainingPairs(pairs, order, Preparation(tower.model.tokenizer, (32, 32), 1e6, 1, pixels, features))
    return list(iterate(data, BatchPlaces(order, range(12), 0, 1), DATA, num_workers, pin_memory=False))


@pytest.mark.parametrize(("side", "rounds"), [("image", 5), ("text", 10)])
def test_every_round_of_encoding_is_told_and_may_be_the_last(
    table: Path, pairs: Source, side: str, rounds: int
) -> None:
    """A tower may take hours for all: nobody may take that for a hang."""
    tower, folder, beats = tower_of(table, side), table.parent / "features" / side, list[str]()
    with pytest.raises(StopAsked):
        open_features(tower, pairs, 1e6, folder, 0, Lookout(lambda: beats.count("encoding") == 2, beats.append))
    assert beats.count("encoding") == 2 and not folder.exists()
    beats.clear()
    open_features(tower, pairs, 1e6, folder, 0, Lookout(beat=beats.append))
    assert beats.count("encoding") == rounds  # of four rows
    assert beats.count("reading captions") == (len(pairs) if side == "text" else 0)


def not_called(*_: Any) -> Any:
    raise AssertionError("a picture was decoded, or encoded, again")


@pytest.mark.parametrize("size", [32, (32, 48)])
@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
def test_pictures_without_augmentation_are_those_of_the_evaluation(size: Any, mode: str) -> None:
    config = {"size": size, "resize_mode": mode, "interpolation": "bicubic", "mean": (0.4,) * 3, "std": (0.2,) * 3}
    pixels = numpy.random.default_rng(0).integers(0, 255, (57, 83, 3)).astype(numpy.uint8)
    picture = Image.fromarray(pixels)
    ours = (evaluation_pixels(config)(picture) / 255 - 0.4) / 0.2
    theirs = image_transform_v2(PreprocessCfg(**config), is_train=False)(picture)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=rounding(2) / 0.2)  # pixels and mean are at most 1


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("side", ["image", "text"])
def test_features_are_those_of_training_and_nothing_else_of_a_batch_changes(
    table: Path, pairs: Source, side: str, num_workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tower = tower_of(table, side)
    expected = batches_of(tower, pairs)
    cache = cache_of(tower, pairs, table.parent)
    if side == "image":
        monkeypatch.setattr(examples, "decode_picture", not_called)
    found = batches_of(tower, pairs, {side: cache}, num_workers)
    doubled = deepcopy(tower.parallel.model.train()).double()
    for batch, plain in zip(found, expected, strict=True):
        for name in ("sample", "tokens", "caption_hash", "picture_hash"):
            assert torch.equal(getattr(batch, name), getattr(plain, name)), name
        given = {"image": plain.image} if side == "image" else {"text": [plain.tokens]}
        name = f"{side}_features"
        with torch.no_grad():
            features, exact = ({name: each(**given)[name]} for each in (tower.parallel.model, doubled))
        assert_equal_to_rounding(batch.features, features, exact)
        assert batch.image.shape == ((5, 3, 0, 0) if side == "image" else plain.image.shape)
        assert batch.image.dtype == torch.uint8
    captions_of_a_sample = {
        int(caption)
        for b in found
        for s, caption in zip(b.sample, b.caption_hash, strict=True)
        if s == found[0].sample[0]
    }
    assert len(captions_of_a_sample) == 2  # both of its captions were drawn


def test_each_different_picture_and_caption_is_encoded_once(
    table: Path, pairs: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = []

    def counted(image: Any, max_pixels: float) -> Image.Image:
        decoded.append(image)
        return decode_picture(image, max_pixels)

    monkeypatch.setattr(feature_encoding, "decode_picture", counted)
    assert len(cache_of(tower_of(table, "image"), pairs, table.parent)) == NUM_PICTURES == len(decoded)
    different = {caption for sample in range(len(pairs)) for caption in pairs[sample].captions}
    assert len(cache_of(tower_of(table, "text"), pairs, table.parent)) == len(different) < 2 * NUM_PAIRS


def test_unusable_pictures_are_met_as_without_the_cache(
    table: Path, pairs: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    (table.parent / f"{BROKEN}.png").write_bytes(b"<html>")
    (table.parent / f"{BROKEN + 1}.png").unlink()
    tower = tower_of(table, "image")
    expected = batches_of(tower, pairs)
    assert {bad.reason for batch in expected for bad in batch.bad_samples} == {"unreadable", "missing_file"}
    cache = cache_of(tower, pairs, table.parent)
    monkeypatch.setattr(examples, "decode_picture", not_called)
    found = batches_of(tower, pairs, {"image": cache})
    assert [batch.bad_samples for batch in found] == [batch.bad_samples for batch in expected]
    assert [batch.sample.tolist() for batch in found] == [batch.sample.tolist() for batch in expected]


def test_a_picture_is_encoded_although_its_first_row_has_a_fault(table: Path, pairs: Source) -> None:
    class FirstRowFaulty:
        name = pairs.name

        def __len__(self) -> int:
            return len(pairs)

        def __getitem__(self, index: int) -> Any:
            if index == 0:
                raise feature_encoding.UnusableSample("caption_encoding", "no text")
            return pairs[index]

        def key(self, index: int) -> str:
            return pairs.key(index)

    tower = tower_of(table, "image")
    whole = cache_of(tower, pairs, table.parent / "whole")
    faulty = cache_of(tower, FirstRowFaulty(), table.parent / "faulty")
    assert not faulty.unusable
    assert numpy.array_equal(whole.features, faulty.features)


def other_weights(tower: FrozenTower, table: Path) -> None:
    with torch.no_grad():
        tower.model.clip.visual.proj[0, 0] += 1


def other_mean(tower: FrozenTower, table: Path) -> None:
    tower.model.preprocess_config["mean"] = (0.1, 0.2, 0.3)


CHANGES = [(other_weights, "weights"), (other_mean, "preprocessing")]


@pytest.mark.parametrize(("change", "named"), CHANGES)
def test_features_of_something_else_are_replaced_and_it_is_said(
    table: Path, change: Callable[[FrozenTower, Path], None], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    tower = tower_of(table, "image")
    data = replace(DATA, train=[str(table)])
    before = cache_of(tower, open_training(data).source, table.parent).features.copy()
    change(tower, table)
    after = cache_of(tower, open_training(data).source, table.parent)
    assert f"were computed with other {named}: they are replaced" in capsys.readouterr().err
    fresh = cache_of(tower, open_training(data).source, table.parent / "fresh")
    assert numpy.array_equal(after.features, fresh.features)
    assert numpy.array_equal(after.keys, fresh.keys)
    if named == "weights":
        assert not numpy.array_equal(before, after.features)


@pytest.mark.parametrize("side", ["image", "text"])
def test_what_changed_is_encoded_anew_alone_and_it_is_said(
    table: Path, side: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another picture has a name, one was broken, one has come, and some captions are others; two rows are gone."""
    tower, folder, data = tower_of(table, side), table.parent, replace(DATA, train=[str(table)])
    good = (folder / "7.png").read_bytes()
    (folder / "7.png").write_bytes(b"<html>")
    cache_of(tower, open_training(data).source, folder)
    (folder / "7.png").write_bytes(good)
    Image.new("RGB", (30, 31), "red").save(folder / "4.png")
    Image.new("RGB", (31, 30), "blue").save(folder / "late.png")
    lines = table.read_text(encoding="utf-8").replace("the other caption of 3", "mended").splitlines()
    table.write_text("\n".join([*lines[:-2], "late.png,a late one,also late"]), encoding="utf-8")
    capsys.readouterr()
    encoded = []
    encode = FrozenTower.encode
    monkeypatch.setattr(FrozenTower, "encode", lambda self, inputs: encoded.append(len(inputs)) or encode(self, inputs))
    pairs = open_training(data).source
    found = cache_of(tower, pairs, folder)
    said = "1 changed, 1 new, 1 unusable before of 19" if side == "image" else "3 new of"
    assert f"are used again, but for {said}" in capsys.readouterr().err and sum(encoded) == 3
    fresh = cache_of(tower, pairs, folder / "fresh")
    assert numpy.array_equal(found.keys, fresh.keys) and found.unusable == fresh.unusable == {}
    for key in found.keys.tolist():
        torch.testing.assert_close(found[key], fresh[key], rtol=0, atol=rounding(ADDITIONS_OF_A_STEP))


def test_the_same_features_are_used_again(
    table: Path, pairs: Source, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = cache_of(tower_of(table, "image"), pairs, table.parent)
    tower = tower_of(table, "image")
    other_text = next(each for name, each in tower.model.clip.named_parameters() if name == "text_projection")
    with torch.no_grad():
        other_text += 1  # the trained tower's weights do not matter
    monkeypatch.setattr(feature_encoding, "encode_all", not_called)
    again = cache_of(tower, pairs, table.parent)
    assert "are used again" in capsys.readouterr().err
    assert numpy.array_equal(first.features, again.features)
    copy = pickle.loads(pickle.dumps(again))
    assert isinstance(copy.features, numpy.memmap)
    assert len(pickle.dumps(again)) < 1000  # a folder, not the features


@pytest.mark.parametrize("end", ["killed", "truncated", "no about.json"])
def test_half_a_cache_is_not_read(table: Path, pairs: Source, end: str) -> None:
    tower, folder = tower_of(table, "image"), table.parent / "features" / "image"
    whole = cache_of(tower, pairs, table.parent / "whole")
    if end == "killed":
        FeatureWriter(folder, len(whole), 32).append(torch.ones(3, 32))
        settle(folder.parent)
    else:
        cache_of(tower, pairs, table.parent)
    if end == "truncated":
        (folder / "features.npy").write_bytes((folder / "features.npy").read_bytes()[:-100])
    if end == "no about.json":
        (folder / "about.json").unlink()
    assert FeatureCache.if_whole(folder) is None
    found = cache_of(tower, pairs, table.parent)
    assert numpy.array_equal(found.features, whole.features)
    assert FeatureCache.if_whole(folder).what_changed(whole.fingerprint) == []
    assert [file.name for file in folder.parent.iterdir()] == ["image"]


def test_data_that_changes_during_the_run_is_an_error_that_names_the_way_out(table: Path, pairs: Source) -> None:
    cache = cache_of(tower_of(table, "image"), pairs, table.parent)
    with pytest.raises(DataError, match="changed since: remove this folder"):
        cache[int(cache.keys[3]) + 1]


WRONG = [
    ({"model": ModelConfig()}, r"model\.freeze: \[\] .* freeze image or text"),
    ({"model": ModelConfig(freeze=["visual.conv1*"])}, r"model\.freeze: .* freeze image or text"),
    ({"model": ModelConfig(freeze=["image", "text"])}, r"model\.freeze: .* one tower"),
    ({"data": DataConfig()}, r"data\.augmentation: 'crop' .* set it to none"),
    ({"loss": LossConfig("distill", {"teachers": [{"name": "ViT-B-32"}]})}, r"train\.cache_features: .*teachers"),
]


@pytest.mark.parametrize(("sections", "message"), WRONG)
def test_settings_that_contradict_each_other_are_refused(sections: dict[str, Any], message: str) -> None:
    right = {"model": ModelConfig(freeze=["image"]), "data": DATA, "train": TrainConfig(cache_features=True)}
    assert Config(**right).cached_tower == "image"
    assert Config(**{**right, "model": ModelConfig(freeze=["text"]), "data": DataConfig()}).cached_tower == "text"
    with pytest.raises(ConfigError, match=message):
        Config(**{**right, **sections})
    with pytest.raises(ConfigError, match=r"data\.augmentation: 'flip'"):
        DataConfig(augmentation="flip")


def test_a_tower_that_cannot_run_alone_is_refused(table: Path) -> None:
    tower = tower_of(table, "image")
    with pytest.raises(ConfigError, match=r"train\.cache_features: the image tower"):
        replace(tower, anatomy=replace(tower.anatomy, frozen=frozenset()))


def flags_of(table: Path, side: str, output: str, cached: bool, *more: str) -> list[str]:
    """Return the command line of four SGD steps of 8 pairs, which cross the end of an epoch."""
    flags = {
        "output_dir": str(table.parent / output),
        "data.train": str(table),
        "data.caption_key": '["caption", "title"]',
        "data.val_fraction": "0",
        "data.augmentation": "none",
        "data.workers": "0",
        "model.name": small_model(table.parent),
        "model.freeze": side,
        "optim.name": "sgd",
        "optim.lr": "0.1",
        "optim.warmup": "0",
        "train.batch_size": "8",
        "train.steps": "4",
        "train.threads": "1",
        "train.cache_features": str(cached).lower(),
        "eval.every": "100",
        "track.to": "[]",
        "track.every": "1",
    }
    return [word for key, value in flags.items() for word in (f"--{key}", value)] + list(more)


TO_ROUNDING = rounding(4 * ADDITIONS_OF_A_STEP)
RUNS = [("image", ()), ("text", ()), ("image", ("--train.micro_batch_size=3",)), ("image", ("--train.precision=bf16",))]


@pytest.mark.parametrize(("side", "more"), RUNS)
def test_a_run_with_the_cache_is_the_run_without_it(
    table: Path, side: str, more: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    from accel_clip.command_line import parse_config

    plain, cached = (
        parse_config(flags_of(table, side, f"run{number}", bool(number), *more), "train.py", "") for number in (0, 1)
    )
    train(plain)
    if side == "image":
        monkeypatch.setattr(examples, "decode_picture", not_called)
    train(cached)
    expected = losses_of(Path(plain.output_dir))
    assert len(expected) == 4
    assert losses_of(Path(cached.output_dir)) == pytest.approx(expected, rel=TO_ROUNDING)
    assert (Path(cached.output_dir) / "features" / side / "features.npy").is_file()
    assert not (Path(plain.output_dir) / "features").exists()


@pytest.mark.slow
@pytest.mark.parametrize("side", ["image", "text"])
def test_two_processes_share_one_cache_and_train_as_one_does(table: Path, side: str) -> None:
    flags = {name: flags_of(table, side, name, name != "plain") for name in ("plain", "one", "two")}
    runs = {name: train_py(*flags[name], folder=table.parent) for name in ("plain", "one")}
    runs["two"] = launch(*flags["two"], folder=table.parent, launcher=CPU_2)
    assert {name: run.code for name, run in runs.items()} == dict.fromkeys(runs, 0), runs
    assert runs["two"].err.count("encoding ") == 1
    one, two = (FeatureCache(table.parent / name / "features" / side) for name in ("one", "two"))
    assert numpy.array_equal(one.keys, two.keys)
    numpy.testing.assert_allclose(one.features, two.features, rtol=0, atol=rounding(ADDITIONS_OF_A_STEP))
    assert [file.name for file in two.folder.parent.iterdir()] == [side]
    expected = losses_of(table.parent / "plain")
    assert losses_of(table.parent / "one") == pytest.approx(expected, rel=TO_ROUNDING)
    assert losses_of(table.parent / "two") == pytest.approx(expected, rel=TO_ROUNDING)
