"""python benchmarks/counts.py --captions captions.csv

What a step does, in numbers that are the same on every machine: floating-point operations, tokens and pictures that go
through the towers (both sides, one process), and the collectives of two gloo processes.
"""

from __future__ import annotations

import argparse
import os
import socket
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed
import torch.multiprocessing
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from trainers import SCENARIOS, Scenario, both_sides, make_batch

COLLECTIVES = (
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_object",
    "all_gather_single",
    "all_reduce",
    "all_to_all",
    "all_to_all_single",
    "batch_isend_irecv",
    "broadcast",
    "_broadcast_coalesced",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "scatter",
)


def main() -> None:
    """Count the work of each scenario in this process, then the collectives in two others."""
    parser = argparse.ArgumentParser(description="Counts of one step, ours and open_clip_train's")
    parser.add_argument("--captions", type=Path, help="CSV file with a column caption or title; made up without it")
    parser.add_argument("--largest-batch", type=int, default=512, help="scenarios with more pairs are left out")
    parser.add_argument("--losses", nargs="*", default=["clip", "siglip"], help="whose collectives are counted")
    given = parser.parse_args()
    for scenario in (each for group in SCENARIOS.values() for each in group):
        if scenario.batch_size <= given.largest_batch:
            print_work(scenario, given.captions)
    for loss in given.losses:
        settings = (2, loss, free_port(), given.captions)
        torch.multiprocessing.spawn(print_collectives, settings, nprocs=2)


def print_work(scenario: Scenario, captions: Path | None) -> None:
    """Print operations, tokens and pictures of one step of both sides."""
    ours, theirs, model = both_sides(scenario)
    batch = make_batch(model, scenario.batch_size, captions)
    work = [work_of(side.on(batch), side.clip) for side in (ours, theirs)]
    print(f"{scenario.label}, batch {len(batch)}")
    for name in work[0]:
        mine, other = (each[name] for each in work)
        print(f"    {name}: {mine:.4g}, open_clip {other:.4g}, ratio {mine / other:.3f}", flush=True)


def work_of(step: Callable[[], float], clip: Any) -> dict[str, float]:
    """Return what one step computes, forward and backward; attention is counted in its plain form."""
    counts: Counter[str] = Counter()
    hooks = [
        clip.visual.conv1.register_forward_pre_hook(
            lambda _, given: counts.update({"pictures forward": len(given[0])})
        ),
        clip.transformer.resblocks[0].register_forward_pre_hook(
            lambda _, given: counts.update({"text tokens forward": given[0].shape[0] * given[0].shape[1]})
        ),
    ]
    torch.backends.mha.set_fastpath_enabled(False)  # its fused kernel has no count
    in_place = {torch.ops.aten.addmm_: operations_in_place}
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=in_place) as operations:
        step()
    torch.backends.mha.set_fastpath_enabled(True)
    for hook in hooks:
        hook.remove()
    return {"operations": float(operations.get_total_flops()), **counts}


def operations_in_place(total: torch.Size, left: torch.Size, right: torch.Size, **_: Any) -> int:
    """Return the operations of a product that is added in place, which torch's counter does not know."""
    return 2 * left[0] * left[1] * right[1]


def print_collectives(rank: int, num_processes: int, loss: str, port: int, captions: Path | None) -> None:
    """Print the collectives of one step of both sides, as one of several processes."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(num_processes))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo")
    torch.set_num_threads(1)
    scenario = Scenario(f"{loss}, 4 micro-batches of 8 a process", batch_size=32, micro_batch_size=8, loss=loss)
    ours, theirs, model = both_sides(scenario, rank, num_processes)
    batch = make_batch(model, scenario.batch_size, captions, seed=rank)
    found = [collectives_of(ours.on(batch), ours.wrapped), collectives_of(theirs.on(batch), theirs.model)]
    if rank == 0:
        print(scenario.label)
        for name, counts in zip(("ours", "open_clip"), found, strict=True):
            print(f"    {name}: {', '.join(f'{count:g} {what}' for what, count in counts.items())}", flush=True)
    torch.distributed.destroy_process_group()


def collectives_of(step: Callable[[], float], model: nn.Module) -> dict[str, float]:
    """Return what one step sends: collectives by name, and how often DDP reduces the gradient of a parameter."""
    counts: Counter[str] = Counter()
    reduced = 0

    def count_bucket(state, bucket):  # DDP refuses annotations that are text, as they are in this file
        nonlocal reduced
        reduced += bucket.buffer().numel()
        before = counts.copy()
        future = allreduce_hook(None, bucket)
        counts.clear()
        counts.update(before)
        return future

    model.register_comm_hook(None, count_bucket)
    originals = {name: getattr(torch.distributed, name) for name in COLLECTIVES if hasattr(torch.distributed, name)}
    for name, original in originals.items():
        setattr(torch.distributed, name, counting(name, original, counts))
    try:
        step()
    finally:
        for name, original in originals.items():
            setattr(torch.distributed, name, original)
    num_parameters = sum(each.numel() for each in model.parameters() if each.requires_grad)
    return {**counts, "reductions of every gradient": reduced / num_parameters}


def counting(name: str, original: Callable[..., Any], counts: Counter[str]) -> Callable[..., Any]:
    """Return a collective that counts itself."""

    def collective(*given: Any, **named: Any) -> Any:
        counts[name] += 1
        return original(*given, **named)

    return collective


def free_port() -> int:
    """Return a port on which processes of this machine can meet."""
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return int(place.getsockname()[1])


if __name__ == "__main__":
    main()
