"""Processes that hang, die and talk to each other: real ones, two at a time."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from accel_clip.faults import ConfigError, PeerEnded, recognise
from accel_clip.process.accelerator import stay_on_this_machine
from accel_clip.process.watchdog import LONG_SECONDS, Watchdog, long_patience
from helpers.commands import ROOT, run
from helpers.patience import HANG_SECONDS

TWO_PROCESSES = """
import os, signal, sys, time
import torch.distributed as distributed
import torch
from accel_clip.cli import exit_code_after
from accel_clip.process.watchdog import Watchdog

rank = int(os.environ["RANK"])


def meet():
    distributed.all_reduce(torch.ones(1000))


def command():
    distributed.init_process_group("gloo", init_method="file://{file}", rank=rank, world_size=2)
{body}


sys.exit(exit_code_after(command))
"""


def start_two(folder: Path, body: str) -> list[subprocess.Popen[str]]:
    indented = "\n".join(f"    {line}" for line in body.strip().splitlines())
    code = TWO_PROCESSES.format(file=folder / "meeting", body=indented)
    return [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONPATH": str(ROOT), "RANK": rank, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]


def both_end(processes: list[subprocess.Popen[str]]) -> list[str]:
    """Return what each said on standard error."""
    try:
        return [process.communicate(timeout=HANG_SECONDS)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()


HANG = """
def stuck_here():
    time.sleep(100)

with Watchdog(2.0, on_hang=lambda message: time.sleep(100)) as watchdog:
    for step in range(1, 6):
        meet()
        watchdog.beat_step(step)
    if rank == 1:
        stuck_here()
    meet()
"""


@pytest.mark.slow
def test_a_hung_process_ends_both_and_both_say_where_they_stand(tmp_path: Path) -> None:
    processes = start_two(tmp_path, HANG)
    said = both_end(processes)
    assert [process.returncode for process in processes] == [1, 1]
    for rank, place in enumerate(("in meet", "in stuck_here")):
        lines = said[rank].splitlines()
        assert f"rank {rank}: no progress for 2 s, last done: step 5" in lines[0] and "train.timeout" in lines[0]
        assert any(place in line for line in lines), said[rank]
        assert all(line.startswith(f"rank {rank} | ") for line in lines[1:])


DIE = """
meet()
if rank == 1:
    {death}
for _ in range(1000):
    meet()
    time.sleep(0.01)
