"""Gradients compared with a reference, parameter by parameter."""

from __future__ import annotations

from torch import Tensor


def assert_equal_gradients(given: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert given.keys() == expected.keys()
    for name, reference in expected.items():
        difference = (given[name] - reference).abs().max() / reference.abs().max().clamp_min(1e-12)
        assert difference <= tolerance, f"{name}: {difference}"
