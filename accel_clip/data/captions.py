"""From a pair's captions to the tokens of one of them."""

from __future__ import annotations

from accel_clip.data.bad_samples import UnusableSample
from accel_clip.randomness import derive_seed


def choose_caption(captions: tuple[str, ...], seed: int, epoch: int, sample: int) -> str:
    """Return one of a sample's captions, drawn by (seed, epoch, sample); raises `UnusableSample` without any."""
    if not captions:
        raise UnusableSample("no_caption", "the caption is empty or missing")
    return captions[derive_seed(seed, "caption", epoch, sample) % len(captions)]


def hash_of(kind: str, identity: str) -> int:
    """Return a 63-bit number that equal captions, or keys of pictures, share."""
    return derive_seed(kind, identity)