"""


@pytest.mark.slow
@pytest.mark.parametrize("death", ["raise ZeroDivisionError('my own fault')", "os.kill(os.getpid(), signal.SIGKILL)"])
def test_the_error_of_the_process_that_died_is_the_one_that_is_seen(tmp_path: Path, death: str) -> None:
    processes = start_two(tmp_path, DIE.format(death=death))
    follower, first = both_end(processes)
    assert processes[0].returncode == 1
    assert follower == "accel-clip: error: rank 0: another process ended; see its error above\n"
    if "raise" in death:
        assert processes[1].returncode == 1 and "Traceback" in first and "my own fault" in first
    else:
        assert processes[1].returncode == -signal.SIGKILL


def test_a_full_gpu_is_told_with_the_settings_that_make_room() -> None:
    for text in ("CUDA out of memory. Tried to allocate 2.00 GiB", "MPS backend out of memory (MPS allocated: 9 GB)"):
        told = recognise(RuntimeError(text))
        assert isinstance(told, ConfigError)
        assert "train.activation_gib" in str(told) and "train.micro_batch_size" in str(told)


def test_errors_of_this_process_are_not_taken_for_those_of_others() -> None:
    own = [
        "[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598",
        "HTTPSConnectionPool: Connection reset by peer",
        "[c10d] The server socket has failed to listen on any local network address. port: 29500, EADDRINUSE",
        "[../gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1800000ms for recv operation to complete",
        "NCCL error: unhandled system error, NCCL version 2.21.5",
    ]
    assert [recognise(RuntimeError(text)) for text in own] == [None] * len(own)
    others = [
        "[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:50236",
        "[../gloo/transport/tcp/pair.cc:446] writev [127.0.0.1]:9111: Broken pipe",
        "recvValue failed on SocketImpl(fd=3): Failed to recv, got 0 bytes. Connection was likely closed.",
        "NCCL error: remote process exited or there was a network error, NCCL version 2.21.5 ncclRemoteError",
    ]
    assert all(isinstance(recognise(RuntimeError(text)), PeerEnded) for text in others)


class Story:
    """Takes the place of a watchdog's clock, and of what it waits with: each wait lets time pass, and the story go on.

    told: yields the seconds until it goes on, and may move `now` and `computed` itself. ends: for how long nothing had
    come when the watchdog ended the process.
    """

    def __init__(self, told: Callable[[Watchdog], Iterator[float]], monkeypatch: pytest.MonkeyPatch) -> None:
        self.told, self.now, self.computed, self.next = told, 0.0, 0.0, 0.0
        self.ends: list[float] = []
        monkeypatch.setattr("accel_clip.process.watchdog.time", SimpleNamespace(monotonic=lambda: self.now))
        monkeypatch.setattr(Watchdog, "end", lambda watchdog, silence: self.ends.append(silence))

    def happens_to(self, watchdog: Watchdog) -> list[float]:
        """Let a watchdog watch it to its end, or its own."""
        self.left = self.told(watchdog)
        watchdog.over = self  # type: ignore[assignment]
        assert watchdog.timeout_seconds is not None
        watchdog.watch(watchdog.timeout_seconds)
        return self.ends

    def wait(self, interval: float) -> bool:
        """Return whether it is over, after a while."""
        self.now += interval
        while self.now >= self.next:
            try:
                self.next = self.now + next(self.left)
            except StopIteration:
                return True
        return bool(self.ends)


def test_patience_is_long_before_the_first_step_and_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def told(watchdog: Watchdog) -> Iterator[float]:
        yield 500  # start-up
        watchdog.beat("evaluation")
        yield 500  # the first step compiles
        watchdog.beat_step(1)
        assert watchdog.patience() == pytest.approx(2500, abs=100)  # five times the first step, the start-up left out
        watchdog.patient("checkpoint")
        assert watchdog.limit == LONG_SECONDS
        yield 1700
        watchdog.beat_step(2)
        assert len(watchdog.recent) == 1  # a stretch known to be long says nothing about steps
        for step in range(3, 110):
            watchdog.beat_step(step)
        assert watchdog.limit == 200  # the first step is forgotten
        yield 100
        watchdog.beat_step(110)
        watchdog.limit = 200
        assert not story.ends
        yield 600

    story = Story(told, monkeypatch)
    (silence,) = story.happens_to(Watchdog(200))
    assert 200 < silence < 250


def test_a_process_alone_is_given_the_time_in_which_it_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    def told(watchdog: Watchdog) -> Iterator[float]:
        watchdog.beat_step(1)
        watchdog.beat_step(2)
        for _ in range(1000):
            story.computed += 0.5
            yield 1.0
        assert not story.ends
        yield 1000.0  # it waits for something that never comes

    story = Story(told, monkeypatch)
    (silence,) = story.happens_to(Watchdog(40, computed=lambda: story.computed))
    assert 40 < silence < 50


@pytest.mark.parametrize(("timeout", "limit"), [(45.0, 1800), (7200.0, 7200)])
def test_the_message_names_what_sets_the_limit_where_it_stands(
    timeout: float, limit: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("accel_clip.process.watchdog.leave", lambda exit_code: None)
    monkeypatch.setattr("accel_clip.process.watchdog.GRACE_SECONDS", 0.0)
    watchdog = Watchdog(timeout)
    watchdog.patient("encoding")
    watchdog.end(limit + 1)
    said = capsys.readouterr().err.splitlines()[0]
    assert "last done: encoding; the stacks below show where it stands; if it was only slow, set train.timeout " in said
    assert f"above {limit} seconds, or to null for never" in said


def test_processes_wait_for_each_other_as_long_as_the_watchdog_lets_them() -> None:
    assert long_patience(45) == LONG_SECONDS and long_patience(7200) == 7200
    assert long_patience(None) > 300 * 86400


HANGING_WORKER = """
import sys, time
import torch
from accel_clip.cli import exit_code_after
from accel_clip.data.workers import Workers
from accel_clip.process.watchdog import Watchdog


