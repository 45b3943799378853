"""Plain values held to annotations: their kinds, and the ranges that numbers must be in."""

from __future__ import annotations

import math
import reprlib
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")
MOST_CHARACTERS = 100_000  # of a text
LARGEST_WHOLE = 2**63 - 1  # numbers beyond do not fit into 64 bits
LARGEST_NUMBER = 3.4e38  # of 32-bit floats, in which everything is computed
MOST_DEPTH = 100  # of values in one another


class WrongValue(Exception):
    """A value that is not what its annotation says; the message names its key, the value and the rule."""

    def __init__(self, key: str, value: object, rule: str) -> None:
        super().__init__(f"{key}: {shown_value(value)} does not work: {rule}")
        self.key = key


@dataclass(frozen=True)
class Range:
    """The finite numbers in a range, written `Annotated[int, Range(1, 8)]` beside what they limit."""

    lowest: float
    """the least of them"""
    highest: float
    """the greatest of them; an infinite one is a number that works, and means no limit"""
    is_open: bool = False
    """whether `lowest` itself is left out"""

    def holds(self, value: float) -> bool:
        """Return whether a number is in the range; NaN never is."""
        return (self.lowest < value if self.is_open else self.lowest <= value) and value <= self.highest

    @property
    def words(self) -> str:
        """Return the range in words."""
        least = f"{'above' if self.is_open else 'at least'} {written(self.lowest)}"
        least = "0 or more" if self.lowest == 0 and not self.is_open else least
        return (
            f"{least} (.inf for no limit)" if math.isinf(self.highest) else f"{least}, at most {written(self.highest)}"
        )


Count = Annotated[int, Range(0, 10**18)]
"""A whole number from 0 on that fits in 64 bits."""


def written(number: float) -> str:
    """Return a number as a message shows it."""
    return f"{int(number):,}" if number == int(number) and abs(number) <= LARGEST_WHOLE else f"{number:g}"


def fit(value: Any, hint: Any, key: str) -> Any:
    """Return a plain value, as JSON and YAML give them, as what an annotation says; raises `WrongValue`.

    hint: a plain type, a dataclass (of which a mapping makes an object; it may hold more), a container or union of
    those, or one with a `Range`. Numbers stay as they are, and lists become tuples where the hint says so. key: what
    the value is called.
    """
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin is Annotated:
        return fit_range(value, inner[0], range_of(hint), key)
    if origin in (Union, types.UnionType):
        return fit_one_of(value, inner, key)
    if is_dataclass(hint) and isinstance(hint, type):
        return fit_fields(value, hint, key)
    if origin is not None:
        return FIT_CONTAINER[origin](value, inner, key)
    holds, rule = PLAIN[hint]
    if not holds(value):
        raise WrongValue(key, value, rule)
    return value


def fit_range(value: Any, hint: Any, limits: Range | None, key: str) -> Any:
    """Return a number of a kind that is in its range."""
    if limits is None:
        return fit(value, hint, key)
    holds, rule = PLAIN[hint]
    if not holds(value):
        raise WrongValue(key, value, f"{rule}, {limits.words}")
    if not limits.holds(value):
        raise WrongValue(key, value, f"it must be {limits.words}")
    return value


def fit_one_of(value: Any, options: tuple[Any, ...], key: str) -> Any:
    """Return a value as the first option of a union that takes it; the error is the one that looked furthest in."""
    errors = []
    for option in options:
        try:
            return fit(value, option, key)
        except WrongValue as error:
            errors.append((option, error))
    kept = [error for option, error in errors if option is not type(None)]
    furthest = max(kept, key=lambda error: len(error.key))  # the first of equals
    if len(kept) < len(errors) and furthest.key == key:
        furthest.args = (f"{furthest}, or null",)
    raise furthest


def fit_fields(value: Any, kind: type[T], key: str) -> T:
    """Return an object of a dataclass with the entries of a mapping that it names."""
    if isinstance(value, kind):
        return value
    if not isinstance(value, Mapping):
        raise WrongValue(key, value, "it must be an object with keys and values")
    hints, found = get_type_hints(kind, include_extras=True), {}
    for field in fields(kind):  # type: ignore[arg-type]
        name = inner_key(key, field.name)
        if field.name in value:
            found[field.name] = fit(value[field.name], hints[field.name], name)
        elif field.default is MISSING and field.default_factory is MISSING:
            raise WrongValue(name, None, "it is missing")
    return kind(**found)


def inner_key(key: str, name: object) -> str:
    """Return what an entry of a mapping is called."""
    return f"{key}.{shown_value(name, '')}" if key else shown_value(name, "")


