"""Registries of the package in tests: what a test registers ends with it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from helpers.process_state import names_of_others, registries


@contextmanager
def entries_end_here() -> Iterator[None]:
    """Take out of every registry at the end what was registered meanwhile, but for what the package itself did."""
    before = {id(each): set(each.names()) for each in registries()}
    try:
        yield
    finally:
        for registry in registries():
            for name in names_of_others(registry) - before.get(id(registry), set()):
                del registry._entries[name]
