"""The order of samples: a pure function of seed and epoch, the same for any number of processes."""

from __future__ import annotations

import pytest

from accel_clip.data.order import Order, Place, check_divisible
from accel_clip.faults import ConfigError


def samples_of(order: Order, num_batches: int, num_processes: int) -> list[list[int]]:
    """Return each contrastive batch as its samples, put together from the parts of all processes."""
    batches = []
    for batch in range(num_batches):
        parts = [order.places(batch, process, num_processes) for process in range(num_processes)]
        batches.append([order.sample(place.epoch, place.position) for places in parts for place in places])
    return batches


@pytest.mark.parametrize(("num_samples", "batch_size"), [(24, 8), (29, 8), (8, 8), (101, 4)])
def test_an_epoch_shows_each_sample_at_most_once_and_any_number_of_processes_the_same(
    num_samples: int, batch_size: int
) -> None:
    order = Order(num_samples, batch_size, seed=3)
    num_batches = 2 * order.batches_per_epoch
    whole = samples_of(order, num_batches, 1)
    assert samples_of(order, num_batches, 2) == samples_of(order, num_batches, 4) == whole
    for epoch in (0, 1):
        of_epoch = whole[epoch * order.batches_per_epoch : (epoch + 1) * order.batches_per_epoch]
        shown = [sample for batch in of_epoch for sample in batch]
        assert len(shown) == len(set(shown)) == num_samples - num_samples % batch_size
        assert set(shown) <= set(range(num_samples))


def test_epochs_and_seeds_differ() -> None:
    def first(seed: int, epoch: int) -> list[int]:
        return [Order(50, 10, seed).sample(epoch, position) for position in range(50)]

    assert len({tuple(first(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4
    assert first(0, 0) == first(0, 0)


@pytest.mark.parametrize("position", [0, 5, 9, 17, 23])
def test_replacements_stand_at_the_same_slot_of_the_following_batches(position: int) -> None:
    order = Order(27, 6, seed=1)  # four batches and a tail of three
    places = [[order.sample(0, place) for place in range(27)].index(s) for s in order.candidates(Place(0, position))]
    slot = position % 6
    expected = [*range(position, 24, 6), *range(slot, position, 6), *([24 + slot] if slot < 3 else [])]
    assert places == expected


def test_too_few_samples_and_uneven_processes_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"train\.batch_size: 8 .* 5 samples"):
        Order(5, 8, seed=0)
    check_divisible(8, 2)
    with pytest.raises(ConfigError, match=r"train\.batch_size: 9 .* 2 processes: use 10 or 8"):
        check_divisible(9, 2)
