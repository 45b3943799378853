"""Several processes emulated in one, for collectives that only gather."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Waiting(Exception):
    """A process waits for the others; carries what it brings."""


class Process:
    """What a loss needs of `Accelerator`, for one of several processes that are emulated one after another."""

    def __init__(self, process_index: int, num_processes: int, gathered: list[Tensor]) -> None:
        self.process_index, self.num_processes, self.gathered, self.calls = process_index, num_processes, gathered, 0

    def gather(self, rows: Tensor) -> Tensor:
        self.calls += 1
        if self.calls > len(self.gathered):
            raise Waiting(rows)
        return self.gathered[self.calls - 1]


def on_all(num_processes: int, compute: Callable[[Process], T]) -> tuple[list[T], int]:
    """Return what each process computes and the number of gathers: start anew whenever all wait for the same one."""
    gathered: list[Tensor] = []
    while True:
        shares, waiting = [], []
        for process in range(num_processes):
            try:
                shares.append(compute(Process(process, num_processes, gathered)))
            except Waiting as wait:
                waiting.append(wait.args[0])
        if not waiting:
            return shares, len(gathered)
        assert len(waiting) == num_processes and len({rows.shape for rows in waiting}) == 1
        gathered.append(torch.cat(waiting))
