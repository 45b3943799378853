"""From a pair's captions to the tokens of one of them."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any

from open_clip.tokenizer import get_clean_fn
from torch import Tensor

from accel_clip.data.bad_samples import UnusableSample
from accel_clip.randomness import derive_seed, fraction_of

LARGEST_CAPTION_BYTES = 1 << 16  # a tokenizer needs seconds for a few megabytes, of which it keeps a few words


def choose_caption(
    captions: tuple[str, ...], seed: int, epoch: int, sample: int, weights: tuple[float, ...] = ()
) -> str:
    """Return one of a sample's captions, drawn by (seed, epoch, sample); raises `UnusableSample`.

    weights: how often each is drawn beside the others, above 0; without any, all alike.
    """
    if not captions:
        raise UnusableSample("no_caption", "the caption is empty or missing")
    require_caption_size(captions)
    if not weights:
        return captions[derive_seed(seed, "caption", epoch, sample) % len(captions)]
    *ends, total = accumulate(weights)
    return captions[bisect(ends, total * fraction_of(seed, "caption", epoch, sample))]


def weighted(
    texts_by_key: Mapping[str, Sequence[str]], weights: Mapping[str, float]
) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """Return a sample's captions, key after key, and how often each is shown beside the others.

    Texts lose the white space around them, and empty ones are left out. A key shares its weight equally among its
    texts; one without any leaves its share to the others. Without weights that differ the second is empty: every
    caption is shown as often as the next, however many its key has.
    """
    stripped = {key: [text.strip() for text in texts if text.strip()] for key, texts in texts_by_key.items()}
    captions = tuple(text for texts in stripped.values() for text in texts)
    if len(set(weights.values())) < 2:
        return captions, ()
    return captions, tuple(weights[key] / len(texts) for key, texts in stripped.items() for _ in texts)


def require_caption_size(captions: tuple[str, ...], path: str | None = None) -> tuple[str, ...]:
    """Return a sample's captions; raises `UnusableSample` when one of them is too large to be tokenized."""
    for caption in captions:
        if len(caption) > LARGEST_CAPTION_BYTES // 4 and len(caption.encode()) > LARGEST_CAPTION_BYTES:
            raise caption_too_large(f"the caption has {len(caption):,} characters", path)
    return captions


def caption_too_large(size: str, path: str | None) -> UnusableSample:
    """Return the error for a caption, or a file of captions, above the limit."""
    return UnusableSample("caption_too_large", f"{size}, and at most {LARGEST_CAPTION_BYTES:,} bytes are read", path)


def is_caption_cut(caption: str, tokens: Tensor, tokenizer: Callable[..., Tensor]) -> bool:
    """Return whether a caption has more tokens, those around its text included, than a row of them [L] takes.

    tokenizer: one of open_clip, with its own vocabulary or that of a library inside; a plain function has a limit that
    only it knows, and cuts nothing. A row that ends with padding had room for all, which spares most captions a second
    look; one place of it may be an end that looks like padding.
    """
    library: Any = getattr(tokenizer, "tokenizer", None)
    padding = 0 if library is None else library.pad_token_id
    knows = library is not None or hasattr(tokenizer, "encode")
    if not knows or bool((tokens[-2:] == padding).all()):
        return False
    return num_tokens(caption, tokenizer, library) > len(tokens)


def num_tokens(caption: str, tokenizer: Any, library: Any) -> int:
    """Return how many tokens a caption has, those around its text included, where nothing is cut off."""
    if library is None:
        return len(tokenizer.encode(caption)) + 2
    clean = getattr(tokenizer, "clean_fn", None) or get_clean_fn("canonicalize")
    brings_its_own = getattr(tokenizer, "tokenizer_mode", "") == "clips"  # three, instead of those of the library
    found = library(clean(caption), add_special_tokens=not brings_its_own, verbose=False).input_ids
    return len(found) + 3 * brings_its_own


def identity_hash(kind: str, identity: str) -> int:
    """Return a 63-bit number that equal captions, or keys of pictures, share."""
    return derive_seed(kind, identity)
