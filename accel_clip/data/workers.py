"""Worker processes that load data: how they start, hand over, are waited for, and end."""

from __future__ import annotations

import atexit
import errno
import gc
import multiprocessing
import re
import signal
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from multiprocessing.process import BaseProcess
from multiprocessing.util import get_temp_dir
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from accel_clip.data.bad_samples import UnusableData
from accel_clip.faults import DataError, WorkerKilled
from accel_clip.process.signals import STOP_SIGNALS, StopAsked
from accel_clip.process.waiting import never

SECONDS_BETWEEN_LOOKS = 1.0
NOTHING_YET = re.compile("DataLoader timed out")
Collate = Callable[[Any], Any]
"""from the items of a batch, or from what stands for one already, to what is handed over"""


@dataclass(frozen=True)
class Workers:
    """Processes that load data."""

    number: int
    """how many there are, 0 to load in this process"""
    num_ahead: int = 2
    """how many batches each has ready"""
    pin_memory: bool = False
    """whether these come in page-locked memory"""
    is_asked: Callable[[], bool] = never
    """whether this process was asked to stop, which ends the wait for them"""

    def load(self, items: Dataset[Any], collate: Collate, batches: Iterable[list[Any]] | None = None) -> Iterator[Any]:
        """Yield batches of items, as collated; those of an `IterableDataset`, one by one, where none are named.

        Raises what a worker raised, `WorkerKilled` where none can be started, and `StopAsked` when this process is
        asked to stop while it waits. A generator of its own keeps a loader from drawing on torch's, so that dropout
        does not depend on the workers.
        """
        how = {"batch_size": None} if isinstance(items, IterableDataset) else {"batch_sampler": batches}
        loader: DataLoader[Any] = DataLoader(
            items,
            **how,
            num_workers=self.number,
            prefetch_factor=self.num_ahead if self.number else None,
            collate_fn=partial(handed_over, collate),
            pin_memory=self.pin_memory,
            timeout=SECONDS_BETWEEN_LOOKS if self.number else 0,
            worker_init_fn=start_worker,
            generator=torch.Generator(),
        )
        return received(loader, self.is_asked)


def received(loader: DataLoader[Any], is_asked: Callable[[], bool]) -> Generator[Any, None, None]:
    """Yield what the workers of a loader hand over, and look every second of a wait whether to go on.

    Raises `StopAsked`, and `WorkerKilled` where the machine lets no worker start. Closed, it ends the workers.
    """
    others = multiprocessing.active_children()
    get_temp_dir()  # of this process, which workers then share: killed, none would take one of its own away
    try:
        batches = started(loader)
        while not is_asked():
            try:
                batch = next(batches)
            except StopIteration:
                return
            except RuntimeError as error:
                if not NOTHING_YET.match(str(error)):
                    raise
            except (ConnectionError, EOFError, FileNotFoundError) as error:  # of the socket that a batch comes through
                raise killed_in_the_act() from error
            else:
                yield batch
        raise StopAsked
    finally:
        end([each for each in multiprocessing.active_children() if each not in others])


def killed_in_the_act() -> WorkerKilled:
    """Return the error for a worker that was gone before all of a batch had come over."""
    return WorkerKilled(
        "a data worker was killed while it handed over a batch: the kernel does so where memory is short (its log says "
        "so: dmesg): lower data.workers, data.prefetch or train.batch_size"
    )


def started(loader: DataLoader[Any]) -> Iterator[Any]:
    """Start the workers of a loader; raises `WorkerKilled` where the machine lets none start."""
    try:
        return iter(loader)
    except OSError as error:
        where = f"{error}: "
        if error.errno == errno.ENOSPC:
            where = "shared memory (/dev/shm) is full: enlarge it (docker run --shm-size=8g), or "
        raise WorkerKilled(f"the data workers cannot be started: {where}lower data.workers, 0 for none") from error


def end(workers: Sequence[BaseProcess]) -> None:
    """End workers at once: torch would wait five seconds for each that is busy, or hangs."""
    with deaths_unheard():
        for worker in workers:
            worker.kill()
        for worker in workers:
            worker.join(SECONDS_BETWEEN_LOOKS)  # one that waits for a dead disk cannot be killed


@contextmanager
def deaths_unheard() -> Iterator[None]:
    """Put torch's handler aside, which would take workers that are killed for an error."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGCHLD"):
        yield
        return
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)


def handed_over(collate: Collate, items: Any) -> Any:
    """Return a batch as collated, which a worker moves into shared memory at once, where a lack of it is an error.

    Left to the thread that sends it, the batch would be lost with a traceback, and waited for without end.
    """
    batch = collate(items)
    if get_worker_info() is not None:
        share_memory_of(batch)
    return batch


def share_memory_of(value: Any) -> None:
    """Move all tensors in a value to shared memory; raises RuntimeError when that is full."""
    if isinstance(value, Tensor):
        value.share_memory_()
    elif isinstance(value, Mapping):
        share_memory_of(list(value.values()))
    elif isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        for each in value:
            share_memory_of(each)
    elif is_dataclass(value):
        for each in fields(value):
            share_memory_of(getattr(value, each.name))


def ignore_interrupt(worker: int) -> None:
    """Leave what a launcher or a terminal sends to the whole group, such as Ctrl-C, to the training process.

    It may need more batches until it stops, and tells its workers to end itself.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def start_worker(worker: int) -> None:
    """Begin a worker process: without interrupts, and without copies of what the training process has in memory.

    Its first full garbage collection would copy more than 100 MiB, see `memory_shared`.
    """
    ignore_interrupt(worker)
    gc.freeze()


@atexit.register
def end_workers() -> None:
    """End the workers that are left when the program ends, such as those of a loader that an error's traceback holds.

    Python would ask them by SIGTERM, which they ignore, and wait for them forever.
    """
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would take the killed for an error
    for worker in multiprocessing.active_children():
        if worker.daemon:
            worker.kill()


def usable_or_raise(loaded: Any) -> Any:
    """Return what a worker loaded, unless it is an error that ends the run."""
    if isinstance(loaded, DataError):
        raise UnusableData(str(loaded)) from loaded
    return loaded


@contextmanager
def memory_shared() -> Iterator[None]:
    """Keep garbage collection off what there is before a block, in which workers share it: it would copy their pages.

    A collection writes into every object that it looks at, and a page that is written is no longer shared.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
