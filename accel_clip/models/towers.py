"""The two towers, each alone: pictures to features, captions to features without the work of padding and repetition.

A causal text tower that pools at the end token never looks at what follows it, so these are exact and cost less:

1. Encode equal captions once (`unique_captions`), where the tower is deterministic (`is_deterministic`).
2. Sort captions by length and cut them into chunks (`text_chunks`).
3. Divide each chunk into groups of nearly equal length and trim each to its own longest caption (`length_groups`),
   where the model allows it (`can_trim`).
4. Encode the groups with the rows of the positional embedding and of the causal mask that are left (`encode_text`).

All but `encode_text` and `encode_image` read values of tokens: call them on the CPU, outside a compiled forward.
Shapes: b captions, L tokens, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from open_clip import CLIP, CustomTextCLIP
from open_clip.transformer import TextTransformer, text_global_pool
from torch import Tensor, nn
from torch.nn import functional

from accel_clip.models.last_block import can_run_at, encode_first_token, pools_first_token, run_at
from accel_clip.randomness import seeded

LARGEST_DIFFERENCE = 1e-5  # between unit-norm features at full and at trimmed length; rounding in float32 is near 1e-7
PROBES = ("a", "a frog on a leaf", "two birds, " * 5, "a photo of a very " + "very " * 500 + "long train")
RATE_NAMES = ("p", "prob")  # what modules named ...Drop... call their rate, beside names that say drop


def encode_image(clip: Any, pixels: Tensor) -> Tensor:
    """Return unit-norm features [b, D] of normalised pictures, float [b, 3, H, W]."""
    if isinstance(clip, (CLIP, CustomTextCLIP)) and pools_first_token(clip.visual):
        return functional.normalize(encode_first_token(clip.visual, pixels), dim=-1)
    return clip.encode_image(pixels, normalize=True)


def encode_text(clip: Any, *groups: Tensor) -> Tensor:
    """Return unit-norm features [b, D] of captions, int [n, L] a group: what `clip.encode_text` gives at full length.

    L may differ between groups and be shorter than the context when `can_trim` says so of the model; else tokens come
    at full length.
    """
    tower = own_text_tower(clip)
    if tower is None or all(tokens.shape[1] == tower.context_length for tokens in groups):
        return clip.encode_text(torch.cat(groups), normalize=True)
    assert ignores_what_follows(tower), f"this text tower takes {tower.context_length} tokens a caption"
    return functional.normalize(encode_shorter_text(tower, groups), dim=-1)


def can_trim(clip: Any, tokenizer: Callable[[list[str]], Tensor]) -> bool:
    """Return whether trimmed captions have the features of untrimmed ones: by structure, and tried on a few captions.

    Call it on a float32 model, before its products are rounded to TF32 or less. Leaves no trace in weights, modes or
    randomness.
    """
    tower = own_text_tower(clip)
    if tower is None or not ignores_what_follows(tower):
        return False
    with evaluation_mode(clip), torch.no_grad(), seeded(0):
        tokens = tokenizer(list(PROBES)).to(tower.positional_embedding.device)
        full = clip.encode_text(tokens, normalize=True)
        alone = [encode_text(clip, trimmed(row, end_token(clip))) for row in tokens.split(1)]
        difference = (torch.cat(alone) - full).norm(dim=-1)
    return bool((difference <= LARGEST_DIFFERENCE).all())  # NaN is no agreement


def end_token(clip: Any) -> int | None:
    """Return the token at whose first place the text tower pools; None where that is the largest one of a caption."""
    tower = own_text_tower(clip)
    return None if tower is None else pooling(tower)[1]


def caption_lengths(tokens: Tensor, end: int | None = None) -> Tensor:
    """Return how many tokens of each caption reach its features, int64 [b]: all to the end token, with it.

    tokens: int [b, L]; end: the model's `end_token`.
    """
    marks = tokens if end is None else (tokens == end).int()
    return marks.argmax(dim=-1) + 1  # of equal values the first, as in open_clip's pooling


def trimmed(tokens: Tensor, end: int | None = None) -> Tensor:
    """Return the tokens [b, longest] without the places that none of the captions [b, L] reaches."""
    return tokens[:, : int(caption_lengths(tokens, end).max())]


def text_chunks(tokens: Tensor, max_rows: int, end: int | None = None) -> list[Tensor]:
    """Return the rows of captions [b, L] from the shortest to the longest in chunks, each int64 [<= max_rows].

    Captions of equal length keep their order.
    """
    return list(caption_lengths(tokens, end).argsort(stable=True).split(max_rows))


def length_groups(tokens: Tensor, cost_of_a_group: int, end: int | None = None) -> list[Tensor]:
    """Return captions [b, L], sorted by length, as trimmed groups [n, longest] that cost least together.

    A group costs its tokens, padding included, and `cost_of_a_group` tokens for what does not depend on its size.
    The cheapest way to end a group at each length is found from the shortest on: with u lengths that is u²/2 sums.
    """
    lengths, counts = caption_lengths(tokens, end).unique_consecutive(return_counts=True)
    ends = [0, *counts.cumsum(0).tolist()]
    cheapest, starts = [0], [0]
    for last, length in enumerate(lengths.tolist()):
        costs = [cheapest[i] + cost_of_a_group + length * (ends[last + 1] - ends[i]) for i in range(last + 1)]
        cheapest.append(min(costs))
        starts.append(costs.index(cheapest[-1]))
    groups: list[Tensor] = []
    stop = len(lengths)
    while stop:
        groups.insert(0, tokens[ends[starts[stop]] : ends[stop], : int(lengths[stop - 1])])
        stop = starts[stop]
    return groups


def unique_captions(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Return the different captions [u, L] in order of first appearance, and where each row is among them, int64 [b].

    `unique[inverse]` is `tokens`; where no two are equal, `unique` is `tokens` too.
    """
    first: dict[bytes, int] = {}
    same = [first.setdefault(row.tobytes(), number) for number, row in enumerate(tokens.cpu().numpy())]
    place = {number: position for position, number in enumerate(first.values())}
    inverse = torch.tensor([place[number] for number in same], dtype=torch.int64, device=tokens.device)
    return tokens[list(place)], inverse


