"""Several sources in every contrastive batch, each with a fixed number of its pairs, by their weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import accumulate

from accel_clip.data.order import BatchOrder, Draws, Order, Place, SourceOrder, own_slots
from accel_clip.data.sources.base import Source
from accel_clip.data.sources.combine import Concatenated, source_names
from accel_clip.faults import ConfigError
from accel_clip.randomness import derive_seed


@dataclass(frozen=True)
class Mixture:
    """Contrastive batches that hold a batch of each source: batch k of the run is batch k of every part.

    Each part goes through epochs of its own, longer or shorter than the others'. The parts alternate within a batch,
    so that every process gets a near-equal share of each.
    """

    parts: tuple[SourceOrder, ...]
    """the order of each source"""

    @property
    def num_samples(self) -> int:
        """Return the number of samples of all parts."""
        return sum(part.num_samples for part in self.parts)

    @property
    def batch_size(self) -> int:
        """Return the number of pairs in a contrastive batch."""
        return sum(part.batch_size for part in self.parts)

    @property
    def batches_per_epoch(self) -> int:
        """Return the number of contrastive batches that hold as many pairs as there are, up to the rest of one."""
        return self.num_samples // self.batch_size

    @cached_property
    def slots(self) -> list[tuple[int, int]]:
        """Return the part that each slot of a batch belongs to, and the slot in that part's batch."""
        return interleaved([part.batch_size for part in self.parts])

    @cached_property
    def starts(self) -> list[int]:
        """Return the first sample of each part in the numbering over all of them."""
        return [0, *accumulate(part.num_samples for part in self.parts)]

    def places(self, batch: int, process: int, num_processes: int) -> list[Place]:
        """Return the places of one process in contrastive batch `batch` of the run, counted from 0."""
        own = (self.slots[slot] for slot in own_slots(self.batch_size, process, num_processes))
        found = ((part, self.parts[part].place(batch, slot)) for part, slot in own)
        return [Place(place.epoch, place.position, part) for part, place in found]

    def candidates(self, place: Place) -> Iterator[int]:
        """Yield the sample at a place, then those of the same source that may replace it when it is unusable."""
        start = self.starts[place.part]
        return (start + sample for sample in self.parts[place.part].candidates(place))


def order_of(
    source: Source, weights: Sequence[float] | None, batch_size: int, seed: int, replacement: bool
) -> BatchOrder:
    """Return the order of a run: a mixture where the sources have weights, else that of all samples as one source.

    weights: one for each source that was put together. Raises `ConfigError` where a batch cannot be filled.
    """
    kind = Draws if replacement else Order
    if weights is None:
        return kind(len(source), batch_size, seed)
    assert isinstance(source, Concatenated) and len(source.sources) == len(weights), (source, weights)
    names, held = source_names(source), quotas(weights, batch_size)
    require_a_pair_of_each(names, weights, held)
    require_enough_samples(names, [len(part) for part in source.sources], weights, held)
    parts = zip(source.sources, held, strict=True)
    return Mixture(
        tuple(kind(len(part), quota, derive_seed(seed, "source", i)) for i, (part, quota) in enumerate(parts))
    )


