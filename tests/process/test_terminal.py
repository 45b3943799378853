"""Terminals, pagers and pipes that go away while something is being said."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from accel_clip.process.terminal import lasting_output
from helpers.commands import ROOT, losses_of
from helpers.models import small_model
from helpers.patience import HANG_SECONDS

SAYS = """
import logging, sys, warnings
from accel_clip import console
from accel_clip.cli import exit_code_after


def command():
    from tqdm.auto import tqdm

    progress = console.Progress()
    progress.open(3)
    for step in range(3):
        console.say("a line")
        warnings.warn(f"a warning {step}")
        logging.warning("a record")
        print("of a library")
        progress.advance()
    list(tqdm(range(3), mininterval=0))
    progress.close()
    open(sys.argv[1], "w").write("got to the end")


sys.exit(exit_code_after(command))
"""


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def ended(file: Path, stdout: int, stderr: int) -> int:
    """Run a command that says much, and return its exit code; it must have got to its end."""
    words = [sys.executable, "-c", SAYS, str(file)]
    done = subprocess.run(words, stdout=stdout, stderr=stderr, env=environment(), timeout=HANG_SECONDS, check=False)
    assert file.read_text() == "got to the end"
    return done.returncode


def dead_pipe() -> int:
    """Return the end of a pipe that nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def dead_terminal() -> int:
    """Return a terminal whose window is closed."""
    window, terminal = pty.openpty()
    os.close(window)
    return terminal


@pytest.mark.parametrize("open_one", [dead_pipe, dead_terminal, lambda: os.open("/dev/full", os.O_WRONLY)])
def test_what_nobody_reads_ends_nothing(open_one: object, tmp_path: Path) -> None:
    assert callable(open_one)
    one = open_one()
    try:
        assert ended(tmp_path / "end", one, one) == 0
        assert ended(tmp_path / "end", subprocess.DEVNULL, one) == 0
        assert ended(tmp_path / "end", one, subprocess.DEVNULL) == 0
    finally:
        os.close(one)


def test_closed_streams_end_nothing(tmp_path: Path) -> None:
    words = [sys.executable, "-c", SAYS, str(tmp_path / "end")]
    closing = ["sh", "-c", 'exec "$@" >&- 2>&-', "sh", *words]
    done = subprocess.run(closing, env=environment(), timeout=HANG_SECONDS, check=False)
    assert done.returncode == 0 and (tmp_path / "end").exists()


@pytest.mark.parametrize("words", [("--help",), pytest.param(("list", "losses"), marks=pytest.mark.slow)])
def test_a_short_command_without_a_reader_ends_quietly(words: tuple[str, ...]) -> None:
    code = "import sys; from accel_clip.cli import main; sys.exit(main())"
    pipe = dead_pipe()
    done = subprocess.run(
        [sys.executable, "-c", code, *words], stdout=pipe, stderr=subprocess.PIPE, env=environment(), check=False
    )
    os.close(pipe)
    assert (done.returncode, done.stderr) == (141, b"")  # as a shell reports of `yes | true`


def test_streams_are_put_back() -> None:
    before = sys.stdout, sys.stderr
    with lasting_output():
        inner = sys.stdout, sys.stderr
        with lasting_output():
            assert (sys.stdout, sys.stderr) == inner
        assert (sys.stdout, sys.stderr) == inner != before
    assert (sys.stdout, sys.stderr) == before


@pytest.mark.slow
@pytest.mark.parametrize("open_one", [dead_pipe, dead_terminal])
def test_a_lost_terminal_ends_no_training(open_one: object, tmp_path: Path) -> None:
    assert callable(open_one)
    words = ["--model.name", small_model(tmp_path), "--train.steps", "3", "--train.batch_size", "16"]
    words += ["--data.workers", "1", "--output_dir", "run", "--track.every", "1"]
    one = open_one()
    train = [sys.executable, str(ROOT / "train.py"), *words]
    done = subprocess.run(train, cwd=tmp_path, stdout=one, stderr=one, timeout=HANG_SECONDS, check=False)
    os.close(one)
    assert done.returncode == 0 and len(losses_of(tmp_path / "run")) == 3
    assert '"complete"' in (tmp_path / "run" / "STATUS.json").read_text()
