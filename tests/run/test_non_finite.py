"""Steps whose loss or gradient is not finite: which these are, and how they are told."""

from __future__ import annotations

import math

from accel_clip.run.non_finite import describe_non_finite, is_finite


def test_an_overflow_in_half_precision_is_lost_only_when_the_scale_has_no_room() -> None:
    class Scaler:
        def __init__(self, scale: float) -> None:
            self.scale = scale

        def get_scale(self) -> float:
            return self.scale

    overflow = {"loss": 1.0, "grad_norm": math.inf}
    assert not is_finite(overflow, None)
    assert is_finite(overflow, Scaler(1024.0)) and not is_finite(overflow, Scaler(0.5))
    assert not is_finite({"loss": math.nan, "grad_norm": 1.0}, Scaler(1024.0))


def test_what_is_not_finite_is_named_with_its_samples() -> None:
    text = describe_non_finite(7, {"loss": math.nan, "loss/a_loss": math.inf, "grad_norm": 2.0}, list(range(20)))
    assert "step 7" in text and "loss/a_loss inf" in text and "samples 0, 1" in text and "and 4 more" in text
