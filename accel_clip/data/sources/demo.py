"""The built-in demo: drawn scenes with captions that say all of them, and held-out scenes that combine anew.

`demo` draws one object: its shape, colour, size, place and background. `demo:pairs` draws two in relation. Every
drawing differs a little in position, size, hue and rotation. The held-out part holds combinations that training never
draws; each shape, colour, size, place, background and relation on its own is drawn in training.
"""

from __future__ import annotations

import colorsys
import hashlib
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Protocol, TypeVar

from PIL import Image, ImageDraw

from accel_clip.config import SourceConfig
from accel_clip.data.sources.base import SOURCES, Pair, Source
from accel_clip.faults import ConfigError

SIDE = 64  # pixels
SMOOTHING = 4  # masks are drawn this many times larger
NUM_HELD_OUT = 256
NUM_DRAWINGS = 7  # of each scene of training: with 1,664 of them an epoch is 45 batches of 256
PAIR_DISTANCE = 0.23  # of two objects from the middle, as a share of the side
PAIR_RADIUS = 0.15
Point = tuple[float, float]
T = TypeVar("T")


def corners(number: int, radius: float = 1.0, turned_degrees: float = -90.0) -> list[Point]:
    """Return the corners of a regular polygon around the origin, the first one at the top."""
    angles = [math.radians(turned_degrees + 360 * corner / number) for corner in range(number)]
    return [(radius * math.cos(angle), radius * math.sin(angle)) for angle in angles]


def star_corners(points: int, inner_radius: float) -> list[Point]:
    """Return the corners of a star."""
    inner = corners(points, inner_radius, -90 + 180 / points)
    return [corner for both in zip(corners(points), inner, strict=True) for corner in both]


def ring_corners(inner_radius: float) -> list[Point]:
    """Return the outline of a ring: around, inwards, and around the other way."""
    outer, inner = corners(32), corners(32, inner_radius)
    return [*outer, outer[0], inner[0], *reversed(inner)]


def cross_corners(arm: float) -> list[Point]:
    """Return the outline of a cross with arms of twice that width."""
    quarter = [(-arm, -1.0), (arm, -1.0), (arm, -arm)]
    turns = [(lambda x, y: (x, y)), (lambda x, y: (-y, x)), (lambda x, y: (-x, -y)), (lambda x, y: (y, -x))]
    return [turn(*corner) for turn in turns for corner in quarter]


SHAPES = {
    "circle": corners(32),
    "square": corners(4, 1.2, 45),
    "triangle": corners(3, 1.2),
    "star": star_corners(5, 0.4),
    "cross": cross_corners(0.3),
    "ring": ring_corners(0.55),
}
COLOURS = {  # hue in degrees, saturation, value
    "red": (0, 0.95, 0.9),
    "orange": (28, 0.95, 1.0),
    "yellow": (54, 0.9, 1.0),
    "green": (125, 0.85, 0.6),
    "cyan": (182, 0.85, 0.95),
    "blue": (225, 0.9, 0.9),
    "purple": (278, 0.8, 0.7),
    "pink": (328, 0.5, 1.0),
}
SIZES = {"small": 0.12, "large": 0.24}  # radius as a share of the picture's side
PLACES = {
    "in the middle": (0.5, 0.5),
    "at the top": (0.5, 0.28),
    "at the bottom": (0.5, 0.72),
    "on the left": (0.28, 0.5),
    "on the right": (0.72, 0.5),
}
BACKGROUNDS = {"white": (245, 245, 245), "grey": (135, 135, 135), "black": (18, 18, 18), "brown": (96, 60, 30)}
RELATIONS = {"left of": ("right of", (-1, 0)), "above": ("below", (0, -1))}  # opposite, and where the first object is


class Scene(Protocol):
    """A combination that can be put into words and drawn."""

    @property
    def captions(self) -> tuple[str, ...]:
        """Return what there is to see, in one or more wordings."""
        ...

    @property
    def label(self) -> str:
        """Return the shape, as a class name."""
        ...

    def draw(self, jitter: Random) -> Image.Image:
        """Return one drawing, RGB."""
        ...


@dataclass(frozen=True)
class OneObject:
    """One object on a background."""

    size: str
    """one of `SIZES`"""
    colour: str
    """one of `COLOURS`"""
    shape: str
    """one of `SHAPES`"""
    place: str
    """one of `PLACES`"""
    background: str
    """one of `BACKGROUNDS`"""

    @property
    def captions(self) -> tuple[str, ...]:
        """Return what there is to see."""
        return (f"a {self.size} {self.colour} {self.shape} {self.place} on a {self.background} background",)

    @property
    def label(self) -> str:
        """Return the shape."""
        return self.shape

    def draw(self, jitter: Random) -> Image.Image:
        """Return one drawing, RGB."""
        picture = paint_background(self.background, jitter)
        paint_object(picture, self.shape, self.colour, PLACES[self.place], SIZES[self.size], jitter)
        return picture


@dataclass(frozen=True)
class TwoObjects:
    """Two objects in relation."""

    first: tuple[str, str]
    """colour and shape"""
    relation: str
    """of the first to the second, one of `RELATIONS`"""
    second: tuple[str, str]
    """colour and shape"""
    background: str
    """one of `BACKGROUNDS`"""

    @property
    def captions(self) -> tuple[str, ...]:
        """Return what there is to see, from the first object to the second and the other way."""
        first, second = with_article(*self.first), with_article(*self.second)
        opposite, _ = RELATIONS[self.relation]
        ways = (f"{first} {self.relation} {second}", f"{second} {opposite} {first}")
        return tuple(f"{way} on a {self.background} background" for way in ways)

    @property
    def label(self) -> str:
        """Return the first object's shape."""
        return self.first[1]

    def draw(self, jitter: Random) -> Image.Image:
        """Return one drawing, RGB."""
        picture = paint_background(self.background, jitter)
        _, direction = RELATIONS[self.relation]
        across, down = (PAIR_DISTANCE * step for step in direction)
        for (colour, shape), side in ((self.first, 1), (self.second, -1)):
            paint_object(picture, shape, colour, (0.5 + side * across, 0.5 + side * down), PAIR_RADIUS, jitter)
        return picture


