"""The blocks of the towers: compiled into fewer kernels, or run again in the backward pass to save memory."""

from __future__ import annotations

from typing import Any

from torch import nn

from accel_clip.faults import ConfigError

ATTENTION_NAMES = ("attn", "attention")  # what open_clip, timm and transformers call it in a block


def compile_blocks(clip: nn.Module) -> None:
    """Compile every block by torch.compile when it first runs; names in the state dict stay as they are.

    Random numbers are drawn as without compilation, so that a second forward pass can draw them again. Raises
    `ConfigError` for a model without such blocks.
    """
    blocks = attention_blocks(clip)
    if not blocks:
        raise ConfigError("train.compile: the towers of this model have no attention blocks: leave it false")
    for block in blocks:
        block.compile(options={"fallback_random": True})


def recompute_activations(clip: Any) -> None:
    """Keep only the inputs of blocks between forward and backward pass (activation checkpointing)."""
    clip.set_grad_checkpointing(True)


def attention_blocks(module: nn.Module) -> list[nn.Module]:
    """Return the outermost modules with an attention of their own, in order."""
    if any(isinstance(getattr(module, name, None), nn.Module) for name in ATTENTION_NAMES):
        return [module]
    return [block for child in module.children() for block in attention_blocks(child)]
