"""What can go wrong, as error types with the exit code each of them stands for."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

LONGEST_MESSAGE = 2000  # characters: what a file holds may be as large as a picture


class AccelClipError(Exception):
    """An error whose message is meant for the person who started the command."""

    exit_code = 1
    on_every_process = True  # whether all processes raise it alike, so that the first may speak for all

    def __init__(self, message: str = "") -> None:
        super().__init__(shortened(message, LONGEST_MESSAGE))


class ConfigError(AccelClipError):
    """A setting, a command line or a launch that cannot work."""

    exit_code = 2


class PluginError(ConfigError):
    """An error that a user's own code has raised, perhaps in one process of several."""

    on_every_process = False


class DataError(AccelClipError):
    """Data or a download that is missing or cannot be used."""

    exit_code = 3


class NonFiniteError(AccelClipError):
    """A loss or a gradient that is not a finite number."""

    exit_code = 4


class StorageError(AccelClipError):
    """A file that could not be written."""

    exit_code = 5


class Preempted(AccelClipError):
    """A run that was asked to stop, and is saved."""

    exit_code = 75

    def __init__(self, step: int) -> None:
        super().__init__(f"stopped at step {step} and saved: the same command goes on from there")


class PeerEnded(AccelClipError):
    """A collective that failed because another process of the run is gone; that one knows why."""

    on_every_process = False


class WorkerKilled(DataError):
    """A loader process that something outside this program ended; only its training process knows."""

    on_every_process = False


INTERRUPTED_EXIT_CODE = 130  # 128 + SIGINT, what shells report for Ctrl-C
UNREAD_EXIT_CODE = 141  # 128 + SIGPIPE, of a command whose output nobody reads to its end
KILLED_EXIT_CODE = 9  # of a crash that a test asked for


def exit_code_of(error: BaseException) -> int:
    """Return the exit code that an error stands for; 1 is a bug."""
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED_EXIT_CODE
    return error.exit_code if isinstance(error, AccelClipError) else 1


def describe(error: BaseException) -> str:
    """Return an error in one line for `STATUS.json`."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    return str(error) if isinstance(error, AccelClipError) else f"{type(error).__name__}: {error}"


@contextmanager
def recognised() -> Iterator[None]:
    """Raise torch's error about a dead process or a full GPU as one of ours, wherever in the block it comes up."""
    try:
        yield
    except RuntimeError as error:
        known = recognise(error)
        if known is None:
            raise
        raise known from error


SPEAKS_OF_COLLECTIVES = re.compile(r"gloo|nccl|c10d|SocketImpl|TCPStore", re.IGNORECASE)
PEER_IS_GONE = re.compile(
    r"Connection (closed|reset) by peer|Socket closed|Broken pipe|Connection was likely closed"
    r"|remote process exited|ncclRemoteError|communicator was aborted",
    re.IGNORECASE,
)
WORKER_IS_GONE = re.compile(
    r"DataLoader worker \(pid(?:\(s\))? (?P<pid>[\d, ]+)\) "
    r"(?:is killed by signal: (?P<signal>[^.]+)|exited unexpectedly)"
)
OUT_OF_MEMORY = re.compile(r"(CUDA|MPS backend|XPU) out of memory")
SHARED_MEMORY_IS_FULL = re.compile(r"unable to (allocate|resize|mmap|write to) .*(shared memory|/torch_)|Bus error")


def recognise(error: RuntimeError) -> AccelClipError | None:
    """Return what a user should read instead of torch's error about a dead process or a full GPU; None for others.

    The texts are those of gloo, NCCL, torch's store and its `DataLoader`, which raises from a signal handler: anywhere.
    """
    text = "\n".join(str(each) for each in reversed(list(causes(error))))  # the first cause knows most
    if SHARED_MEMORY_IS_FULL.search(text):
        return WorkerKilled(
            "a data worker ran out of shared memory (/dev/shm): enlarge it (docker run --shm-size=8g), lower "
            "data.workers or data.prefetch, or set data.workers to 0"
        )
    if OUT_OF_MEMORY.search(text):
        return ConfigError(
            "train.activation_gib: the GPU's memory is full: give graphs less (2 means 2 GiB), set a smaller "
            "train.micro_batch_size, or end what else uses the GPU; the same command goes on from the last checkpoint"
        )
    worker = WORKER_IS_GONE.search(text)
    if worker is not None:
        return WorkerKilled(f"a data worker (process {worker['pid']}) {end_of_worker(worker['signal'])}")
    if SPEAKS_OF_COLLECTIVES.search(text) and PEER_IS_GONE.search(text):
        return PeerEnded(f"rank {os.environ.get('RANK', '0')}: another process ended; see its error above")
    return None


def end_of_worker(signal: str | None) -> str:
    """Return how a loader process ended, and what to do: only the kernel kills for memory, by SIGKILL."""
    if signal is None:
        return "ended by itself: its own error stands above; data.workers 0 shows it in this process"
    if signal.startswith("Killed"):
        return (
            "was killed: Killed: most often the memory of the machine or its container is short: lower data.workers, "
            "data.prefetch or train.batch_size"
        )
    return f"was ended by a signal: {signal}: data.workers 0 shows whether a picture crashes the decoder"


def causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error, what it was raised from, and so on: the loader raises a vaguer one from that of its handler."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__


def shortened(text: str, most: int) -> str:
    """Return a text of at most so many characters, with its beginning and its end: the way out often stands there."""
    if len(text) <= most:
        return text
    half = (most - 3) // 2
    return f"{text[:half]} … {text[-half:]}"


def some_of(names: Iterable[object], most: int = 20, longest: int | None = None) -> str:
    """Return the first few of many names for a message, and how many more there are.

    most: names that are written out; longest: characters of one, without any all of them.
    """
    written = [str(name) for name in names]
    first = [name if longest is None or len(name) <= longest else f"{name[:longest]}…" for name in written[:most]]
    more = len(written) - most
    return ", ".join(first) + (f" and {more:,} more" if more > 0 else "")


def one_line(error: Exception, most: int = 400) -> str:
    """Return an error's text on one line of at most so many characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= most else text[:most] + " …"


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `, did you mean 'x'?` for the known name closest to `name`, or an empty string."""
    originals = {entry.lower(): entry for entry in known}
    matches = difflib.get_close_matches(name.lower(), originals, n=1, cutoff=0.5)
    return f", did you mean '{originals[matches[0]]}'?" if matches else ""


def reached(stage: str, step: int) -> None:
    """End this process at once if `ACCEL_CLIP_FAULT` names the stage (`rename` or `rename:12`), to test crashes."""
    if os.environ.get("ACCEL_CLIP_FAULT") in (stage, f"{stage}:{step}"):
        os._exit(KILLED_EXIT_CODE)
