"""What a container may take, by the files of the kernel."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from accel_clip.process.container import core_limit, memory_left


def test_memory_that_is_left_is_the_limit_less_what_cannot_be_given_up(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("900\n")
    (tmp_path / "memory.stat").write_text("anon 300\ninactive_file 500\nactive_file 100\n")
    assert memory_left(tmp_path) == 600


@pytest.mark.parametrize(("quota", "cores"), [("400000 100000", 4), ("50000 100000", 0.5), ("max 100000", math.inf)])
def test_cores_are_the_time_of_a_period(tmp_path: Path, quota: str, cores: float) -> None:
    (tmp_path / "cpu.max").write_text(f"{quota}\n")
    assert core_limit(tmp_path) == cores


def test_nothing_limits_a_machine_without_these_files(tmp_path: Path) -> None:
    assert memory_left(tmp_path) == core_limit(tmp_path) == math.inf
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("900\n")
    assert memory_left(tmp_path) == math.inf
