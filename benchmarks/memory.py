"""python benchmarks/memory.py

Memory of the training process and of its loader workers over epochs of a table with a million rows, and the seconds
that opening it takes. A worker that copied the table, or kept something of every pair, would show: memory of its own
(USS) would grow by the table's size, or from epoch to epoch. The processes' shares (PSS) add up to what all of them
take of the machine.

Pictures' features are known, so that none is decoded, and captions become zeros unless a tokenizer is named: an epoch
of a million pairs takes a minute or two. Linux alone tells these numbers (/proc/PID/smaps_rollup).
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import open_clip
import torch
from PIL import Image
from timing import describe_machine
from torch import Tensor

from accel_clip.config import DataConfig
from accel_clip.data import examples
from accel_clip.data.examples import Preparation
from accel_clip.data.loader import BatchPlaces, TrainingPairs, iterate
from accel_clip.data.order import Order
from accel_clip.data.sources.base import Source
from accel_clip.data.sources.combine import split_held_out
from accel_clip.data.sources.resolve import open_source

NUM_PICTURES = 64  # files; the rows share them
BATCH = 1000
CONTEXT_LENGTH = 77
MEBIBYTE = 2**20


class KnownFeatures(dict[int, Tensor]):
    """Features of every picture, all the same."""

    def __missing__(self, key: int) -> Tensor:
        return torch.zeros(1)


def main() -> None:
    """Write a table, open it, and go through it."""
    parser = argparse.ArgumentParser(description="Memory of the loader over epochs")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--share", type=float, default=1.0, help="of an epoch's batches that are loaded")
    parser.add_argument("--known-captions", type=int, help="most captions whose tokens a worker remembers")
    parser.add_argument("--tokenizer", help="of this open_clip model, in place of one that gives zeros")
    given = parser.parse_args()
    if given.known_captions is not None:
        examples.MOST_KNOWN_CAPTIONS = given.known_captions
    torch.set_num_threads(1)
    print(describe_machine("pyarrow"), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        source = opened(write_table(Path(folder), given.rows))
        go_through(source, given)
    print(f"load after {os.getloadavg()[0]:.2f}")


def write_table(folder: Path, num_rows: int) -> Path:
    """Write small pictures and a table whose captions are all different."""
    for number in range(NUM_PICTURES):
        Image.new("RGB", (1, 1)).save(folder / f"{number}.png")
    with (folder / "pairs.csv").open("w", encoding="utf-8") as file:
        file.write("image,caption\n")
        for row in range(num_rows):
            file.write(f"{row % NUM_PICTURES}.png,a photo of the old river with a red house and a dog number {row}\n")
    return folder / "pairs.csv"


@contextmanager
def timed(what: str) -> Iterator[None]:
    """Print the seconds that a block takes: those that pass, and those of this process's processor time."""
    start, used = time.perf_counter(), time.process_time()
    yield
    print(f"{what}: {time.perf_counter() - start:.1f} s, processor {time.process_time() - used:.1f} s", flush=True)


def opened(table: Path) -> Source:
    """Open the table and hold a part out, as a run does."""
    with timed(f"opening {table.stat().st_size / MEBIBYTE:.0f} MiB"):
        source = open_source(str(table), DataConfig())
    with timed(f"holding out 5 % of {len(source):,} pairs"):
        training, _ = split_held_out(source, 0.05)
    return training


def go_through(source: Source, given: Namespace) -> None:
    """Load epochs, and print the memory of all processes before the workers start, soon after, and at every end."""
    order = Order(len(source), BATCH, seed=0)
    tokenizer = open_clip.get_tokenizer(given.tokenizer) if given.tokenizer else zeros
    preparation = Preparation(tokenizer, (8, 8), 50e6, order.seed, features={"image": KnownFeatures()})
    num_batches = max(1, int(given.share * order.batches_per_epoch))
    batches = [epoch * order.batches_per_epoch + index for epoch in range(given.epochs) for index in range(num_batches)]
    places = BatchPlaces(order, batches, process=0, num_processes=1)  # type: ignore[arg-type]
    print(f"{'MiB':>16} {'main USS':>9} {'main PSS':>9} {'worker USS':>16} {'all PSS':>8}  seconds")
    print(row_of("without workers", 0.0), flush=True)
    start = time.perf_counter()
    with closing(iterate(TrainingPairs(source, order, preparation), places, DataConfig(), given.workers, False)) as all:
        for number, _ in enumerate(all, 1):
            if number == 2 * given.workers or number % num_batches == 0:
                moment = "first batches" if number < num_batches else f"end of epoch {number // num_batches}"
                print(row_of(moment, time.perf_counter() - start), flush=True)


def zeros(texts: list[str]) -> Tensor:
    """Return tokens of the usual shape."""
    return torch.zeros(len(texts), CONTEXT_LENGTH, dtype=torch.long)


def row_of(moment: str, seconds: float) -> str:
    """Return the memory of this process and of its workers now, in MiB."""
    own, workers = memory_of(os.getpid()), [memory_of(each.pid) for each in multiprocessing.active_children()]
    alone = [unique for unique, _ in workers]
    between = f"{min(alone):.0f} to {max(alone):.0f}" if alone else "-"
    total = own[1] + sum(share for _, share in workers)
    return f"{moment:>16} {own[0]:9.0f} {own[1]:9.0f} {between:>16} {total:8.0f}  {seconds:.0f}"


def memory_of(process: int | None) -> tuple[float, float]:
    """Return the memory that a process has alone (USS), and its share of all memory (PSS), in MiB."""
    sizes: dict[str, int] = {}
    for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()[1:]:
        name, size = line.split(":")
        sizes[name] = int(size.split()[0]) * 1024
    unique = sizes["Private_Clean"] + sizes["Private_Dirty"]
    return unique / MEBIBYTE, sizes["Pss"] / MEBIBYTE


if __name__ == "__main__":
    main()
