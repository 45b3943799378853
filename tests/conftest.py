"""What several test modules share; the environment is set before torch and datasets are imported."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from helpers.process_state import accelerate_states, is_of_a_test, left_behind, process_state
from helpers.registries import entries_end_here

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test needs a network
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the commands set it for their process
for stop in (signal.SIGHUP, signal.SIGINT):  # nohup and shells leave them ignored, and what a test starts inherits that
    if signal.getsignal(stop) is signal.SIG_IGN:
        signal.signal(stop, signal.SIG_DFL if stop is signal.SIGHUP else signal.default_int_handler)
datasets_cache = tempfile.TemporaryDirectory(prefix="accel-clip-tests-")
os.environ["HF_DATASETS_CACHE"] = datasets_cache.name


@pytest.fixture(scope="session")
def stamps() -> Path:
    """Return the folder of 785 real pictures with English and Chinese captions, beside the repository."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data" / "stamps"
    if not (folder / "captions.csv").is_file():
        pytest.skip("the stamps are not here")
    return folder


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """Fail a test that leaves a setting of the process to the next one."""
    before = process_state()
    yield
    left = left_behind(before)
    assert not left, "\n".join(["left behind:", *left])


@pytest.fixture
def own_entries() -> Iterator[None]:
    """End with a test what it registers."""
    with entries_end_here():
        yield


@pytest.fixture
def own_plugins(own_entries: None) -> Iterator[None]:
    """End with a test the modules that it loads from its own folder, and what they register."""
    modules = set(sys.modules)
    yield
    for name in sorted(set(sys.modules) - modules):
        if is_of_a_test(name):
            del sys.modules[name]


@pytest.fixture(autouse=True)
def own_accelerator(nothing_is_left: None) -> Iterator[None]:
    """End a test's `Accelerator` with it: Accelerate keeps device and precision for the next one of the process."""
    before = {name: dict(shared) for name, shared in accelerate_states().items()}
    yield
    for name, shared in accelerate_states().items():
        shared.clear()
        shared.update(before.get(name, {}))


@pytest.fixture
def train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """Return a function that runs `train.py` in this process, in a folder of its own: exit code and what it said."""
    from accel_clip import cli

    monkeypatch.chdir(tmp_path)

    def call(*words: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["train.py", "--output_dir", "run", *words])
        return cli.train_main(), capsys.readouterr().err

    return call
