"""The demo's pictures show what their captions say, are the same everywhere, and the held-out ones are new."""

from __future__ import annotations

import colorsys
import hashlib
import os
import re
import subprocess
import sys

import numpy
import pytest

from accel_clip.config import DataConfig, ModelConfig, SourceConfig
from accel_clip.data.pairs import open_training
from accel_clip.data.sources.demo import DemoSource, open_demo
from accel_clip.faults import ConfigError
from accel_clip.models.build import build_model
from helpers.commands import ROOT

HUES = {"red": 0, "orange": 28, "yellow": 54, "green": 125, "cyan": 182, "blue": 225, "purple": 278, "pink": 328}
BRIGHTNESS = {"white": (225, 255), "grey": (115, 155), "brown": (45, 80), "black": (0, 35)}
CENTRES = {"in the middle": (32, 32), "at the top": (32, 18), "at the bottom": (32, 46)} | {
    "on the left": (18, 32),
    "on the right": (46, 32),
}
ONE = re.compile(r"a (small|large) (\w+) (\w+) (.+) on a (\w+) background")
TWO = re.compile(r"an? (\w+) (\w+) (left of|right of|above|below) an? (\w+) (\w+) on a (\w+) background")
DIGEST = """
import hashlib
from accel_clip.config import SourceConfig
from accel_clip.data.sources.demo import open_demo
for argument in ("", "pairs"):
    source = open_demo(argument, SourceConfig("demo"))
    for part, index in ((source, 3), (source, len(source) - 1), (source.held_out(), 7)):
        pair = part[index]
        print(hashlib.sha256(pair.image.tobytes() + repr(pair.captions).encode()).hexdigest())
"""


def opened(argument: str) -> tuple[DemoSource, DemoSource]:
    training = open_demo(argument, SourceConfig("demo"))
    assert isinstance(training, DemoSource)
    held_out = training.held_out()
    assert isinstance(held_out, DemoSource)
    return training, held_out


def captions_of(source: DemoSource) -> list[str]:
    return [caption for scene in source.scenes for caption in scene.captions]


def object_mask(pixels: numpy.ndarray) -> numpy.ndarray:
    """Return where a picture differs from its corner, which is background in all of them."""
    return numpy.abs(pixels - pixels[0, 0]).max(axis=-1) > 40


def assert_colour(colours: numpy.ndarray, name: str) -> None:
    hue = 360 * colorsys.rgb_to_hsv(*(numpy.median(colours, axis=0) / 255))[0]
    distance = {word: abs((hue - reference + 180) % 360 - 180) for word, reference in HUES.items()}
    assert min(distance, key=distance.__getitem__) == name


def assert_background(pixels: numpy.ndarray, name: str) -> None:
    lowest, highest = BRIGHTNESS[name]
    assert lowest <= pixels[0, 0].mean() <= highest


@pytest.mark.parametrize("part", ["training", "held out"])
def test_the_object_is_what_the_caption_says(part: str) -> None:
    source = dict(zip(("training", "held out"), opened(""), strict=True))[part]
    radii: dict[str, list[float]] = {"small": [], "large": []}
    for index in range(256):
        pair = source[index]
        words = ONE.fullmatch(pair.captions[0])
        assert words
        size, colour, shape, place, background = words.groups()
        pixels = numpy.asarray(pair.image, dtype=float)
        mask = object_mask(pixels)
        rows, columns = mask.nonzero()
        across, down = CENTRES[place]
        assert abs(columns.mean() + 0.5 - across) < 4.5 and abs(rows.mean() + 0.5 - down) < 4.5
        assert_colour(pixels[mask], colour)
        assert_background(pixels, background)
        assert pair.label == shape
        radii[size].append((numpy.ptp(columns) + numpy.ptp(rows)) / 4)
    assert max(radii["small"]) < min(radii["large"])


def test_shapes_have_their_outlines() -> None:
    expected = {"circle": (0.85, 1.1), "square": (0.55, 0.75), "cross": (0.5, 0.7)} | {
        "triangle": (0.35, 0.5),
        "star": (0.3, 0.45),
        "ring": (0.5, 0.8),
    }
    training, _ = opened("")
    seen = set()
    for index, scene in enumerate(training.scenes):
        words = ONE.fullmatch(scene.captions[0])
        assert words
        size, _, shape, place, background = words.groups()
        if (size, place, background) != ("large", "in the middle", "black"):
            continue
        seen.add(shape)
        mask = object_mask(numpy.asarray(training[index].image, dtype=float))
        rows, columns = mask.nonzero()
        middle = rows.mean(), columns.mean()
        reach = numpy.hypot(rows - middle[0], columns - middle[1]).max() + 0.5
        lowest, highest = expected[shape]
        assert lowest < mask.sum() / (numpy.pi * reach**2) < highest, shape
        assert mask[round(middle[0]), round(middle[1])] == (shape != "ring")
    assert seen == set(expected)


