"""The blocks of the towers: compiled into fewer kernels, or run again in the backward pass to save memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from accel_clip.faults import ConfigError

COMPILER_OPTIONS: dict[str, Any] = {"fallback_random": True}
MOST_VARIANTS = 64  # of a block: image or text, training or not, with a gradient or without, fixed sizes or any
ATTENTION_NAMES = ("attn", "attention")  # what open_clip, timm and transformers call it in a block


def compile_blocks(clip: nn.Module, device: torch.device) -> None:
    """Compile every block by torch.compile when it first runs; names in the state dict stay as they are.

    Random numbers are drawn as without compilation, so that a second forward pass can draw them again. Raises
    `ConfigError` for a model without such blocks, and where the device it will be on has no compiler.
    """
    blocks = attention_blocks(clip)
    if not blocks:
        raise ConfigError("train.compile: the towers of this model have no attention blocks: leave it false")
    require_compiler(device)
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_VARIANTS)
    for block in blocks:
        block.compile(options=COMPILER_OPTIONS)


def require_compiler(device: torch.device) -> None:
    """Raise `ConfigError` where torch.compile cannot compile a few operations for a device.

    It needs a C++ compiler on a CPU and Triton with a C compiler on a GPU, and finds out in the first step otherwise.
    """
    double = torch.compile(lambda value: (2 * value).exp() + 1, options=COMPILER_OPTIONS)
    try:
        double(torch.ones(8, device=device))
    except Exception as error:  # whatever the compiler raises, or the programs that it starts
        reason = str(first_cause(error)).partition("\n")[0][:200]
        raise ConfigError(
            f"train.compile: torch.compile fails here: {reason}: install a C++ compiler (g++), or leave it false"
        ) from error


def first_cause(error: BaseException) -> BaseException:
    """Return what an error came from, which knows more."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def recompute_activations(clip: Any) -> None:
    """Keep only the inputs of blocks between forward and backward pass (activation checkpointing)."""
    clip.set_grad_checkpointing(True)


def attention_blocks(module: nn.Module) -> list[nn.Module]:
    """Return the outermost modules with an attention of their own, in order."""
    if any(isinstance(getattr(module, name, None), nn.Module) for name in ATTENTION_NAMES):
        return [module]
    return [block for child in module.children() for block in attention_blocks(child)]
