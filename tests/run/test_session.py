"""What is there while a run goes: how long a process may wait before it counts as hung."""

from __future__ import annotations

from accel_clip.config import TrainConfig
from accel_clip.run.session import timeout_of


def test_processes_that_wait_for_a_server_are_given_time() -> None:
    """A server that asks for a minute (Retry-After) would else end a run of several processes."""
    config = TrainConfig(timeout=45)
    assert timeout_of(config, 2, has_streams=True) == 600 and timeout_of(config, 2, has_streams=False) == 45
    assert timeout_of(TrainConfig(timeout=900), 2, has_streams=True) == 900
    assert timeout_of(config, 1, has_streams=False) == 600  # nobody waits for it, and a disk may be on the network
    assert timeout_of(TrainConfig(timeout=None), 1, True) is timeout_of(TrainConfig(timeout=None), 2, True) is None
