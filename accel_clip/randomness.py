"""Seeds derived from names and numbers, so that randomness never depends on what ran before."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy
import torch


def derive_seed(*parts: int | str) -> int:
    """Return a 63-bit seed that depends on every part and on their order, the same on every machine."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def fraction_of(*parts: int | str) -> float:
    """Return a number in [0, 1) that depends on every part."""
    return derive_seed(*parts) / 2**63


def fractions_of(name: str, keys: Iterable[str]) -> Iterator[float]:
    """Yield `fraction_of(name, key)` of many keys, in less time."""
    for key in keys:
        digest = hashlib.blake2b(f"{name}\x1f{key}".encode(), digest_size=8).digest()
        yield (int.from_bytes(digest, "big") >> 1) / 2**63


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run a block with torch's CPU generator seeded, and restore it afterwards."""
    generator = torch.random.default_generator
    before = generator.get_state()
    generator.manual_seed(seed)
    try:
        yield
    finally:
        generator.set_state(before)


@contextmanager
def seeded_everywhere(seed: int) -> Iterator[None]:
    """Run a block with the global generators of torch's CPU, Python and numpy seeded, and restore them afterwards."""
    of_python, of_numpy = random.getstate(), numpy.random.get_state()
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    try:
        with seeded(seed):
            yield
    finally:
        random.setstate(of_python)
        numpy.random.set_state(of_numpy)


class RandomState:
    """The state of torch's generators at one moment: the CPU's and a device's."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cpu = torch.get_rng_state()
        self.on_device = None if device.type == "cpu" else torch.get_device_module(device).get_rng_state()

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Run a block from this state, and leave the generators as they were before the block."""
        now = RandomState(self.device)
        self.restore()
        try:
            yield
        finally:
            now.restore()

    def restore(self) -> None:
        """Put the generators into this state."""
        torch.set_rng_state(self.cpu)
        if self.on_device is not None:
            torch.get_device_module(self.device).set_rng_state(self.on_device)


@contextmanager
def guarded(seed: int, device: torch.device) -> Iterator[None]:
    """Run somebody else's code with all global generators seeded, a device's included, and restore them afterwards."""
    before = RandomState(device)
    with seeded_everywhere(seed):
        if before.on_device is not None:
            torch.get_device_module(device).manual_seed(seed)
        try:
            yield
        finally:
            before.restore()