def quotas(weights: Sequence[float], batch_size: int, multiple: int = 1) -> list[int]:
    """Return how many of `batch_size` pairs each weight gets: a multiple of `multiple`, next to its share.

    Shares are rounded down, and what is left goes to the largest remainders, the first of equal ones (Hamilton's
    method). Weights count as they are written in decimal, so that the result is the same on every machine.
    """
    assert batch_size % multiple == 0, (batch_size, multiple)
    exact = [Fraction(repr(float(weight))) for weight in weights]
    shares = [each * (batch_size // multiple) / sum(exact) for each in exact]
    held = [math.floor(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda i: held[i] - shares[i])
    for i in by_remainder[: batch_size // multiple - sum(held)]:
        held[i] += 1
    return [multiple * number for number in held]


def interleaved(held: Sequence[int]) -> list[tuple[int, int]]:
    """Return (part, number within the part) for each slot of a batch that holds `held` pairs of the parts.

    The pairs of each part are spread evenly, at (j + ½) / held of the batch.
    """
    slots = [(part, number) for part, quota in enumerate(held) for number in range(quota)]
    return sorted(slots, key=lambda slot: (2 * slot[1] + 1) / (2 * held[slot[0]]))


def require_a_pair_of_each(
    names: Sequence[str], weights: Sequence[float], held: Sequence[int], multiple: int = 1
) -> None:
    """Raise `ConfigError` for a source of which a batch would hold no pair; `held` are multiples of `multiple`."""
    batch_size = sum(held)
    for i, name in enumerate(names):
        if held[i] == 0:
            # From one whole pair on by the exact share it has a pair whatever the others' remainders are.
            needed = multiple * math.ceil(sum(weights) / min(weights))
            enough = rounded_up((sum(weights) - weights[i]) / max(1, batch_size // multiple - 1))
            others = [*weights[:i], enough, *weights[i + 1 :]]
            or_weight = f", or its weight {enough:g} or more" if all(quotas(others, batch_size, multiple)) else ""
            raise ConfigError(
                f"data.train: {name} has weight {weights[i]:g} of {sum(weights):g}, and a batch of {batch_size} pairs "
                f"holds none of it: make train.batch_size {needed} or more{or_weight}, or leave the source out"
            )


def require_enough_samples(
    names: Sequence[str], lengths: Sequence[int], weights: Sequence[float], held: Sequence[int]
) -> None:
    """Raise `ConfigError` for a source that has fewer samples than a batch takes of it."""
    batch_size = sum(held)
    for i, (name, length, quota) in enumerate(zip(names, lengths, held, strict=True)):
        if length < quota:
            fits = length * (sum(weights) - weights[i]) / (batch_size - length)
            smaller = math.floor(length * sum(weights) / weights[i])
            ways = f"lower its weight to {rounded_down(fits):g} or less, make train.batch_size {smaller} or less, "
            raise ConfigError(
                f"data.train: {name} has {length} samples to train on, and by its weight {weights[i]:g} of "
                f"{sum(weights):g} a batch of {batch_size} pairs takes {quota} different ones: "
                f"{ways if length else ''}add data, or leave the source out"
            )


def rounded_up(number: float) -> float:
    """Return a positive number rounded up to two digits."""
    unit = unit_of_second_digit(number)
    return math.ceil(number / unit) * unit


def rounded_down(number: float) -> float:
    """Return a number rounded down to two digits."""
    unit = unit_of_second_digit(number)
    return math.floor(number / unit) * unit


def unit_of_second_digit(number: float) -> float:
    """Return the power of ten that the second digit of a number counts, 1 for 0."""
    return 10.0 ** (math.floor(math.log10(number)) - 1) if number else 1.0


def pairs_in_batch(source: Source, order: BatchOrder) -> dict[str, float]:
    """Return how many pairs of each source that was put together a batch holds, on average where it varies."""
    if not isinstance(source, Concatenated):
        return {source.name: float(order.batch_size)}
    if isinstance(order, Mixture):
        numbers = [float(part.batch_size) for part in order.parts]
    else:
        numbers = [order.batch_size * len(part) / len(source) for part in source.sources]
    return dict(zip(source_names(source), numbers, strict=True))


def describe_batch(source: Source, order: BatchOrder) -> str | None:
    """Return what a batch holds of each of several sources as a sentence, None for one source."""
    held = pairs_in_batch(source, order)
    if len(held) < 2:
        return None
    average = "" if isinstance(order, Mixture) else "on average "
    return f"a batch holds {average}{pairs_in_words(held)}"


def pairs_in_words(held: Mapping[str, float]) -> str:
    """Return numbers of pairs by source in words, such as `192 pairs of photos.csv and 64 of clipart`."""
    first, *others = [f"{number:,.1f}".removesuffix(".0") + f" of {name}" for name, number in held.items()]
    words = [first.replace(" of ", " pairs of ", 1), *others]
    return " and ".join([", ".join(words[:-1]), words[-1]])
