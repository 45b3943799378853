"""From a pair's captions to the tokens of one of them."""

from __future__ import annotations

from accel_clip.data.bad_samples import UnusableSample
from accel_clip.randomness import derive_seed

LARGEST_CAPTION_BYTES = 1 << 16  # a tokenizer needs seconds for a few megabytes, of which it keeps a few words


def choose_caption(captions: tuple[str, ...], seed: int, epoch: int, sample: int) -> str:
    """Return one of a sample's captions, drawn by (seed, epoch, sample); raises `UnusableSample`."""
    if not captions:
        raise UnusableSample("no_caption", "the caption is empty or missing")
    require_size(captions)
    return captions[derive_seed(seed, "caption", epoch, sample) % len(captions)]


def require_size(captions: tuple[str, ...], path: str | None = None) -> tuple[str, ...]:
    """Return a sample's captions; raises `UnusableSample` when one of them is too large to be tokenized."""
    for caption in captions:
        if len(caption) > LARGEST_CAPTION_BYTES // 4 and len(caption.encode()) > LARGEST_CAPTION_BYTES:
            raise caption_too_large(f"the caption has {len(caption):,} characters", path)
    return captions


def caption_too_large(size: str, path: str | None) -> UnusableSample:
    """Return the error for a caption, or a file of captions, above the limit."""
    return UnusableSample("caption_too_large", f"{size}, and at most {LARGEST_CAPTION_BYTES:,} bytes are read", path)


def hash_of(kind: str, identity: str) -> int:
    """Return a 63-bit number that equal captions, or keys of pictures, share."""
    return derive_seed(kind, identity)
