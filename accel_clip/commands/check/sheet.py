"""The first pairs of each source as training sees them: the pictures augmented, the captions as they are tokenized.

`accel-clip check --show FOLDER` writes them as a page for people to look at, `FOLDER/index.html` (see `page`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from accel_clip.commands.check.page import PagePair, PageSection, page
from accel_clip.commands.check.parts import PlannedParts
from accel_clip.commands.check.sample import StreamBeginning
from accel_clip.console import say
from accel_clip.data.bad_samples import UnusableSample
from accel_clip.data.captions import choose_caption, is_caption_cut
from accel_clip.data.examples import Preparation, preparation_for
from accel_clip.data.feed import Feed
from accel_clip.data.sources.base import Source
from accel_clip.data.sources.combine import Concatenated, source_names
from accel_clip.faults import StorageError
from accel_clip.files.kinds import CONTACT_SHEET
from accel_clip.files.marked import Draft
from accel_clip.files.whole import write_text

MOST_PAIRS = 24
FIRST_EPOCH = 0


@dataclass(frozen=True)
class FirstPairs:
    """The first pairs of one source."""

    name: str
    """the source's"""
    source: Source
    """what the pairs are fetched from"""
    indices: range
    """their places in it, which are what training draws their augmentation by"""


def write_sheet(parts: PlannedParts, folder: Path) -> Path:
    """Write the page for a run, in place of an earlier one, and return it; raises `StorageError`."""
    preparation = preparation_for(parts.model, parts.config)
    sections = [PageSection(each.name, page_pairs(each, preparation)) for each in first_pairs(parts.data.feed)]
    try:
        with Draft(folder, CONTACT_SHEET) as draft:
            write_text(draft.path / "index.html", page(sections))
            draft.publish()
    except OSError as error:
        raise StorageError(f"--show: {folder} could not be written: {error}") from error
    say(f"pictures and captions as training sees them: {folder / 'index.html'}")
    return folder / "index.html"


def first_pairs(feed: Feed) -> Iterator[FirstPairs]:
    """Yield the first pairs of each source of a run."""
    if feed.fetched is not None:
        source = feed.fetched.source
        starts = [0, *source.ends[:-1]] if isinstance(source, Concatenated) else [0]
        ends = source.ends if isinstance(source, Concatenated) else [len(source)]
        for name, start, end in zip(source_names(source), starts, ends, strict=True):
            yield FirstPairs(name, source, range(start, min(end, start + MOST_PAIRS)))
    for part in feed.streams:
        beginning = StreamBeginning(part.stream, MOST_PAIRS)
        yield FirstPairs(part.name, beginning, range(min(len(beginning), MOST_PAIRS)))


def page_pairs(first: FirstPairs, preparation: Preparation) -> list[PagePair]:
    """Return what is seen of each pair, or what is wrong with it."""
    return [page_pair(first.source, index, preparation) for index in first.indices]


def page_pair(source: Source, index: int, preparation: Preparation) -> PagePair:
    """Return what training sees of a pair in its first epoch, or what is wrong with it."""
    try:
        pair = source[index]
        example = preparation.example(pair, source.key(index), index, FIRST_EPOCH)
        caption = choose_caption(pair.captions, preparation.seed, FIRST_EPOCH, index, pair.weights)
    except UnusableSample as problem:
        return PagePair(problem=f"{problem.reason}: {problem.detail}")
    kept = len(caption) if not example.is_cut else length_read(caption, preparation.tokenizer)
    read = text_of(example.tokens, preparation.tokenizer)
    return PagePair(picture_of(example.image), caption[:kept], caption[kept:], read, len(pair.captions))


def picture_of(pixels: Tensor) -> Image.Image:
    """Return pixels, uint8 [3, H, W], as a picture."""
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def length_read(caption: str, tokenizer: Callable[..., Tensor]) -> int:
    """Return how many characters of a caption have room in its tokens."""
    low, high = 0, len(caption)
    while low < high:
        middle = (low + high + 1) // 2
        part = caption[:middle]
        low, high = (low, middle - 1) if is_caption_cut(part, tokenizer([part])[0], tokenizer) else (middle, high)
    return low


def text_of(tokens: Tensor, tokenizer: Any) -> str | None:
    """Return the text that tokens, int [L], stand for, None for a tokenizer that cannot say."""
    library = getattr(tokenizer, "tokenizer", None)
    if library is not None:
        return str(library.decode(tokens.tolist(), skip_special_tokens=True)).strip()
    start, end = getattr(tokenizer, "sot_token_id", None), getattr(tokenizer, "eot_token_id", None)
    if start is None or end is None or not hasattr(tokenizer, "decode"):
        return None
    numbers = tokens.tolist()
    inside = numbers[: numbers.index(end)] if end in numbers else numbers
    return str(tokenizer.decode([number for number in inside if number != start])).strip()
