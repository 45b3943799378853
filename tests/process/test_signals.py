"""Signals meant for a run: real processes that are asked to stop, insisted upon, or orphaned."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from accel_clip.process.signals import StopAsked, StopSignals, following_launcher, has_launcher
from helpers.commands import ROOT
from helpers.launches import hear_interrupts
from helpers.patience import HANG_SECONDS

RUNS_STEPS = """
import sys, time
from accel_clip.process import signals as module
from accel_clip.cli import exit_code_after
from accel_clip.process.signals import StopSignals

module.SECONDS_BEFORE_INSISTING = {insisting}


def start_up():
    sys.stdout.write("starting\\n")
    sys.stdout.flush()
    time.sleep({start_up})


def command():
    start_up()
    with StopSignals() as signals:
        sys.stdout.write("stepping\\n")
        sys.stdout.flush()
        while signals.asked is None:
            time.sleep(0.02)
        sys.stdout.write("saving\\n")
        sys.stdout.flush()
        time.sleep({saving})
    sys.stdout.write(f"saved after {{signals.asked}}\\n")


sys.exit(exit_code_after(command))
"""


def runs_steps(start_up: float = 0, saving: float = 0, insisting: float = 1) -> str:
    """Return the code of a run that starts, takes steps until it is asked to stop, and saves, which takes a while."""
    return RUNS_STEPS.format(start_up=start_up, saving=saving, insisting=insisting)


def start(code: str, *words: str, **environment: str) -> subprocess.Popen[str]:
    """Start Python code in a session of its own, as a launcher does."""
    kept = {k: v for k, v in os.environ.items() if k not in ("TORCHELASTIC_RUN_ID", "ACCELERATE_DYNAMO_BACKEND")}
    return subprocess.Popen(
        [sys.executable, "-c", code, *words],
        env={**kept, "PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=hear_interrupts,  # noqa: PLW1509  sets a handler alone
    )


def wait_for_line(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdout is not None
    for said in process.stdout:
        if said.strip() == line:
            return
    raise AssertionError(f"'{line}' was not said: {process.communicate()[1]}")


def start_stepping(**settings: float) -> subprocess.Popen[str]:
    process = start(runs_steps(**settings))
    wait_for_line(process, "stepping")
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_run_that_is_asked_to_stop_ends_by_itself(number: signal.Signals) -> None:
    process = start_stepping(saving=0.3)
    process.send_signal(number)
    out, err = process.communicate(timeout=HANG_SECONDS)
    assert (process.returncode, out, err) == (0, f"saving\nsaved after {number.name}\n", "")


@pytest.mark.parametrize(("second", "insisting"), [(signal.SIGINT, 600), (signal.SIGTERM, 0)])
def test_a_group_signal_and_what_the_launcher_sends_after_it_are_one_request(
    second: signal.Signals, insisting: float
) -> None:
    """The launcher passes on what the terminal has sent already, or ends its processes some time later."""
    process = start_stepping(saving=0.5, insisting=insisting)
    os.killpg(process.pid, signal.SIGINT)
    wait_for_line(process, "saving")
    process.send_signal(second)
    out, _ = process.communicate(timeout=HANG_SECONDS)
    assert (process.returncode, out) == (0, "saved after SIGINT\n")


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_ctrl_c_again_ends_at_once(first: signal.Signals) -> None:
    process = start_stepping(saving=600, insisting=0)
    process.send_signal(first)
    wait_for_line(process, "saving")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=HANG_SECONDS)
    assert (process.returncode, out, err) == (-signal.SIGINT, "", "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_while_starting_interrupts(number: signal.Signals) -> None:
    process = start(runs_steps(start_up=60))
    wait_for_line(process, "starting")
    process.send_signal(number)
    out, err = process.communicate(timeout=HANG_SECONDS)
    assert (process.returncode, out, err) == (130, "", "interrupted\n")


PARENT = """
import subprocess, sys, time
process = subprocess.Popen([sys.executable, "-c", {child!r}])
sys.stdout.write(f"{{process.pid}}\\n")
sys.stdout.flush()
time.sleep(60)
"""


@pytest.mark.parametrize("launcher", ["TORCHELASTIC_RUN_ID", "ACCELERATE_DYNAMO_BACKEND", ""])
def test_only_what_a_launcher_started_ends_with_its_parent(launcher: str) -> None:
    parent = start(PARENT.format(child=runs_steps(saving=0.5)), **({launcher: "x"} if launcher else {}))
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    wait_for_line(parent, "stepping")
    parent.kill()
    try:
        if launcher:
            said = parent.stdout.read()  # to its end: the child, too, has closed it
            assert said == "saving\nsaved after SIGTERM\n"
        else:
            time.sleep(2)
            os.kill(child, 0)
    finally:
        if not launcher:
            os.kill(child, signal.SIGKILL)
        parent.communicate(timeout=HANG_SECONDS)


@pytest.mark.slow
def test_a_run_outlives_no_launcher_that_is_told_to_stop(tmp_path: Path) -> None:
    """With one process `accelerate launch` dies of a SIGTERM itself and passes nothing on."""
    (tmp_path / "steps.py").write_text(runs_steps(saving=0.5))
    launcher = start("from accelerate.commands.launch import main; main()", "--cpu", str(tmp_path / "steps.py"))
    wait_for_line(launcher, "stepping")
    launcher.terminate()
    assert launcher.stdout is not None and launcher.stdout.read() == "saving\nsaved after SIGTERM\n"
    launcher.communicate(timeout=HANG_SECONDS)
    assert not has_launcher({"PATH": "/bin", "OMP_NUM_THREADS": "1"})


def test_the_launcher_is_no_longer_followed_after_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    with following_launcher():
        assert "launcher" in {thread.name for thread in threading.enumerate()}
    for thread in threading.enumerate():
        if thread.name == "launcher":
            thread.join(HANG_SECONDS)
            assert not thread.is_alive()


def test_handlers_are_put_back_and_ignored_signals_stay_ignored() -> None:
    def own(number: int, frame: object) -> None:
        """Stand for a handler of the user."""

    found = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    try:
        signal.signal(signal.SIGTERM, own)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with StopSignals() as signals:
            signal.raise_signal(signal.SIGINT)
            assert signals.asked is None
            signal.raise_signal(signal.SIGTERM)
            assert signals.asked == "SIGTERM"
        assert signal.getsignal(signal.SIGTERM) is own and signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, found[0])
        signal.signal(signal.SIGTERM, found[1])


def test_nohup_outlives_its_terminal() -> None:
    process = subprocess.Popen(
        ["nohup", sys.executable, "-c", runs_steps()],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    wait_for_line(process, "stepping")
    process.send_signal(signal.SIGHUP)
    time.sleep(0.5)
    assert process.poll() is None
    process.terminate()
    assert process.communicate(timeout=HANG_SECONDS)[0] == "saving\nsaved after SIGTERM\n"


def test_a_wait_that_raises_is_left_at_once_also_when_somebody_asked_before() -> None:
    with StopSignals() as signals:
        with pytest.raises(StopAsked), signals.raising():
            signal.raise_signal(signal.SIGTERM)
            time.sleep(10)
        with pytest.raises(StopAsked), signals.raising():
            time.sleep(10)
        signal.raise_signal(signal.SIGTERM)  # outside it a flag is enough
        assert signals.asked == "SIGTERM"


SWALLOWS = """
import sys, time
from accel_clip.process import signals
from accel_clip.cli import exit_code_after

