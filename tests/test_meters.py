"""Meters against numpy, and the number of collectives they cost."""

from __future__ import annotations

import math

import numpy
import pytest
import torch
from accelerate import Accelerator

from accel_clip.meters import AverageMeter, MeterGroup, RateMeter


class Clock:
    """Seconds that pass when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def pass_(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def accelerator(monkeypatch):
    accelerator = Accelerator(cpu=True)
    accelerator.collectives = []
    inner = accelerator.reduce
    monkeypatch.setattr(
        accelerator, "reduce", lambda *args, **kw: (accelerator.collectives.append(1), inner(*args, **kw))[1]
    )
    return accelerator


def test_average_meter_is_numpys_weighted_mean():
    values, counts = numpy.random.default_rng(0).normal(size=100), numpy.arange(1, 101)
    meter = AverageMeter("Loss")
    for value, count in zip(values, counts, strict=True):
        meter.update(torch.tensor(value) if count % 2 else float(value), int(count))
    assert meter.val == values[-1]
    assert meter.count == counts.sum()
    assert meter.sum == pytest.approx((values * counts).sum(), rel=1e-12)
    assert meter.avg == pytest.approx(numpy.average(values, weights=counts), rel=1e-12)


def test_average_meter_prints_value_and_mean():
    meter = AverageMeter("Loss")
    assert str(meter) == "Loss 0.0000 (0.0000)"
    meter.update(0.0864)
    meter.update(0.2346)
    assert str(meter) == "Loss 0.2346 (0.1605)"
    meter.reset()
    meter.update(torch.tensor(3.0))
    assert (meter.val, meter.avg, meter.count) == (3, 3, 1)
    assert str(AverageMeter("Step", fmt=":6.2f")) == "Step   0.00 (  0.00)"


def test_an_update_of_no_samples_changes_nothing():
    meter = AverageMeter("Loss")
    meter.update(2.0)
    meter.update(0.0, n=0)
    assert str(meter) == "Loss 2.0000 (2.0000)"


def test_a_float32_sum_is_kept_in_float64():
    meter = AverageMeter("x")
    for _ in range(1000):
        meter.update(torch.tensor(16777217.0 / 16777216.0 + 1, dtype=torch.float32), 16777216)
    assert meter.avg == float(torch.tensor(16777217.0 / 16777216.0 + 1, dtype=torch.float32))


def test_a_meter_keeps_the_value_and_not_the_tensor():
    meter, scale = AverageMeter("scale"), torch.nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
    meter.update(scale)
    with torch.no_grad():
        scale.fill_(50)
    assert (meter.val, meter.avg) == (2, 2)


@pytest.mark.parametrize("meter", [AverageMeter("x"), MeterGroup()], ids=type)
def test_updates_never_read_the_device(meter):
    unreadable = torch.empty((), device="meta")  # reading it raises
    with pytest.raises((RuntimeError, NotImplementedError)):
        float(unreadable)
    for _ in range(3):
        meter.update(*(("x",) if isinstance(meter, MeterGroup) else ()), unreadable, 4)


def test_rate_meter_counts_seconds_that_are_not_paused():
    clock = Clock()
    meter = RateMeter("pairs/s", clock=clock)
    assert meter.rate == 0
    for _ in range(4):
        meter.update(64)
        clock.pass_(0.5)
    with pytest.raises(KeyError), meter.paused():
        clock.pass_(60)
        raise KeyError
    assert (meter.rate, meter.seconds, str(meter)) == (128, 2, "pairs/s 128.0")
    meter.reset()
    clock.pass_(1)
    assert meter.rate == 0


def test_group_reduces_means_and_totals_in_one_collective(accelerator):
    group = MeterGroup()
    group.update("loss", torch.tensor(2.0), 3)
    group.update("loss", 4.0, 1)
    group.update_all({"loss/clip": 1.0, "grad_norm": torch.tensor([0.5])}, 2)
    group.add("bad_samples", 3)
    group.add("bad_samples", torch.tensor(4))
    expected = {"loss": 2.5, "loss/clip": 1.0, "grad_norm": 0.5, "bad_samples": 7.0}
    assert group.reduce(accelerator) == expected
    assert len(accelerator.collectives) == 1
    group.update("loss", 7.0)
    assert group.reduce(accelerator) == {"loss": 7.0}, "reducing starts anew"
    assert group.reduce(accelerator) == {}


def test_group_waits_for_the_device_once(accelerator, monkeypatch):
    reads = []
    for name in ("item", "tolist", "__float__", "__int__", "__bool__"):
        inner = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda *args, inner=inner, name=name: (reads.append(name), inner(*args))[1]
        )
    group = MeterGroup()
    for step in range(5):
        group.update_all({f"x{k}": torch.tensor(float(step)) for k in range(4)})
        group.add("bad", torch.tensor(1))
    group.reduce(accelerator)
    assert reads == ["tolist"]


def test_group_over_processes_is_the_mean_over_all_samples():
    generator = numpy.random.default_rng(2)
    groups, values, counts = [MeterGroup() for _ in range(3)], generator.normal(size=30), generator.integers(1, 9, 30)
    for place, (value, count) in enumerate(zip(values, counts, strict=True)):
        groups[place % 3].update("b", value, int(count))
    for rank, group in enumerate(groups):
        for name in ["a", "c"] if rank else ["c", "a"]:  # another order on one process
            group.update(name, {"a": 10.0, "c": 20.0}[name] + rank)
        group.add("bad", rank)
    packed = sum(group.pack(torch.device("cpu")) for group in groups)
    assert packed.dtype == torch.float64
    means = groups[1].unpack(packed.tolist(), 3)
    assert means["b"] == pytest.approx(numpy.average(values, weights=counts), rel=1e-12)
    assert (means["a"], means["c"], means["bad"]) == (11, 21, 3)


def test_group_notices_other_names_on_another_process():
    here, there = MeterGroup(), MeterGroup()
    here.update_all({"loss": 1.0, "lr": 1.0})
    there.update_all({"loss": 1.0, "logit_scale": 1.0})
    packed = here.pack(torch.device("cpu")) + there.pack(torch.device("cpu"))
    with pytest.raises(AssertionError, match="different names"):
        here.unpack(packed.tolist(), 2)


def test_group_without_samples_is_nan_and_names_are_of_one_kind(accelerator):
    group = MeterGroup()
    group.update("loss", 1.0, 0)
    with pytest.raises(AssertionError, match="'loss' is a mean"):
        group.add("loss", 1)
    assert math.isnan(group.reduce(accelerator)["loss"])
