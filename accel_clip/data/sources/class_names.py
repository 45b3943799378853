"""Class names as words: how folders and labels write them, and which of them are none."""

from __future__ import annotations

import re
from collections.abc import Collection

from accel_clip.faults import some_of

LETTERS = re.compile(r"[^\W\d_]{2,}|[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]")
"""two letters in a row, or one sign of a script that writes words with it"""
CODE = re.compile(
    r"[a-z]{1,3}[-_ ]?\d{2,}|(?=.*\d)[0-9a-f]{6,}|(class|cls|id|label|category|cluster|folder)?[-_ ]?\d+", re.IGNORECASE
)
"""such as n01440764, 00f3a9, class_7"""


def class_name(written: str) -> str:
    """Return a class's name as words: in one without white space, underscores and hyphens stand for spaces."""
    stripped = written.strip()
    if any(sign.isspace() for sign in stripped):
        return stripped.replace("_", " ")
    return " ".join(stripped.replace("_", " ").replace("-", " ").split()) or stripped


def is_word(name: str) -> bool:
    """Return whether a name says something to a model that has read captions; numbers and codes do not."""
    return LETTERS.search(name) is not None and CODE.fullmatch(name.strip()) is None


def are_codes(names: Collection[str]) -> bool:
    """Return whether at least half of the names of classes are no words."""
    return bool(names) and 2 * sum(not is_word(name) for name in names) >= len(names)


def some_names(names: Collection[str]) -> str:
    """Return a few names for a message, in the order of the alphabet."""
    return some_of(sorted(names), most=3)
