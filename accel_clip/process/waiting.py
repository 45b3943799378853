"""What long work between two steps looks at and tells: whether somebody asked to stop, and that it goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from accelerate import Accelerator

from accel_clip.process.signals import StopAsked

Piece = TypeVar("Piece")


def never() -> bool:
    """Return that nobody asked to stop: a command that a signal interrupts anywhere."""
    return False


def unheard(done: str) -> None:
    """Let what is done be known to nobody."""


@dataclass(frozen=True)
class Lookout:
    """Kept by work that takes many rounds, in which all processes meet."""

    is_asked: Callable[[], bool] = never
    """whether this process was asked to stop"""
    beat: Callable[[str], object] = unheard
    """called with what is going on after every round"""

    def meet(self, accelerator: Accelerator, done: str) -> None:
        """Say that a round is done, or raise `StopAsked` on all processes when one was asked to stop; collective."""
        if accelerator.gather(torch.tensor([int(self.is_asked())], device=accelerator.device)).any():
            raise StopAsked
        self.beat(done)

    def rounds(self, accelerator: Accelerator, pieces: Sequence[Piece], done: str) -> Iterator[Piece]:
        """Yield this process's pieces, of which p goes to process p % num_processes; all meet after every round."""
        for first in range(0, len(pieces), accelerator.num_processes):
            place = first + accelerator.process_index
            if place < len(pieces):
                yield pieces[place]
            self.meet(accelerator, done)


UNWATCHED = Lookout()
"""for work in a command that a signal interrupts anywhere, and in tests"""
