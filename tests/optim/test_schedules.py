"""Schedules against torch's own and against values worked out by hand."""

from __future__ import annotations

import random

import numpy
import pytest
import torch
from torch.optim import lr_scheduler

from accel_clip.config import OptimConfig
from accel_clip.faults import ConfigError
from accel_clip.optim.schedules import SCHEDULES, build_schedule, check_schedule

NEEDED = {"cosine_restarts": {"period": 30}}
NOT_FALLING = ("constant", "cosine_restarts")


def rates(name: str, num_steps: int, warmup: float = 0, min_ratio: float = 0, **options) -> list[float]:
    config = OptimConfig(schedule=name, schedule_options=options, warmup=warmup, min_lr_ratio=min_ratio)
    schedule = build_schedule(config, num_steps)
    return [schedule.multiplier(step) for step in range(num_steps)]


def torch_rates(make, num_steps: int, lr: float = 1.0) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler = make(optimizer)
    seen = []
    for _ in range(num_steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return seen


@pytest.mark.parametrize("min_ratio", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("name", SCHEDULES.names())
def test_every_schedule_starts_at_the_peak_and_stays_above_the_floor(name, min_ratio):
    seen = rates(name, 200, warmup=0.1, min_ratio=min_ratio, **NEEDED.get(name, {}))
    assert seen[:20] == pytest.approx([(step + 1) / 20 for step in range(20)])
    assert seen[20] == 1
    assert all(min_ratio <= rate <= 1 for rate in seen[20:])
    if name not in NOT_FALLING:
        assert seen[-1] == pytest.approx(min_ratio, abs=0.03)
        assert numpy.all(numpy.diff(seen[20:]) <= 0)
        assert min_ratio == 1 or seen[-1] > min_ratio, "the last step must still learn"


@pytest.mark.parametrize("name", SCHEDULES.names())
def test_every_schedule_depends_on_nothing_but_the_step(name):
    schedule = build_schedule(OptimConfig(schedule=name, schedule_options=NEEDED.get(name, {})), 100)
    in_order = [schedule.multiplier(step) for step in range(100)]
    steps = list(range(100))
    random.Random(0).shuffle(steps)
    assert {step: schedule.multiplier(step) for step in steps} == dict(enumerate(in_order))


def test_cosine_is_torchs():
    expected = torch_rates(lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, T_max=50, eta_min=0.1), 50)
    assert rates("cosine", 50, min_ratio=0.1) == pytest.approx(expected)


def test_linear_is_torchs():
    expected = torch_rates(lambda optimizer: lr_scheduler.LinearLR(optimizer, 1.0, 0.25, total_iters=40), 40)
    assert rates("linear", 40, min_ratio=0.25) == pytest.approx(expected)


@pytest.mark.parametrize("multiplier", [1, 2, 3])
def test_restarts_are_torchs(multiplier):
    expected = torch_rates(
        lambda optimizer: lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 7, multiplier, eta_min=0.05), 150
    )
    seen = rates("cosine_restarts", 150, min_ratio=0.05, period=7, multiplier=multiplier)
    assert seen == pytest.approx(expected)
    assert seen[7] == 1, "no restart: the test would be vacuous"


def test_restarts_with_a_fractional_multiplier():
    seen = rates("cosine_restarts", 26, period=4, multiplier=1.5)
    assert [step for step, rate in enumerate(seen) if rate == 1] == [0, 4, 10, 19]


@pytest.mark.parametrize(("decay", "num_decay_steps"), [(0.2, 20), (0.5, 50), (10, 10), (1, 1), (100, 100), (0.001, 1)])
def test_wsd_is_flat_and_then_a_straight_line(decay, num_decay_steps):
    expected = numpy.interp(range(100), [0, 100 - num_decay_steps, 100], [1, 1, 0.1])
    assert rates("wsd", 100, min_ratio=0.1, decay=decay) == pytest.approx(expected.tolist())


def test_wsd_decays_over_the_last_fifth_unless_told():
    assert rates("wsd", 50) == rates("wsd", 50, decay=0.2)


@pytest.mark.parametrize(
    ("warmup", "num_steps", "num_warmup_steps"),
    [(0, 10, 0), (0.1, 100, 10), (0.29, 100, 29), (0.1, 19, 1), (0.1, 5, 0), (0.99, 1, 0), (1, 2, 1), (4, 5, 4)],
)
def test_warmup_is_a_fraction_below_one_and_steps_from_there(warmup, num_steps, num_warmup_steps):
    seen = rates("constant", num_steps, warmup=warmup)
    expected = [(step + 1) / num_warmup_steps for step in range(num_warmup_steps)]
    assert seen == pytest.approx(expected + [1.0] * (num_steps - num_warmup_steps))


def test_the_schedule_runs_over_what_the_warmup_leaves():
    assert rates("cosine", 60, warmup=10)[10:] == rates("cosine", 50)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"warmup": 10}, ["optim.warmup", "10", "shorter than the run"]),
        ({"warmup": 2.5}, ["optim.warmup", "2.5", "whole number"]),
        ({"schedule": "cosin"}, ["optim.schedule", "'cosin'", "did you mean 'cosine'"]),
        ({"schedule_options": {"period": 5}}, ["optim.schedule_options", "cosine", "'period'", "it has none"]),
        (
            {"schedule": "cosine_restarts", "schedule_options": {"perod": 5}},
            ["optim.schedule_options", "'perod'", "period, multiplier", "did you mean 'period'"],
        ),
        ({"schedule": "wsd", "schedule_options": {"step": 5}}, ["optim.schedule_options", "'step'", "decay"]),
        ({"schedule": "cosine_restarts"}, ["optim.schedule_options", "needs 'period'"]),
        ({"schedule": "cosine_restarts", "schedule_options": {"period": 0.5}}, ["schedule_options.period", "0.5"]),
        ({"schedule": "cosine_restarts", "schedule_options": {"period": "5"}}, ["schedule_options.period", "'5'"]),
        (
            {"schedule": "cosine_restarts", "schedule_options": {"period": 5, "multiplier": 0.5}},
            ["schedule_options.multiplier", "0.5", "at least 1"],
        ),
        ({"schedule": "wsd", "schedule_options": {"decay": 0}}, ["schedule_options.decay", "above 0"]),
        ({"schedule": "wsd", "schedule_options": {"decay": 11}}, ["schedule_options.decay", "11", "at most"]),
    ],
)
def test_what_cannot_work_is_refused_by_name(settings, words):
    with pytest.raises(ConfigError) as caught:
        build_schedule(OptimConfig(**{"warmup": 0, **settings}), 10)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert "\n" not in str(caught.value)


def test_names_and_options_are_checked_before_the_length_is_known():
    check_schedule(OptimConfig(schedule="wsd", schedule_options={"decay": 0.1}))
    with pytest.raises(ConfigError, match="needs 'period'"):
        check_schedule(OptimConfig(schedule="cosine_restarts"))


def test_a_users_schedule_is_one_decorated_function(own_entries):
    @SCHEDULES.register("inverse_root")
    def inverse_root(step: int, num_steps: int, min_ratio: float, **options: float) -> float:
        """One over the square root of time."""
        return max(min_ratio, (1 + step / options.get("scale", 1)) ** -0.5)

    assert rates("inverse_root", 100, warmup=4, scale=3)[4:] == pytest.approx([(1 + k / 3) ** -0.5 for k in range(96)])
    with pytest.raises(ConfigError, match="'step'"):
        rates("inverse_root", 100, step=3)