signals.SECONDS_TO_HEAR = 1.0


def command():
    for _ in range({num_deaf}):
        try:
            sys.stdout.write("starting\\n")
            sys.stdout.flush()
            time.sleep(60)
        except BaseException:
            pass  # as libraries do that try again
    time.sleep(60)


sys.exit(exit_code_after(command))
"""


@pytest.mark.parametrize("num_deaf", [1, 2])
def test_a_start_that_swallows_an_interruption_ends_all_the_same(num_deaf: int) -> None:
    process = start(SWALLOWS.format(num_deaf=num_deaf))
    wait_for_line(process, "starting")
    process.terminate()
    said = process.communicate(timeout=HANG_SECONDS)[1]
    assert process.returncode == 130
    assert said == ("interrupted\n" if num_deaf == 1 else "")  # who hears nothing says nothing


KEEPS_A_THREAD = """
import signal, sys, threading, time
from accel_clip.cli import exit_code_after


def command():
    threading.Thread(target=time.sleep, args=(60,)).start()  # as a download in a pool of threads
    signal.raise_signal(signal.SIGTERM)


sys.exit(exit_code_after(command))
"""


def test_an_interrupted_start_waits_for_no_thread_of_a_library() -> None:
    process = start(KEEPS_A_THREAD)
    assert process.communicate(timeout=HANG_SECONDS)[1] == "interrupted\n"
    assert process.returncode == 130


def test_another_thread_runs_without_handlers() -> None:
    seen: list[object] = []

    def run() -> None:
        with StopSignals() as signals:
            seen.extend([signals.asked, signal.getsignal(signal.SIGTERM)])

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [None, before]


def test_a_process_that_a_plugin_forks_can_still_be_terminated() -> None:
    ready, say = os.pipe()
    with StopSignals() as signals:
        child = os.fork()
        if child == 0:
            os.write(say, b"x")
            time.sleep(30)
            os._exit(0)
        assert os.read(ready, 1) == b"x"  # a signal that meets a fork half-way is lost by Python
        os.kill(child, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
        assert signals.asked is None


LOADS_DATA = """
import os, sys, time
import torch
from torch.utils.data import DataLoader
from accel_clip.data.workers import ignore_interrupt
from accel_clip.process.signals import StopSignals


