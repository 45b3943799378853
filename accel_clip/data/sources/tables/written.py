"""Lists and objects that were written into a text: by JSON, Python's repr or numpy's, as spreadsheets are left with.

A text that only looks like one of them, such as `[untitled]`, is prose.
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from typing import Any

ITEM = re.compile(r"""(?P<literal>'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")(?P<gap>\s*,?\s*)""", re.DOTALL)
ARRAY = re.compile(r"array\((?P<list>\[.*\])(?:,\s*dtype=[^()]*)?\)", re.DOTALL)
ENDS = {"[": "]", "{": "}", "(": ")", "a": ")"}
"""what a written list or object ends with, by what it begins with; a is that of array(…)"""
LONGEST = 1 << 24  # characters that are parsed, as in the longest cell
MOST_ITEMS = 1 << 17  # of what Python parses, which takes a thousand times the room of the text
MOST_KEYS_SHOWN = 8
PARSING_ERRORS = (ValueError, SyntaxError, RecursionError, MemoryError, TypeError)


def structure_in(text: str) -> list[Any] | dict[Any, Any] | None:
    """Return the list or the object that a text writes out, None for prose."""
    written = text.strip()
    if ENDS.get(written[:1]) != written[-1:] or len(written) > LONGEST:
        return None
    array = ARRAY.fullmatch(written)
    written = array["list"] if array else written
    for parse in (json_in, texts_in_brackets, literal_in):
        found = parse(written)
        if isinstance(found, (list, dict)):
            return found
    return None


def json_in(text: str) -> Any:
    """Return the JSON value in a text, None without one."""
    try:
        return json.loads(text)
    except PARSING_ERRORS:
        return None


def texts_in_brackets(text: str) -> list[str] | None:
    """Return the texts between brackets where nothing else stands there, parted by commas or, as numpy does, by spaces.

    To Python itself texts that only a space parts are one.
    """
    inner, place, is_parted = text[1:-1].strip(), 0, True
    literals: list[str] = []
    while place < len(inner):
        item = ITEM.match(inner, place)
        if item is None or not is_parted:
            return None
        literals.append(item["literal"])
        place, is_parted = item.end(), bool(item["gap"])
    is_tuple = text[0] != "(" or "," in inner[len(literals[0]) :] if literals else False
    found = [literal_in(each) for each in literals]
    return found if is_tuple and all(isinstance(each, str) for each in found) else None


def literal_in(text: str) -> Any:
    """Return the value of a Python literal, lists for tuples, None for what is none; nothing in it is run."""
    if text.count(",") > MOST_ITEMS:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd escapes in other people's texts
            found = ast.literal_eval(text)
    except PARSING_ERRORS:
        return None
    is_list_of_texts = isinstance(found, tuple) and any(isinstance(each, str) for each in found)
    return list(found) if is_list_of_texts else found


def keys_in_words(content: dict[Any, Any]) -> str:
    """Return an object in a few words, for a message: its keys, and not what stands under them."""
    names = [str(name)[:30] for name in list(content)[:MOST_KEYS_SHOWN]]
    more = ", …" if len(content) > MOST_KEYS_SHOWN else ""
    return f"an object with the keys {', '.join(names)}{more}" if names else "an empty object"