@pytest.mark.parametrize("part", ["training", "held out"])
def test_two_objects_stand_as_every_wording_says(part: str) -> None:
    source = dict(zip(("training", "held out"), opened("pairs"), strict=True))[part]
    halves = {"left of": (slice(None), slice(32)), "right of": (slice(None), slice(32, None))} | {
        "above": (slice(32), slice(None)),
        "below": (slice(32, None), slice(None)),
    }
    opposites = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    relations = set()
    for index in range(256):
        pair = source[index]
        pixels = numpy.asarray(pair.image, dtype=float)
        mask = object_mask(pixels)
        for caption in pair.captions:
            words = TWO.fullmatch(caption)
            assert words
            colour, _, relation, other_colour, _, background = words.groups()
            relations.add(relation)
            for name, where in ((colour, halves[relation]), (other_colour, halves[opposites[relation]])):
                assert_colour(pixels[where][mask[where]], name)
            assert_background(pixels, background)
    assert relations == set(opposites)


@pytest.mark.parametrize("argument", ["", "pairs"])
def test_held_out_scenes_are_distinct_and_never_drawn_in_training(argument: str) -> None:
    training, held_out = opened(argument)
    captions = [held_out[index].captions[0] for index in range(len(held_out))]
    assert len(captions) == len(set(captions)) == len({held_out.key(i) for i in range(len(held_out))}) == 256
    assert not set(captions_of(held_out)) & set(captions_of(training))
    assert set(" ".join(captions_of(held_out)).split()) <= set(" ".join(captions_of(training)).split())


def test_every_attribute_is_drawn_in_training_and_held_out() -> None:
    for source in opened(""):
        matches = [ONE.fullmatch(caption) for caption in captions_of(source)]
        assert all(matches)
        values = [set(column) for column in zip(*(match.groups() for match in matches if match), strict=True)]
        assert [len(column) for column in values] == [2, 8, 6, 5, 4]


def test_objects_of_held_out_pairs_are_never_together_in_training() -> None:
    training, held_out = ({couple(caption) for caption in captions_of(source)} for source in opened("pairs"))
    assert len(held_out) == 64
    assert not training & held_out
    assert {one for both in held_out for one in both} <= {one for both in training for one in both}


def couple(caption: str) -> frozenset[tuple[str, str]]:
    """Return the two objects of a caption, whichever is named first."""
    words = TWO.fullmatch(caption)
    assert words
    colour, shape, _, other_colour, other_shape, _ = words.groups()
    return frozenset({(colour, shape), (other_colour, other_shape)})


def test_pictures_are_the_same_in_another_process() -> None:
    first, second = (
        subprocess.run(
            [sys.executable, "-c", DIGEST],
            check=True,
            capture_output=True,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
        )
        for hash_seed in ("1", "2")
    )
    assert first.stdout == second.stdout
    assert len(set(first.stdout.split())) == 6
    pair = opened("")[0][3]
    digest = hashlib.sha256(pair.image.tobytes() + repr(pair.captions).encode()).hexdigest()  # type: ignore[union-attr]
    assert digest == first.stdout.split()[0]


def test_drawings_of_one_scene_differ() -> None:
    training, _ = opened("")
    again = len(training.scenes)
    first, second = training[5], training[5 + again]
    assert first.captions == second.captions
    assert first.image.tobytes() != second.image.tobytes()  # type: ignore[union-attr]
    assert training.key(5) != training.key(5 + again)


@pytest.mark.parametrize("argument", ["", "pairs"])
def test_captions_fit_the_tiny_model(argument: str) -> None:
    model = build_model(ModelConfig(name="tiny"))
    captions = sorted({caption for source in opened(argument) for caption in captions_of(source)}, key=len)[-200:]
    tokens = model.tokenizer(captions)
    assert (tokens[:, -1] == 0).all()  # padded, so nothing was cut off


def test_an_unknown_demo_is_refused_with_the_way_out() -> None:
    with pytest.raises(ConfigError, match=r"demo:triples.*demo:pairs"):
        open_demo("triples", SourceConfig("demo:triples"))


@pytest.mark.parametrize("name", ["demo", "demo:pairs"])
def test_as_validation_data_the_demo_is_its_held_out_part(name: str) -> None:
    found = open_training(DataConfig(train=[name], val=[name]))
    training, held_out = found.source, found.held_out
    assert held_out is not None and len(held_out) == 256
    drawn = {training[index].captions for index in range(0, len(training), 7)}
    assert not drawn & {held_out[index].captions for index in range(256)}