def fit_list(value: Any, inner: tuple[Any, ...], key: str) -> list[Any]:
    """Return a list whose items are what they must be."""
    if not isinstance(value, (list, tuple)):
        raise WrongValue(key, value, "it must be a list")
    return [fit(item, inner[0], f"{key}[{number}]") for number, item in enumerate(value)]


def fit_tuple(value: Any, inner: tuple[Any, ...], key: str) -> tuple[Any, ...]:
    """Return a tuple of as many items as its annotation has, or of any number of one kind."""
    if len(inner) == 2 and inner[1] is Ellipsis:
        return tuple(fit_list(value, inner, key))
    if not isinstance(value, (list, tuple)) or len(value) != len(inner):
        raise WrongValue(key, value, f"it must be a list of {len(inner)}")
    return tuple(fit(item, hint, f"{key}[{n}]") for n, (item, hint) in enumerate(zip(value, inner, strict=True)))


def fit_dict(value: Any, inner: tuple[Any, ...], key: str) -> dict[Any, Any]:
    """Return a dictionary whose keys and values are what they must be."""
    if not isinstance(value, Mapping):
        raise WrongValue(key, value, "it must be an object with keys and values")
    return {fit(name, inner[0], key): fit(item, inner[1], inner_key(key, name)) for name, item in value.items()}


def is_whole_number(value: Any) -> bool:
    """Return whether a value is a whole number of at most 64 bits, and no truth value."""
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= LARGEST_WHOLE


def is_number(value: Any) -> bool:
    """Return whether a value is a number, NaN and infinities included, and no truth value."""
    return isinstance(value, float) or is_whole_number(value)


PLAIN: dict[Any, tuple[Callable[[Any], bool], str]] = {
    bool: (lambda value: isinstance(value, bool), "it must be true or false"),
    int: (is_whole_number, "it must be a whole number"),
    float: (is_number, "it must be a number"),
    str: (lambda value: isinstance(value, str) and len(value) <= MOST_CHARACTERS, "it must be a text, not too long"),
    dict: (lambda value: isinstance(value, dict), "it must be an object with keys and values"),
    type(None): (lambda value: value is None, "it must be null"),
}
FIT_CONTAINER: dict[Any, Callable[[Any, tuple[Any, ...], str], Any]] = {
    list: fit_list,
    tuple: fit_tuple,
    dict: fit_dict,
}


def numbers_in(value: Any, key: str, depth: int = 0) -> Iterator[tuple[str, int | float]]:
    """Yield the numbers in nested values with their keys; raises `WrongValue` for what nests too deeply."""
    if depth > MOST_DEPTH:
        raise WrongValue(key[:MOST_DEPTH], None, "its values nest too deeply")
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from numbers_in(item, inner_key(key, name), depth + 1)
    elif isinstance(value, (list, tuple)):
        for number, item in enumerate(value):
            yield from numbers_in(item, f"{key}[{number}]", depth + 1)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield key, value


def require_ordinary_numbers(value: Any, key: str) -> None:
    """Raise `WrongValue` for a number in nested values that is not finite or that no computation holds.

    Whole numbers must fit into 64 bits, others into 32-bit floats.
    """
    for name, number in numbers_in(value, key):
        if isinstance(number, int) and abs(number) > LARGEST_WHOLE:
            raise WrongValue(name, number, f"a whole number must lie within ±{LARGEST_WHOLE:,}")
        if isinstance(number, float) and not abs(number) <= LARGEST_NUMBER:
            raise WrongValue(name, number, f"a number must be finite and lie within ±{LARGEST_NUMBER:g}")


def range_of(hint: Any) -> Range | None:
    """Return the first range in an annotation, None where it limits no number."""
    if isinstance(hint, Range):
        return hint
    marks = hint.__metadata__ if get_origin(hint) is Annotated else ()
    return next((found for each in (*marks, *get_args(hint)) if (found := range_of(each)) is not None), None)


class Shortener(reprlib.Repr):
    """Values in a message: no text, list or number without end, and nothing that nests without end."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 4, 300, 300
        self.maxlist = self.maxtuple = self.maxdict = 20

    def repr_int(self, value: int, level: int) -> str:
        """Return a whole number, or about how many digits it has where that are many."""
        digits = int(value.bit_length() * math.log10(2)) + 1
        return repr(value) if digits <= 40 else f"a number of {digits:,} digits"


def shown_value(value: object, quote: str = "'") -> str:
    """Return a value as a message shows it; a text without quotes where `quote` is empty."""
    text = Shortener().repr(value)
    return text if quote or not isinstance(value, str) else text[1:-1]