class Hanging(torch.utils.data.Dataset):
    def __getitem__(self, item):
        if item == 2:
            sys.stdout.write("hanging\\n")
            sys.stdout.flush()
            time.sleep(600)
        return torch.ones(1)


def command():
    with Watchdog(1.0, computed=time.process_time) as watchdog:
        for number, batch in enumerate(Workers(1).load(Hanging(), torch.cat, [[item] for item in range(4)])):
            watchdog.beat_step(number)
            watchdog.recent.clear()


sys.exit(exit_code_after(command))
"""


@pytest.mark.slow
def test_a_worker_that_hangs_is_found_and_ended_in_one_process_too() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", HANGING_WORKER],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    out, said = process.communicate(timeout=HANG_SECONDS)  # to the end: the worker, too, has closed it
    assert (process.returncode, out) == (1, "hanging\n")
    assert "no progress for 1 s, last done: step 1" in said and "in received" in said


def test_no_timeout_means_no_thread() -> None:
    def watching() -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if thread.name == "watchdog"]

    with Watchdog(None):
        assert not watching()
    with Watchdog(0.1):
        (thread,) = watching()
    thread.join(HANG_SECONDS)  # after the block nothing is watched
    assert not thread.is_alive()


def test_a_process_that_was_suspended_has_not_hung(monkeypatch: pytest.MonkeyPatch) -> None:
    def told(watchdog: Watchdog) -> Iterator[float]:
        watchdog.beat_step(1)
        for _ in range(10):
            story.now += 3600  # in the middle of a wait
            yield 1.0

    story = Story(told, monkeypatch)
    assert story.happens_to(Watchdog(45)) == []


@pytest.fixture
def loopback() -> Iterator[str]:
    names = [name for _, name in socket.if_nameindex()]
    yield next(name for name in ("lo", "lo0") if name in names)


def test_only_processes_of_one_machine_stay_on_the_loopback_device(loopback: str) -> None:
    def chosen(**environment: str) -> str | None:
        stay_on_this_machine(environment)
        return environment.get("GLOO_SOCKET_IFNAME")

    assert chosen(WORLD_SIZE="2", LOCAL_WORLD_SIZE="2") == loopback
    assert chosen(WORLD_SIZE="4", LOCAL_WORLD_SIZE="2") is None
    assert chosen(WORLD_SIZE="2") is None and chosen() is None
    assert chosen(WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", GLOO_SOCKET_IFNAME="eth7") == "eth7"


LISTENS = """
import json, os
import psutil, torch
from accel_clip.config import TrainConfig
from accel_clip.process.accelerator import build_accelerator

accelerator = build_accelerator(TrainConfig())
accelerator.reduce(torch.ones(10))
found = psutil.Process().net_connections("inet")
addresses = [each.laddr.ip for each in found if each.status == psutil.CONN_LISTEN]
told = [os.environ["GLOO_SOCKET_IFNAME"], *addresses]
open(f"listens-{os.environ['RANK']}.json", "w").write(json.dumps(told))
accelerator.end_training()
"""


@pytest.mark.slow
def test_processes_of_one_machine_listen_on_loopback_only(tmp_path: Path, loopback: str) -> None:
    (tmp_path / "listens.py").write_text(LISTENS)
    words = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "listens.py")
    done = run(*words, folder=tmp_path, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", ACCELERATE_USE_CPU="true")
    assert done.code == 0, done.err
    told_by = [json.loads((tmp_path / f"listens-{rank}.json").read_text()) for rank in (0, 1)]
    for told, *addresses in told_by:
        assert told == loopback  # a machine whose name stands for a loopback address would listen there anyway
        assert addresses and {address.removeprefix("::ffff:") for address in addresses} <= {"127.0.0.1", "::1"}
