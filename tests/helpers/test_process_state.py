"""What a test leaves to the next one is found, whatever it is, and the test that left it fails."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import accelerate
import pytest
import torch
from PIL import Image

from accel_clip.losses.base import LOSSES
from helpers.commands import run
from helpers.process_state import left_behind, process_state
from helpers.registries import entries_end_here

LOGGER = logging.getLogger(__name__)
TESTS = """
import os
import sys

def test_that_leaves():
    {leaves}
    assert "torch" not in sys.modules

def test_that_comes_after():
    assert "torch" not in sys.modules
"""


@pytest.mark.parametrize(("leaves", "errors"), [("os.environ['LEFT'] = '1'", 1), ("os.chdir('/')", 1), ("pass", 0)])
def test_the_test_that_leaves_something_fails_and_no_other(tmp_path: Path, leaves: str, errors: int) -> None:
    (tmp_path / "test_two.py").write_text(TESTS.format(leaves=leaves))
    words = [sys.executable, "-m", "pytest", "-q", "-p", "conftest", "-p", "no:cacheprovider", "test_two.py"]
    done = run(*words, folder=tmp_path, PYTHONPATH=str(Path(__file__).parents[1]))
    assert "2 passed" in done.out and done.out.count("ERROR at teardown of test_that_leaves") == errors, done.out
    assert (done.code, "left behind" in done.out, "that_comes_after" in done.out) == (errors, bool(errors), False)


@contextmanager
def changed(owner: object, name: str, value: object) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    yield
    setattr(owner, name, before)


@contextmanager
def called(change: Callable[..., object], value: object, before: object) -> Iterator[None]:
    change(value)
    yield
    change(before)


@contextmanager
def entry(mapping: dict, key: str, value: object) -> Iterator[None]:
    before = dict(mapping)
    mapping[key] = value
    yield
    if key in before:
        mapping[key] = before[key]
    else:
        del mapping[key]


@contextmanager
def running_thread() -> Iterator[None]:
    over = threading.Event()
    thread = threading.Thread(target=over.wait, name="lasting")
    thread.start()
    yield
    over.set()
    thread.join()


@contextmanager
def running_process() -> Iterator[None]:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield
    process.communicate()


def plugin(folder: str) -> types.ModuleType:
    module = types.ModuleType("my_plugin")
    module.__file__ = f"{folder}/my_plugin.py"
    return module


def own_loss() -> None:
    """Stand for a loss of the user."""


@contextmanager
def registered(name: str, loss: Callable[..., object]) -> Iterator[None]:
    with entries_end_here():
        LOSSES.register(name)(loss)
        yield


CHANGES: dict[str, Callable[[str], object]] = {
    "torch: threads": lambda _: called(torch.set_num_threads, torch.get_num_threads() + 1, torch.get_num_threads()),
    "cuda.matmul": lambda _: changed(torch.backends.cuda.matmul, "fp32_precision", "ieee"),
    "mkldnn.matmul": lambda _: changed(torch.backends.mkldnn.matmul, "fp32_precision", "bf16"),
    "sums of half precision": lambda _: changed(
        torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction", False
    ),
    "kernels mkldnn": lambda _: torch.backends.mkldnn.flags(enabled=False),
    "kernels cudnn": lambda _: changed(torch.backends.cudnn, "benchmark", True),
    "determinism": lambda _: changed(torch.utils.deterministic, "fill_uninitialized_memory", False),
    "defaults": lambda _: called(torch.set_default_dtype, torch.float64, torch.float32),
    "gradient": lambda _: torch.no_grad(),
    "inference": lambda _: torch.inference_mode(),
    "autocast": lambda _: torch.autocast("cpu", torch.bfloat16),
    "anomaly": lambda _: torch.autograd.set_detect_anomaly(True),
    "functions": lambda _: torch.device("cpu"),
    "sharing": lambda _: called(
        torch.multiprocessing.set_sharing_strategy, "file_system", torch.multiprocessing.get_sharing_strategy()
    ),
    "tiny numbers are flushed": lambda _: called(torch.set_flush_denormal, True, False),
    "AcceleratorState": lambda _: entry(accelerate.state.AcceleratorState._shared_state, "_mixed_precision", "bf16"),
    "registry: names loss.name": lambda _: registered("own", own_loss),
    "modules: my_plugin": lambda folder: entry(sys.modules, "my_plugin", plugin(folder)),
    "environment LEFT": lambda _: entry(os.environ, "LEFT", "1"),
    "folder": lambda folder: called(os.chdir, folder, os.getcwd()),
    f"signals {int(signal.SIGUSR1)}": lambda _: called(
        lambda handler: signal.signal(signal.SIGUSR1, handler), signal.SIG_IGN, signal.SIG_DFL
    ),
    "alarms": lambda _: called(lambda seconds: signal.setitimer(signal.ITIMER_REAL, seconds), 1000, 0),
    "logging": lambda _: called(logging.root.setLevel, logging.DEBUG, logging.root.level),
    f"levels of logging {LOGGER.name}": lambda _: called(LOGGER.setLevel, 7, LOGGER.level),
    "largest picture": lambda _: changed(Image, "MAX_IMAGE_PIXELS", 7),
    "limits": lambda _: called(sys.setrecursionlimit, 2000, sys.getrecursionlimit()),
    "lasting": lambda _: running_thread(),
    "child processes": lambda _: running_process(),
}


@pytest.mark.parametrize("what", CHANGES)
def test_every_kind_of_setting_is_seen(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("helpers.process_state.PATIENCE_SECONDS", 0.01)
    before = process_state()
    with ExitStack() as stack:
        stack.enter_context(CHANGES[what](str(tmp_path)))
        left = left_behind(before)
    assert any(what in line for line in left) and len(left) <= 2, left
    assert left_behind(before) == []
