"""Items dealt to processes in rounds: chunk c goes to process c % num_processes, so a round has consecutive items."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import TypeVar

from accelerate import Accelerator

from accel_clip.process.signals import StopAsked
from accel_clip.process.waiting import Lookout

Chunk = TypeVar("Chunk")


def own_chunks(accelerator: Accelerator, num_items: int, chunk_size: int) -> list[range]:
    """Return the chunks of items that belong to this process, one a round; none in a last round that has too few."""
    chunks = [range(start, min(start + chunk_size, num_items)) for start in range(0, num_items, chunk_size)]
    return chunks[accelerator.process_index :: accelerator.num_processes]


def in_rounds(
    accelerator: Accelerator, own: Iterable[Chunk], num_items: int, chunk_size: int, lookout: Lookout, done: str
) -> Iterator[tuple[range, Chunk | None]]:
    """Yield the items of each round and this process's chunk of them, None where the last round leaves it without.

    own: what stands for `own_chunks`, in their order; done: what the lookout is told. All processes meet as soon as
    each has its chunk. Raises `StopAsked` on all of them when one is asked to stop, also while it waits for a chunk.
    """
    chunks, in_round = iter(own), chunk_size * accelerator.num_processes
    for start in range(0, num_items, in_round):
        chunk = None
        with suppress(StopAsked):  # the others learn of it where they meet
            chunk = next(chunks, None)
        lookout.meet(accelerator, done)
        yield range(start, min(start + in_round, num_items)), chunk
