"""python benchmarks/step.py accumulate --captions captions.csv

Step time of accel_clip divided by that of the released open_clip_train (`plain`, `two_passes`, `locked`, `all` for the
other scenarios): same weights, pairs, threads, precision and optimizer, runs interleaved, medians and quartiles.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from timing import describe_machine, interleaved
from trainers import SCENARIOS, Scenario, both_sides, make_batch, part_of

from accel_clip.models.towers import caption_lengths

NUM_FIRST_PAIRS = 128


def main() -> None:
    """Measure the scenarios that were asked for."""
    parser = argparse.ArgumentParser(description="Step time, ours divided by open_clip_train's")
    parser.add_argument("scenario", choices=[*SCENARIOS, "all"])
    parser.add_argument("--captions", type=Path, help="CSV file with a column caption or title; made up without it")
    parser.add_argument("--pairs", type=int, default=5, help="times that each side is measured")
    parser.add_argument("--threads", type=int, default=2, help="with 1, processor time is measured")
    parser.add_argument("--largest-batch", type=int, default=2048, help="scenarios with more pairs are left out")
    parser.add_argument("--smallest-batch", type=int, default=0, help="scenarios with fewer pairs are left out")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    print(describe_machine(), flush=True)
    for name in SCENARIOS if given.scenario == "all" else [given.scenario]:
        for scenario in SCENARIOS[name]:
            if given.smallest_batch <= scenario.batch_size <= given.largest_batch:
                measure(scenario, given.captions, given.pairs)


def measure(scenario: Scenario, captions: Path | None, num_pairs: int) -> None:
    """Print one scenario's ratio, after a first step of both sides whose losses must agree."""
    ours, theirs, model = both_sides(scenario)
    batch = make_batch(model, scenario.batch_size, captions)
    first = part_of(batch, NUM_FIRST_PAIRS)
    losses = ours.on(first)(), theirs.on(first)()
    assert math.isclose(*losses, rel_tol=1e-4), f"the sides do not train the same: losses {losses}"
    timing = interleaved(ours.on(batch), theirs.on(batch), num_pairs)
    tokens = caption_lengths(batch.tokens).float().mean().item()
    print(f"{scenario.label}: {timing}")
    print(
        f"    batch {len(batch)}, micro-batch {scenario.micro_batch_size}, {tokens:.1f} tokens a caption; "
        f"a pair takes {1000 * median(timing.ours) / len(batch):.2f} ms, "
        f"open_clip {1000 * median(timing.theirs) / len(batch):.2f} ms",
        flush=True,
    )


def median(seconds: list[float]) -> float:
    """Return the median of measured seconds."""
    return sorted(seconds)[len(seconds) // 2]


if __name__ == "__main__":
    main()