def is_deterministic(module: nn.Module) -> bool:
    """Return whether a row's features depend on that row alone: nothing is drawn, no statistics of the batch are used.

    Modes count: in evaluation mode every tower with running statistics is.
    """
    return not any(draws(part) or uses_batch_statistics(part) for part in module.modules())


def draws(part: nn.Module) -> bool:
    """Return whether a module itself draws random numbers: a rate by the names that torch, timm and open_clip use.

    An unknown module with a rate counts too: a needless no costs time, a wrong yes the result.
    """
    drops = type(part).__name__ == "StochasticDepth" or "drop" in type(part).__name__.lower()
    rates = (value for name, value in vars(part).items() if "drop" in name or (drops and name in RATE_NAMES))
    active = any(isinstance(rate, int | float) and rate > 0 for rate in rates)
    return part.training and (active or bool(getattr(part, "aug_active", False)))  # timm's augmented rotary embedding


def uses_batch_statistics(part: nn.Module) -> bool:
    """Return whether a module normalises with statistics of the batch that it is given."""
    if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.running_mean is None:
        return True
    return part.training and getattr(part, "running_var", None) is not None


def own_text_tower(clip: Any) -> Any | None:
    """Return the module that has open_clip's own text tower as its parts; None for other towers, and for CoCa."""
    if isinstance(clip, CLIP):
        return clip
    return clip.text if isinstance(clip, CustomTextCLIP) and isinstance(clip.text, TextTransformer) else None


def ignores_what_follows(tower: Any) -> bool:
    """Return whether the structure says that features depend on nothing after the end token.

    Attention without a causal mask, pooling at the first or last place, and a class token (it has a place of its own
    after the context) rule it out.
    """
    no_class_token = len(tower.positional_embedding) == tower.context_length
    return no_class_token and tower.attn_mask is not None and pooling(tower)[0] in ("argmax", "eos")


def pooling(tower: Any) -> tuple[str, int | None]:
    """Return the name of a tower's pooling and the end token that it looks for, if it looks for one."""
    prefix = "text_" if isinstance(tower, CLIP) else ""
    name = getattr(tower, prefix + "pool_type")
    return name, getattr(tower, prefix + "eos_id") if name == "eos" else None


def encode_shorter_text(tower: Any, groups: Sequence[Tensor]) -> Tensor:
    """Return the features [b, D] of groups of captions; the steps are those of open_clip's forward.

    Tokens are embedded all at once, because the gradient of the embedding is as large as its vocabulary every time.
    """
    dtype = tower.transformer.get_cast_dtype()
    embedded = tower.token_embedding(torch.cat([tokens.flatten() for tokens in groups])).to(dtype)
    parts = embedded.split([tokens.numel() for tokens in groups])
    pooled = [
        pooled_text(tower, tokens, part.view(*tokens.shape, -1)) for tokens, part in zip(groups, parts, strict=True)
    ]
    projection = tower.text_projection
    if projection is None:
        return torch.cat(pooled)
    return torch.cat(pooled) @ projection if isinstance(projection, Tensor) else projection(torch.cat(pooled))


def pooled_text(tower: Any, tokens: Tensor, embedded: Tensor) -> Tensor:
    """Return what the tower pools [n, width] of captions [n, L] whose tokens are embedded [n, L, width]."""
    length = tokens.shape[1]
    mask = tower.attn_mask[:length, :length].contiguous()  # attention kernels ask for whole rows
    placed = embedded + tower.positional_embedding[:length].to(embedded.dtype)
    name, end = pooling(tower)
    if can_run_at(tower.transformer):
        return tower.ln_final(run_at(tower.transformer, placed, caption_lengths(tokens, end) - 1, mask))[:, 0]
    hidden = tower.ln_final(tower.transformer(placed, attn_mask=mask))
    return text_global_pool(hidden, tokens, name, eos_token_id=end)


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Put a module into evaluation mode for a while, then every part of it back into the mode that it was in."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