class Slow(torch.utils.data.Dataset):
    def __len__(self):
        return 100

    def __getitem__(self, index):
        time.sleep(0.1)
        return index


loader = DataLoader(Slow(), batch_size=2, num_workers=2, worker_init_fn=ignore_interrupt)
with StopSignals() as signals:
    for number, batch in enumerate(loader):
        if number == 0:
            sys.stdout.write("stepping\\n")
            sys.stdout.flush()
        if signals.asked and number >= 8:
            break
sys.stdout.write(f"batch {number} {signals.asked}\\n")
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_group_signal_leaves_the_loader_alive_until_the_run_has_stopped(number: signal.Signals) -> None:
    process = start(LOADS_DATA, OMP_NUM_THREADS="1")
    wait_for_line(process, "stepping")
    os.killpg(process.pid, number)
    out, err = process.communicate(timeout=HANG_SECONDS)
    assert (process.returncode, out) == (0, f"batch 8 {number.name}\n"), err
    with pytest.raises(ProcessLookupError):  # the workers have ended too
        os.killpg(process.pid, 0)


KILLED_WORKER = """
import os, signal, sys
import torch
from accel_clip.cli import exit_code_after
from accel_clip.config import DataConfig
from accel_clip.data.loader import iterate


class Deadly(torch.utils.data.Dataset):
    def __getitem__(self, place):
        os.kill(os.getpid(), signal.{name})


sys.exit(exit_code_after(lambda: list(iterate(Deadly(), [[0, 1]] * 8, DataConfig(), 1, False))))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("name", "part"), [("SIGKILL", "was killed: Killed"), ("SIGBUS", "--shm-size")])
def test_a_killed_data_worker_is_told_in_one_line(name: str, part: str) -> None:
    process = start(KILLED_WORKER.format(name=name), OMP_NUM_THREADS="1")
    err = process.communicate(timeout=HANG_SECONDS)[1]
    lines = err.replace("\0", "").splitlines()
    said = [line for line in lines if not line.startswith("ERROR: Unexpected bus error")]  # torch's, in C
    assert process.returncode == 3 and len(said) == 1, err
    assert part in said[0] and "data.workers" in said[0] and said[0].startswith("accel-clip: error:")


@pytest.mark.slow
def test_a_worker_killed_in_a_run_is_told_in_one_line(tmp_path: Path) -> None:
    """The error comes up wherever the training is at that moment, seldom where it waits for data."""
    import psutil

    from helpers.models import small_model

    model = ["--model.name", small_model(tmp_path), "--train.batch_size", "16", "--train.steps", "100000"]
    words = [*model, "--data.workers", "1", "--output_dir", "run", "--track.to", "[]"]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *words], cwd=tmp_path, stderr=subprocess.PIPE, text=True
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not (metrics.is_file() and '"grad_norm"' in metrics.read_text()):
        assert process.poll() is None
        time.sleep(0.1)
    workers = psutil.Process(process.pid).children()
    assert workers
    workers[0].kill()
    err = process.communicate(timeout=HANG_SECONDS)[1]
    assert process.returncode == 3 and "Traceback" not in err, err
    assert err.count("accel-clip: error: a data worker") == 1
