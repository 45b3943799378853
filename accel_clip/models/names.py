"""Which parameters a pattern in the config stands for, by open_clip's parameter names."""

from __future__ import annotations

from fnmatch import fnmatchcase

# `CLIP` keeps the text tower's parts at the top level, `CustomTextCLIP` and `CoCa` under `text.`. CoCa's `text_decoder`
# sees pictures too, and `logit_scale` and `logit_bias` belong to the loss: none of them is part of a tower.
TOWERS = {
    "image": ("visual.*",),
    "text": ("text.*", "transformer.*", "token_embedding.*", "positional_embedding", "ln_final.*", "text_projection*"),
}


def matches(pattern: str, parameter_name: str) -> bool:
    """Return whether `image`, `text` or a name pattern with * stands for this parameter of an open_clip model."""
    return any(fnmatchcase(parameter_name, each) for each in TOWERS.get(pattern, (pattern,)))
