"""Properties tried on generated values: few of them quickly, many in a slow test."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st


def check(strategy: st.SearchStrategy[Any], num_examples: int, try_one: Callable[[Any], bool]) -> None:
    """Try generated values, the same in every run; most must be opened, else nothing is shown."""
    opened: list[bool] = []
    decorate = settings(
        max_examples=num_examples,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    decorate(given(strategy)(lambda value: opened.append(try_one(value))))()
    assert sum(opened) > len(opened) / 2


def quick_and_slow(quick: int, slow: int) -> pytest.MarkDecorator:
    """Return a mark that runs a test with few examples, and with many where slow tests are asked for."""
    return pytest.mark.parametrize("num_examples", [quick, pytest.param(slow, marks=pytest.mark.slow)])
