"""When held-out pairs say little about a model, in words."""

from __future__ import annotations

FEW_PAIRS = 32
"""Fewer candidates are so easy to tell apart that a bad model does it, or chance."""


def shared_in_words(num_shared: int, num_held_out: int) -> str:
    """Return what it means that held-out pairs show pictures that are trained on."""
    return (
        f"data.val: {num_shared:,} of its {num_held_out:,} pairs show pictures that are trained on, and what is "
        "measured on them says nothing about others: take these out of data.train or data.val"
    )


def few_in_words(num_held_out: int) -> str:
    """Return what it means that few pairs are held out."""
    are = "is 1, which is right whatever the model is" if num_held_out == 1 else f"are {num_held_out}"
    return (
        f"data.val: of held-out pairs there {are}, and below {FEW_PAIRS} loss and recall say little: hold more out by "
        "data.val_fraction, or name more"
    )
