"""A transformer whose output is wanted at one place of each row alone: its last block is computed only there.

A tower that pools one token throws the rest of its last block's output away: the query, the projection and the MLP of
all other tokens. They are 5/6 of that block's products. Keys and values of all tokens are needed still.
"""

from __future__ import annotations

from typing import Any

import torch
from open_clip.transformer import ResidualAttentionBlock, Transformer, VisionTransformer
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def can_run_at(transformer: Any) -> bool:
    """Return whether `run_at` knows how the blocks of a transformer are made."""
    if type(transformer) is not Transformer or not transformer.batch_first:
        return False
    last = transformer.resblocks[-1]
    return type(last) is ResidualAttentionBlock and not is_watched(transformer, last)


def pools_first_token(visual: Any) -> bool:
    """Return whether an image tower's features depend on nothing but its first token after the last block."""
    return (
        type(visual) is VisionTransformer
        and visual.attn_pool is None
        and visual.pool_type == "tok"
        and not visual.output_tokens
        and can_run_at(visual.transformer)
        and not is_watched(visual)
    )


def is_watched(*modules: Any) -> bool:
    """Return whether hooks wait for the whole output of a module, which then is run as a whole."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, kind) for module in modules for kind in kinds)


def run_at(transformer: Any, tokens: Tensor, places: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return what a transformer gives at one place of each row, [b, 1, width].

    tokens: float [b, L, width]; places: int64 [b]; mask: float [L, L], added to the attention of every row.
    """
    for block in transformer.resblocks[:-1]:
        if transformer.grad_checkpointing and torch.is_grad_enabled():
            tokens = checkpoint(block, tokens, None, None, mask, use_reentrant=False)
        else:
            tokens = block(tokens, attn_mask=mask)
    last, rows = transformer.resblocks[-1], torch.arange(len(tokens), device=tokens.device)
    normed = last.ln_1(tokens)
    # attention wants a mask for every head: [b * heads, 1, L]
    row_mask = (
        None if mask is None else mask[places].repeat_interleave(last.attn.num_heads, 0)[:, None].to(normed.dtype)
    )
    query = normed[rows, places][:, None]
    attended = last.attn(query, normed, normed, need_weights=False, attn_mask=row_mask)[0]
    wanted = tokens[rows, places][:, None] + last.ls_1(attended)
    return wanted + last.ls_2(last.mlp(last.ln_2(wanted)))


def encode_first_token(visual: Any, pixels: Tensor) -> Tensor:
    """Return the features [b, D] of pictures as the tower's own forward does, where `pools_first_token` allows it."""
    tokens = visual._embeds(pixels)
    first = torch.zeros(len(tokens), dtype=torch.int64, device=tokens.device)
    pooled, _ = visual._pool(run_at(visual.transformer, tokens, first))
    return pooled if visual.proj is None else pooled @ visual.proj
