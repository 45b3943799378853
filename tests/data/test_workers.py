"""Loader workers: what they hand over, how they are waited for, and how they end."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch.utils.data import Dataset

from accel_clip.data.workers import Workers, share_memory_of
from accel_clip.faults import WorkerKilled
from accel_clip.process.signals import StopAsked
from helpers.commands import ROOT, run
from helpers.models import small_model
from helpers.patience import within


class Numbers(Dataset[torch.Tensor]):
    """Numbers, of which some do not come."""

    def __init__(self, late: frozenset[int] = frozenset()) -> None:
        self.late = late

    def __getitem__(self, item: int) -> torch.Tensor:
        if item in self.late:
            time.sleep(600)
        return torch.tensor([item])


@pytest.mark.parametrize("number", [0, 1, 2])
def test_what_workers_hand_over_comes_in_order_and_they_end(number: int) -> None:
    batches = [[2 * batch, 2 * batch + 1] for batch in range(6)]
    received = list(Workers(number).load(Numbers(), torch.cat, batches))
    assert torch.stack(received).tolist() == batches
    assert not multiprocessing.active_children()


def test_they_leave_nothing_in_the_folder_for_temporary_files(tmp_path: Path) -> None:
    """Not the socket of one that is ended in its work, either."""
    code = """
import torch
from torch.utils.data import TensorDataset
from accel_clip.data.workers import Workers

loaded = Workers(2).load(TensorDataset(torch.arange(9)), lambda rows: torch.stack(sum(rows, ())), [[0, 1]] * 50)
assert [next(loaded).tolist() for _ in range(5)] == [[0, 1]] * 5
loaded.close()
"""
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "TMPDIR": str(tmp_path)}, check=False)
    assert done.returncode == 0
    assert not list(tmp_path.iterdir())


def test_a_slow_batch_is_waited_for_as_long_as_nobody_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("accel_clip.data.workers.SECONDS_BETWEEN_LOOKS", 0.1)

    class Slow(Numbers):
        def __getitem__(self, item: int) -> torch.Tensor:
            time.sleep(0.5)
            return torch.tensor([item])

    assert [each.item() for each in Workers(1).load(Slow(), torch.cat, [[0], [1]])] == [0, 1]


def test_a_stop_ends_a_wait_and_workers_that_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 3600.0)  # for which torch would join each
    asked = threading.Event()
    loaded = Workers(2, is_asked=asked.is_set).load(
        Numbers(frozenset({1, 2, 3})), torch.cat, [[item] for item in range(4)]
    )
    assert next(loaded).item() == 0
    threading.Timer(0.3, asked.set).start()
    with within(10), pytest.raises(StopAsked):
        next(loaded)
    assert not multiprocessing.active_children()


@dataclass(frozen=True)
class Nested:
    """What is handed over, tensors at all depths."""

    one: torch.Tensor
    others: dict[str, list[tuple[torch.Tensor, str]]]


def test_tensors_are_shared_wherever_they_stand() -> None:
    value = Nested(torch.ones(2), {"a": [(torch.ones(3), "text")]})
    share_memory_of(value)
    assert value.one.is_shared() and value.others["a"][0][0].is_shared()


def test_workers_that_cannot_be_started_are_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(process: multiprocessing.Process) -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr("multiprocessing.process.BaseProcess.start", fails)
    with pytest.raises(WorkerKilled, match=r"cannot be started: .*Too many open files: lower data.workers"):
        list(Workers(1).load(Numbers(), torch.cat, [[0]]))


def may_unshare() -> bool:
    """Return whether this process may have a /dev/shm of its own."""
    command = ["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", "/dev/shm"]
    try:
        return subprocess.run(command, capture_output=True, timeout=10, check=False).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


@pytest.mark.slow
@pytest.mark.skipif(not may_unshare(), reason="needs a mount namespace")
@pytest.mark.parametrize(("size", "workers"), [("64k", 1), ("64k", 4), ("256k", 2)])
def test_shared_memory_that_is_too_small_is_told_in_one_line(size: str, workers: int, tmp_path: Path) -> None:
    words = ["--model.name", small_model(tmp_path), "--train.batch_size", "64", "--data.val_fraction", "0"]
    words += ["--data.workers", str(workers), "--track.to", "[]", "--output_dir", "run"]
    mounted = f'mount -t tmpfs -o size={size} tmpfs /dev/shm; exec "$@"'
    train = [sys.executable, str(ROOT / "train.py"), *words]
    done = run("unshare", "-m", "sh", "-c", mounted, "sh", *train, folder=tmp_path)
    last = done.err.splitlines()[-1]
    assert done.code == 3 and "Traceback" not in done.err, done.err
    assert "/dev/shm" in last and "--shm-size" in last and "data.workers" in last
