"""Augmentations by name: what they do to pixels, where their randomness comes from, and what is refused."""

from __future__ import annotations

import json
import pickle
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image
from timm.data.transforms_factory import create_transform
from torch import Tensor
from torchvision.transforms import v2

from accel_clip import Config, train
from accel_clip.command_line import load_config, parse_config, save_config
from accel_clip.config import DataConfig, EvalConfig, ModelConfig, TrackConfig, TrainConfig
from accel_clip.data.examples import preparation_for
from accel_clip.data.loader import BatchPlaces, TrainingPairs, iterate
from accel_clip.data.order import Order
from accel_clip.data.pictures.transforms import build_transforms
from accel_clip.data.sources.base import Pair
from accel_clip.data.sources.resolve import open_source
from accel_clip.faults import ConfigError
from accel_clip.models.build import ClipModel, build_model
from accel_clip.randomness import derive_seed, seeded_everywhere
from accel_clip.run.preconditions import check_names
from helpers.models import small_model

SIZE, MEAN = 32, (0.48145466, 0.4578275, 0.40821073)
MANY: list[str | dict[str, Any]] = [
    "RandomHorizontalFlip",
    {"ColorJitter": {"brightness": 0.4, "hue": 0.1}},
    "rand-m9-mstd0.5-inc1",
    {"RandomErasing": {"p": 0.5, "value": "random"}},
    "augmix-m3-w3",
]


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write 24 pictures of noise with captions."""
    folder = tmp_path_factory.mktemp("pairs")
    generator = numpy.random.default_rng(0)
    rows = ["image,caption"]
    for number in range(24):
        Image.fromarray(generator.integers(0, 255, (40, 48, 3), dtype=numpy.uint8)).save(folder / f"{number}.png")
        rows.append(f"{number}.png,picture {number}")
    (folder / "pairs.csv").write_text("\n".join(rows))
    small_model(folder)
    return folder / "pairs.csv"


@pytest.fixture(scope="module")
def model(table: Path) -> ClipModel:
    return build_model(ModelConfig(str(table.with_name("small.json"))))


def config_for(table: Path, **settings: Any) -> Config:
    data = DataConfig(train=[str(table)], val_fraction=0, workers=0)
    model = ModelConfig(str(table.with_name("small.json")))
    return Config(seed=5, data=replace(data, **settings), model=model)


def noise(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (3, SIZE, SIZE), dtype=torch.uint8, generator=generator)


def pictures_of(config: Config, model: ClipModel, workers: int, epochs: int = 2) -> Tensor:
    order = Order(24, 8, config.seed)
    pairs = TrainingPairs(open_source(str(config.data.train[0]), config.data), order, preparation_for(model, config))
    places = BatchPlaces(order, range(3 * epochs), 0, 1)
    return torch.stack([batch.image for batch in iterate(pairs, places, config.data, workers, pin_memory=False)])


# --- what they do


def test_pixels_are_those_of_torchvision_seeded_by_hand_after_the_crop(table: Path, model: ClipModel) -> None:
    items: list[str | dict[str, Any]] = ["RandomHorizontalFlip", {"ColorJitter": {"brightness": 0.4, "contrast": 0.2}}]
    plain = preparation_for(model, config_for(table))
    augmented = preparation_for(model, config_for(table, transforms=items))
    by_hand = v2.Compose([v2.RandomHorizontalFlip(), v2.ColorJitter(brightness=0.4, contrast=0.2)])
    pair = open_source(str(table), DataConfig())[3]
    for epoch in range(6):
        cropped = plain.example(pair, "3.png", 3, epoch).image
        torch.manual_seed(derive_seed(5, "transforms", epoch, 3))
        expected = by_hand(cropped)
        assert torch.equal(augmented.example(pair, "3.png", 3, epoch).image, expected)
        assert not torch.equal(cropped, expected)


def test_the_order_is_the_one_given() -> None:
    pixels = noise()
    invert, solarize = {"RandomInvert": {"p": 1}}, {"RandomSolarize": {"threshold": 100, "p": 1}}
    one = build_transforms([invert, solarize], (SIZE, SIZE), MEAN)
    other = build_transforms([solarize, invert], (SIZE, SIZE), MEAN)
    assert one is not None and other is not None
    assert torch.equal(one(pixels, 0), torch.where(255 - pixels >= 100, pixels, 255 - pixels))
    assert torch.equal(other(pixels, 0), 255 - torch.where(pixels >= 100, 255 - pixels, pixels))


@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "rand-m7-n3-tweights", "augmix-m3-w3", "original-mstd0.5"])
def test_a_policy_is_the_one_that_timm_trains_with(policy: str) -> None:
    transforms = build_transforms([policy], (SIZE, SIZE), MEAN)
    whole = create_transform(SIZE, is_training=True, auto_augment=policy, mean=MEAN, interpolation="random")
    reference = next(step for step in whole.transforms if type(step).__module__ == "timm.data.auto_augment")
    assert transforms is not None
    results = []
    for seed in range(12):
        picture = Image.fromarray(noise(seed).permute(1, 2, 0).numpy())
        with seeded_everywhere(seed):
            expected = numpy.array(reference(picture))
        results.append(transforms(noise(seed), seed))
        assert numpy.array_equal(results[-1].permute(1, 2, 0).numpy(), expected)
    assert sum(not torch.equal(result, noise(seed)) for seed, result in enumerate(results)) > 6


@pytest.mark.parametrize("policy", ["rand-m10-n6-inc1-p1", "rand-m0-n6-p1", "augmix-m10-mstd0", "v0r"])
def test_a_policy_works_at_its_highest_magnitude_too(policy: str) -> None:
    """Posterize keeps no bit of a colour then, which Pillow refuses."""
    transforms = build_transforms([policy], (SIZE, SIZE), MEAN)
    assert transforms is not None
    assert len({transforms(noise(), seed).numpy().tobytes() for seed in range(100)}) > 30


def test_containers_hold_items_of_the_same_form() -> None:
    item = {"RandomApply": {"transforms": [{"Grayscale": {"num_output_channels": 3}}, "rand-m9"], "p": 1.0}}
    transforms = build_transforms([item], (SIZE, SIZE), MEAN)
    assert transforms is not None
    with seeded_everywhere(4):
        grey = v2.Grayscale(3)(noise())
    assert not torch.equal(transforms(noise(), 4), noise())
    only = build_transforms(
        [{"RandomApply": {"transforms": item["RandomApply"]["transforms"][:1], "p": 1}}], (SIZE, SIZE), MEAN
    )
    assert only is not None and torch.equal(only(noise(), 4), grey)


def test_words_stand_for_the_constants_of_torchvision() -> None:
    transforms = build_transforms(
        [{"RandomRotation": {"degrees": 30, "interpolation": "bilinear"}}], (SIZE, SIZE), MEAN
    )
    assert transforms is not None
    torch.manual_seed(8)
    expected = v2.RandomRotation(30, interpolation=v2.InterpolationMode.BILINEAR)(noise())
    assert torch.equal(transforms(noise(), 8), expected)


@pytest.mark.parametrize("augmentation", ["crop", "none"])
def test_evaluation_does_not_see_them_and_training_does_with_and_without_the_crop(
    augmentation: str, table: Path, model: ClipModel
) -> None:
    invert = [{"RandomInvert": {"p": 1.0}}]
    plain = pictures_of(config_for(table, augmentation=augmentation), model, 0)
    inverted = pictures_of(config_for(table, augmentation=augmentation, transforms=invert), model, 0)
    assert torch.equal(inverted, 255 - plain)
    values = []
    for transforms in ([], invert):
        config = config_for(table, transforms=transforms, val=[str(table)])
        config = replace(config, output_dir=str(table.parent / f"run{len(transforms)}{augmentation}"))
        config = replace(config, train=TrainConfig(batch_size=8, steps=1, threads=1), track=TrackConfig(to=[], every=1))
        train(replace(config, eval=EvalConfig(every=100)))
        first, step, _ = (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()
        values.append((json.loads(first)["val/loss"], json.loads(step)["loss"]))
    assert values[0][0] == values[1][0] and values[0][1] != values[1][1]


# --- their randomness


def test_pictures_do_not_depend_on_workers_and_differ_by_epoch_and_sample(table: Path, model: ClipModel) -> None:
    config = config_for(table, augmentation="none", transforms=MANY)
    alone, in_workers = (pictures_of(config, model, workers) for workers in (0, 2))
    assert torch.equal(alone, in_workers)
    pair = Pair(Image.fromarray(noise().permute(1, 2, 0).numpy()), ("a",))
    preparation = preparation_for(model, config)
    images = [preparation.example(pair, "key", sample, epoch).image for sample in range(4) for epoch in range(4)]
    assert len({image.numpy().tobytes() for image in images}) == 16
    other = preparation_for(model, replace(config, seed=6)).example(pair, "key", 0, 0).image
    assert not torch.equal(other, images[0])


def test_global_generators_are_neither_read_nor_changed(table: Path, model: ClipModel) -> None:
    preparation = preparation_for(model, config_for(table, transforms=[*MANY, "RandAugment", "AugMix"]))
    pair = open_source(str(table), DataConfig())[0]
    images = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        random.seed(seed)
        numpy.random.seed(seed)
        before = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()
        images.append(preparation.example(pair, "0.png", 0, 0).image)
        after = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()
        assert torch.equal(before[0], after[0]) and before[1:] == after[1:]
    assert torch.equal(*images)


def test_generators_come_back_after_an_error() -> None:
    states = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()
    with pytest.raises(RuntimeError), seeded_everywhere(2**62 + 5):
        assert (torch.rand(1).item(), random.random(), numpy.random.rand()) != (0, 0, 0)
        raise RuntimeError
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (random.getstate(), numpy.random.get_state()[1].tolist())


def test_they_go_through_pickle_as_to_a_worker_that_is_not_forked() -> None:
    transforms = build_transforms([*MANY, {"RandomChoice": {"transforms": ["RandAugment", "v0"]}}], (SIZE, SIZE), MEAN)
    assert transforms is not None
    copied = pickle.loads(pickle.dumps(transforms))
    assert all(torch.equal(copied(noise(), seed), transforms(noise(), seed)) for seed in range(5))


# --- what is refused


REFUSED: list[tuple[Any, str]] = [
    ("randomhorizontalflip", "unknown transform 'randomhorizontalflip', did you mean 'RandomHorizontalFlip'"),
    ("RandAugmen", "did you mean 'RandAugment'"),
    ("random-m9", "did you mean 'rand'"),
    ("rand-m9-foo", "'rand-m9-foo': unknown part 'foo'; after rand come mNUMBER"),
    ("rand-m9-w0.5", "unknown part 'w0.5'"),
    ("rand-m9-twrong", "unknown part 'twrong'"),
    ("rand-m9.5", "'rand-m9.5' is no policy that timm knows"),
    ("augmix-m3-n2", "unknown part 'n2'"),
    ("original-m9", "unknown part 'm9'"),
    ({"rand-m9": {"n": 2}}, "takes no options"),
    ({"ColorJitter": {"brightnes": 0.4}}, "ColorJitter: unknown option 'brightnes', did you mean 'brightness'"),
    ({"ColorJitter": {"brightness": "strong"}}, "ColorJitter: brightness=strong"),
    ({"GaussianBlur": {"kernel_size": 4}}, "GaussianBlur: Kernel size"),
    ("GaussianBlur", "missing .*'kernel_size'"),
    ({"RandomRotation": {"degrees": 9, "interpolation": "bicubicc"}}, "unknown 'bicubicc', did you mean 'bicubic'"),
    ({"AutoAugment": {"policy": "cifar"}}, "did you mean 'cifar10'"),
    ("MixUp", "MixUp mixes pictures"),
    ({"CutMix": {"num_classes": 3}}, "CutMix mixes pictures"),
    ({"Normalize": {"mean": [0.5, 0.5, 0.5], "std": [1, 1, 1]}}, "number 2, Normalize: it cannot be applied"),
    ("ConvertImageDtype", "it makes float32 .* of uint8 .*mean and std are applied afterwards"),
    ("ToPILImage", "it makes Image of uint8"),
    ("ToImage", "it makes Image of uint8"),
    ("Grayscale", r"it makes uint8 \[1, 32, 32\] of uint8 \[3, 32, 32\]"),
    ({"Resize": {"size": 16}}, r"it makes uint8 \[3, 16, 16\]"),
    ({"RandomCrop": {"size": 64}}, "larger than input image size"),
    ("RandomZoomOut", "RandomZoomOut: it makes"),  # which changes the size every other time
    ({"FiveCrop": {"size": 32}}, "it makes tuple"),
    ("RandomIoUCrop", "bounding boxes"),
    ({"RandomErasing": {"inplace": True}}, "in place"),
    ({"RandomApply": {"transforms": ["Grayscal"]}}, "did you mean 'Grayscale'"),
    ({"RandomApply": {"transforms": "Grayscale", "p": 0.5}}, r"it makes uint8 \[1, 32, 32\]"),
    ({"ColorJitter": [0.4]}, "write {ColorJitter: {option: value}}"),
    ({"ColorJitter": {}, "Grayscale": {}}, "an item is a name"),
]


@pytest.mark.parametrize(("item", "message"), REFUSED, ids=str)
def test_what_does_not_work_is_refused_before_the_run(item: Any, message: str, table: Path) -> None:
    config = replace(config_for(table, transforms=["RandomHorizontalFlip", item]), output_dir=str(table.parent / "no"))
    with pytest.raises(ConfigError, match=rf"^data\.transforms: .*{message}") as caught:
        train(config)
    assert "\n" not in str(caught.value)
    assert not Path(config.output_dir).exists()


def test_the_size_is_that_of_the_model_whatever_sets_it(table: Path) -> None:
    crop = [{"RandomResizedCrop": {"size": 48, "scale": [0.3, 1]}}]
    config = config_for(table, transforms=crop)
    with pytest.raises(ConfigError, match=r"it makes uint8 \[3, 48, 48\] of uint8 \[3, 32, 32\]"):
        check_names(config, None)
    check_names(replace(config, model=replace(config.model, options={"force_image_size": 48})), None)


def test_names_are_looked_at_before_a_large_model_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    def not_called(*_: object, **__: object) -> None:
        raise AssertionError("a model was built")

    monkeypatch.setattr("open_clip.create_model", not_called)
    monkeypatch.setattr("open_clip.factory.create_model", not_called)
    with pytest.raises(ConfigError):
        check_names(Config(data=DataConfig(transforms=["RandAugmen"]), model=ModelConfig("ViT-H-14")), None)


def test_features_of_pictures_that_change_cannot_be_kept() -> None:
    settings = {"model": ModelConfig(freeze=["image"]), "train": TrainConfig(cache_features=True)}
    with pytest.raises(ConfigError, match=r"data\.transforms: .*train\.cache_features"):
        Config(data=DataConfig(transforms=["RandAugment"], augmentation="none"), **settings)
    Config(data=DataConfig(augmentation="none"), **settings)
    settings["model"] = ModelConfig(freeze=["text"])
    Config(data=DataConfig(transforms=["RandAugment"]), **settings)


def test_flags_and_files_name_them_and_settings_load_back(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("data:\n  transforms:\n    - RandomHorizontalFlip\n    - ColorJitter: {brightness: 0.4}\n")
    from_file = parse_config(["--config", str(file)], "train.py", "")
    words = ["--data.transforms", "[RandomHorizontalFlip, {ColorJitter: {brightness: 0.4}}]"]
    assert from_file.data.transforms == parse_config(words, "train.py", "").data.transforms
    assert from_file.data.transforms == ["RandomHorizontalFlip", {"ColorJitter": {"brightness": 0.4}}]
    assert parse_config(["--data.transforms", "rand-m9"], "train.py", "").data.transforms == ["rand-m9"]
    alone = parse_config(["--data.transforms", "{RandomErasing: {p: 0.1}}"], "train.py", "")
    assert alone.data.transforms == [{"RandomErasing": {"p": 0.1}}]
    for config in (from_file, alone):
        save_config(config, tmp_path / "config.yaml")
        assert load_config(tmp_path / "config.yaml") == config