def with_article(colour: str, shape: str) -> str:
    """Return an object in words."""
    return f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} {shape}"


def paint_background(name: str, jitter: Random) -> Image.Image:
    """Return an empty picture of nearly the background's colour."""
    red, green, blue = (max(0, min(255, round(value + jitter.uniform(-10, 10)))) for value in BACKGROUNDS[name])
    return Image.new("RGB", (SIDE, SIDE), (red, green, blue))


def paint_object(picture: Image.Image, shape: str, colour: str, place: Point, radius: float, jitter: Random) -> None:
    """Paint one object, a little off in position (2 pixels), size (10 %), hue (6 degrees) and rotation (10 degrees)."""
    hue, saturation, value = COLOURS[colour]
    paint = colorsys.hsv_to_rgb(
        ((hue + jitter.uniform(-6, 6)) % 360) / 360, saturation, value * jitter.uniform(0.93, 1)
    )
    radius *= SIDE * jitter.uniform(0.9, 1.1)
    centre = [SIDE * share + jitter.uniform(-2, 2) for share in place]
    angle = math.radians(jitter.uniform(-10, 10))
    cosine, sine = radius * math.cos(angle), radius * math.sin(angle)
    half = math.ceil(1.3 * radius) + 1
    left, top = round(centre[0]) - half, round(centre[1]) - half
    outline = [
        ((centre[0] - left + cosine * x - sine * y) * SMOOTHING, (centre[1] - top + sine * x + cosine * y) * SMOOTHING)
        for x, y in SHAPES[shape]
    ]
    mask = Image.new("L", (2 * half * SMOOTHING, 2 * half * SMOOTHING))
    ImageDraw.Draw(mask).polygon(outline, fill=255)
    picture.paste(tuple(round(255 * channel) for channel in paint), (left, top), mask.reduce(SMOOTHING))


class DemoSource:
    """Drawings of scenes: drawing `index` is the same bytes every time, in every process."""

    def __init__(self, name: str, scenes: Sequence[Scene], num_drawings: int, held_out: Sequence[Scene] = ()) -> None:
        self.name, self.scenes, self.num_drawings, self.held_out_scenes = name, scenes, num_drawings, held_out

    def __len__(self) -> int:
        return len(self.scenes) * self.num_drawings

    def __getitem__(self, index: int) -> Pair:
        scene = self.scenes[index % len(self.scenes)]
        return Pair(scene.draw(Random(self.key(index))), scene.captions, scene.label)

    def key(self, index: int) -> str:
        """Return the identity of a drawing."""
        return f"{self.name} {index}"

    def held_out(self) -> Source:
        """Return one drawing of each combination that training never draws."""
        return DemoSource(f"{self.name} (held out)", self.held_out_scenes, 1)


@SOURCES.register("demo")
def open_demo(argument: str, options: SourceConfig) -> Source:
    """Drawn scenes with captions: demo (one object) or demo:pairs (two in relation)."""
    match argument:
        case "":
            training, held_out = one_object_scenes()
            return DemoSource("demo", training, NUM_DRAWINGS, held_out)
        case "pairs":
            training, held_out = two_object_scenes()
            return DemoSource("demo:pairs", training, 1, held_out)
        case _:
            raise ConfigError(f"data.train: 'demo:{argument}' is no built-in demo: write demo or demo:pairs")


def one_object_scenes() -> tuple[list[Scene], list[Scene]]:
    """Return the scenes of training, and those held out."""
    combinations = shuffled_combinations(itertools.product(SIZES, COLOURS, SHAPES, PLACES, BACKGROUNDS))
    scenes: list[Scene] = [OneObject(*words) for words in combinations]
    return scenes[NUM_HELD_OUT:], scenes[:NUM_HELD_OUT]


def two_object_scenes() -> tuple[list[Scene], list[Scene]]:
    """Return the scenes of training, and those held out: all arrangements of objects never drawn together in training.

    Arrangements of the same two objects share a background: only which is where tells them apart.
    """
    couples = shuffled_combinations(itertools.combinations(itertools.product(COLOURS, SHAPES), 2))
    num_held_out = NUM_HELD_OUT // len(arrangements(couples[0], "grey"))
    held_out = zip(couples[:num_held_out], itertools.cycle(BACKGROUNDS))
    training = itertools.product(couples[num_held_out:], BACKGROUNDS)
    return [scene for each in training for scene in arrangements(*each)], [
        scene for each in held_out for scene in arrangements(*each)
    ]


def arrangements(couple: tuple[tuple[str, str], ...], background: str) -> list[Scene]:
    """Return the scenes of two objects: either may be the first, in every relation."""
    orders = itertools.product(itertools.permutations(couple), RELATIONS)
    return [TwoObjects(first, relation, second, background) for (first, second), relation in orders]


def shuffled_combinations(combinations: Iterable[T]) -> list[T]:
    """Return combinations in an order that is the same everywhere: by a hash of their words."""
    return sorted(combinations, key=lambda words: hashlib.sha256(repr(words).encode()).digest())
