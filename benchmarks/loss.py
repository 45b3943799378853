"""python benchmarks/loss.py

The loss alone, forward and backward: time and peak memory of accel_clip's tiled losses divided by those of open_clip's
`ClipLoss` and `SigLipLoss`, and how the peak grows with the batch. Memory is measured on Linux, in fresh processes.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import open_clip
import torch
from open_clip.loss import SigLipLoss
from timing import describe_machine, interleaved
from torch import Tensor
from torch.nn.functional import normalize

from accel_clip.losses.tiles import tiled_clip_loss, tiled_siglip_loss

WIDTH = 512
BATCH_SIZES = (2048, 4096, 8192, 16384)
LOSSES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "clip": (tiled_clip_loss, open_clip.ClipLoss()),
    "siglip": (tiled_siglip_loss, SigLipLoss()),
}
MIB = 2**20


def main() -> None:
    """Measure time, then memory; with --peak-of only one peak, for the process that asked."""
    parser = argparse.ArgumentParser(description="The loss alone, ours divided by open_clip's")
    parser.add_argument("--what", nargs="+", choices=["time", "memory"], default=["time", "memory"])
    parser.add_argument("--batch-size", type=int, default=8192, help="pairs where time is measured")
    parser.add_argument("--pairs", type=int, default=5, help="times that each side is measured")
    parser.add_argument("--threads", type=int, default=2, help="with 1, processor time is measured")
    parser.add_argument("--peak-of", nargs=2, metavar=("LOSS", "SIDE"), help="print one peak in bytes and end")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.peak_of:
        name, side = given.peak_of
        print(peak_bytes(name, LOSSES[name][int(side)], given.batch_size))
        return
    print(describe_machine(), flush=True)
    for name, (ours, theirs) in LOSSES.items() if "time" in given.what else ():
        inputs = make_inputs(name, given.batch_size)
        timing = interleaved(partial(run, ours, inputs), partial(run, theirs, inputs), given.pairs)
        print(f"{name}, {given.batch_size} pairs, width {WIDTH}: {timing}", flush=True)
    for name in LOSSES if "memory" in given.what else ():
        report_memory(name, given.threads)


def make_inputs(name: str, batch_size: int) -> list[Tensor]:
    """Return unit-norm features of both sides [B, D] and the logit scale, and for siglip the logit bias."""
    generator = torch.Generator().manual_seed(0)
    features = (normalize(torch.randn(batch_size, WIDTH, generator=generator), dim=-1) for _ in range(2))
    scalars = [50.0, -10.0] if name == "siglip" else [50.0]
    return [each.requires_grad_() for each in (*features, *map(torch.tensor, scalars))]


def run(loss: Callable[..., Tensor], inputs: list[Tensor]) -> None:
    """Take the loss and its gradient."""
    for each in inputs:
        each.grad = None
    loss(*inputs).backward()


def report_memory(name: str, threads: int) -> None:
    """Print the peaks of both sides over the batch sizes, their ratio, and the slope of ours in log-log."""
    peaks = []
    for batch_size in BATCH_SIZES:
        ours, theirs = (peak_in_fresh_process(name, side, batch_size, threads) for side in (0, 1))
        peaks.append(ours)
        print(
            f"{name}, {batch_size} pairs: peak {ours / MIB:.0f} MiB, open_clip {theirs / MIB:.0f} MiB, "
            f"ratio {ours / theirs:.3f}",
            flush=True,
        )
    doublings = math.log2(BATCH_SIZES[-1] / BATCH_SIZES[0])
    print(f"{name}: slope {math.log2(peaks[-1] / peaks[0]) / doublings:.2f} over these sizes", flush=True)


def peak_in_fresh_process(name: str, side: int, batch_size: int, threads: int) -> int:
    """Return the peak bytes of one side in a process that did nothing else."""
    options = ["--peak-of", name, str(side), "--batch-size", str(batch_size), "--threads", str(threads)]
    done = subprocess.run([sys.executable, __file__, *options], capture_output=True, text=True, check=True)
    return int(done.stdout)


def peak_bytes(name: str, loss: Callable[..., Tensor], batch_size: int) -> int:
    """Return how far one loss and its gradient raise the resident memory of this process, its inputs not counted."""
    run(loss, make_inputs(name, 64))
    inputs = make_inputs(name, batch_size)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = status_bytes("VmRSS")
    run(loss, inputs)
    return status_bytes("VmHWM") - before


def status_bytes(name: str) -> int:
    """Return a figure of /proc/self/status, which tells them in KiB."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


if __name__ == "__main__":
    main()
