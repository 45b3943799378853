"""Early stopping and the best step."""

from __future__ import annotations

import json
import math
from typing import cast

import pytest

from accel_clip.config import Config, StopConfig
from accel_clip.evaluation.evaluator import Evaluator
from accel_clip.faults import ConfigError
from accel_clip.run.parts import check_watched
from accel_clip.run.stopping import EarlyStopping, Verdict, check_metric


def verdicts(stopping: EarlyStopping, values: list[float]) -> list[tuple[bool, bool]]:
    points = [stopping.update({"x": value}, step) for step, value in enumerate(values)]
    return [(point.is_best, point.should_stop) for point in points]


@pytest.mark.parametrize(("mode", "sign"), [("max", 1), ("min", -1)])
def test_patience_counts_points_since_the_best(mode, sign):
    stopping = EarlyStopping("x", mode, patience=2)
    values = [sign * value for value in [0.1, 0.3, 0.2, 0.4, 0.4, 0.1]]
    best, stop = zip(*verdicts(stopping, values), strict=True)
    assert best == (True, True, False, True, False, False)
    assert stop == (False, False, False, False, False, True)
    assert (stopping.best, stopping.best_step) == (sign * 0.4, 3)
    assert stopping.should_stop


def test_points_without_the_metric_change_nothing():
    stopping = EarlyStopping("val/loss", patience=1)
    stopping.update({"val/loss": 1.0}, 0)
    for step in range(1, 20):
        assert stopping.update({"loss": 5.0}, step) == Verdict(is_best=False, should_stop=False)
    assert stopping.update({"val/loss": 1.0}, 20).should_stop


def test_a_value_must_be_better_by_more_than_min_delta():
    stopping = EarlyStopping("x", "min", patience=None, min_delta=0.5)
    best, stop = zip(*verdicts(stopping, [4.0, 3.75, 3.5, 3.25, 2.75]), strict=True)
    assert best == (True, False, False, True, False)
    assert not any(stop), "without patience a run never stops"


@pytest.mark.parametrize("mode", ["min", "max"])
def test_what_is_not_finite_is_never_best_and_costs_patience(mode):
    stopping = EarlyStopping("x", mode, patience=4)
    best, stop = zip(*verdicts(stopping, [math.nan, math.inf, -math.inf, 1.0, math.nan]), strict=True)
    assert best == (False, False, False, True, False)
    assert not any(stop)
    assert stopping.best == 1.0
    assert verdicts(EarlyStopping("x", mode, patience=2), [math.nan, math.nan])[-1] == (False, True)


@pytest.mark.parametrize(
    ("metric", "mode"),
    [
        ("loss", "min"),
        ("val/loss", "min"),
        ("val/image_to_text_median_rank", "min"),
        ("step_time", "min"),
        ("grad_norm", "min"),
        ("val/text_to_image_R@1", "max"),
        ("zero_shot/top1", "max"),
        ("samples_per_second", "max"),
    ],
)
def test_the_name_says_which_way_is_better(metric, mode):
    assert EarlyStopping(metric).mode == mode
    other = {"min": "max", "max": "min"}[mode]
    assert EarlyStopping(metric, other).mode == other


def test_without_a_metric_nothing_is_best_and_nothing_stops():
    assert EarlyStopping(None).update({"loss": 1.0, None: 2.0}, 0) == Verdict(is_best=False, should_stop=False)


@pytest.mark.parametrize("cut", range(7))
def test_a_resumed_run_says_what_the_whole_one_says(cut):
    values = [3.0, math.nan, 2.0, 2.5, 2.0, 1.9, 2.2]
    whole = verdicts(EarlyStopping("x", "min", patience=2, min_delta=0.05), values)
    assert [stop for _, stop in whole].count(True) == 1
    first = EarlyStopping("x", "min", patience=2, min_delta=0.05)
    head = verdicts(first, values[:cut])
    second = EarlyStopping("x", "min", patience=2, min_delta=0.05)
    second.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
    assert head + verdicts(second, values[cut:]) == whole
    assert second.best == 1.9


def test_a_metric_that_is_not_logged_is_refused():
    check_metric("val/loss", ["loss", "val/loss"])
    with pytest.raises(ConfigError, match=r"stop\.metric: 'val/los'.*did you mean 'val/loss'"):
        check_metric("val/los", ["loss", "val/loss", "val/text_to_image_R@1"])


@pytest.mark.parametrize("metric", ["samples_per_second", "step_time"])
def test_what_each_process_measures_by_its_own_clock_cannot_be_watched_by_several(metric: str) -> None:
    config = Config(stop=StopConfig(metric=metric))
    with pytest.raises(ConfigError, match=f"stop.metric: '{metric}'.*its own clock"):
        check_watched(config, cast(Evaluator, None), 2)
