"""How fast pairs come out of the loader alone, and how fast the step alone takes them."""

from __future__ import annotations

import time

import torch
from torch import Tensor
from torch.nn import functional

from accel_clip.commands.check.facts import SpeedFacts
from accel_clip.commands.check.parts import PlannedParts
from accel_clip.commands.check.sample import SampledPair
from accel_clip.data.batch import Batch
from accel_clip.data.examples import preparation_for
from accel_clip.data.feed_parts import LoaderRank
from accel_clip.faults import ConfigError
from accel_clip.process.accelerator import cores_per_process
from accel_clip.step.chunks import Plan
from accel_clip.step.contrastive import ContrastiveStep

LOADER_PAIRS = 32  # in a batch of the loader: rates hardly depend on it, and small ones are timed finely
FIRST_PAIRS = 2  # in a batch of the step
GROWTH = 4  # times as many pairs in the next one, as time allows
WITHOUT_END = 10**9  # batches
SHARE_OF_STEP = 0.5  # of the seconds that measuring may take
EASILY_FASTER = 1.25  # a loader that gives so much more than the step takes never keeps it waiting


def measure_speed(parts: PlannedParts, pairs: list[SampledPair], seconds: float) -> SpeedFacts:
    """Return the rates of loader and step, with other numbers of workers where the loader is the slower one."""
    step, step_pairs = step_rate(parts, pairs, seconds * SHARE_OF_STEP)
    left = seconds * (1 - SHARE_OF_STEP)
    loader = {parts.num_workers: loader_rate(parts, parts.num_workers, left / 2)}
    others = other_workers(parts) if loader[parts.num_workers] < EASILY_FASTER * step else []
    for workers in others:
        loader[workers] = loader_rate(parts, workers, left / 2 / len(others))
    rate = loader[parts.num_workers]
    reads_pictures = parts.config.cached_tower != "image"  # else they are decoded once, before the first step
    expected = (min(rate, step) if reads_pictures else step) * parts.num_processes
    train = parts.config.train
    num_pairs = parts.data.schedule.num_steps * train.accumulate * train.batch_size
    bottleneck = "loader" if reads_pictures and rate < step else "step"
    return SpeedFacts(parts.num_workers, loader, step, step_pairs, bottleneck, expected, num_pairs / expected)


def other_workers(parts: PlannedParts) -> list[int]:
    """Return the numbers of workers to try beside the one that is set: twice as many, and one for each core."""
    cores = max(1, cores_per_process() // parts.num_processes)
    twice = 2 * max(1, parts.num_workers)
    return sorted({min(twice, max(cores, 2)), cores} - {parts.num_workers, 0})


def loader_rate(parts: PlannedParts, num_workers: int, seconds: float) -> float:
    """Return the pairs a second of the loader when nobody waits for them; raises `DataError` without usable pairs."""
    config, feed = parts.config, parts.data.feed
    rows = min(LOADER_PAIRS, parts.pairs_per_process)
    # Every part of a batch mixes the sources, but only a process's has all lanes of a stream that it needs.
    num_parts = parts.num_processes if feed.streams else config.train.batch_size // rows
    rank = LoaderRank(0, num_parts, num_workers, parts.accelerator.device.type == "cuda")
    loader = feed.open(range(WITHOUT_END), rank, preparation_for(parts.model, config))
    for _ in range(max(1, num_workers)):  # each worker has started, and has made its first batch
        next(loader)
    start, num_pairs, elapsed = time.perf_counter(), 0, 0.0
    while elapsed < seconds or num_pairs < rows * max(1, num_workers):
        num_pairs += len(next(loader))
        elapsed = time.perf_counter() - start
    del loader
    return num_pairs / elapsed


def step_rate(parts: PlannedParts, pairs: list[SampledPair], seconds: float) -> tuple[float, int]:
    """Return the pairs a second of the optimizer step on pairs in memory, and how many it was measured with.

    That is the process's part of a batch where the time allows; else a line through the two largest smaller ones says
    how long the whole would take, since a step costs something whatever its pairs.
    """
    whole, start = parts.pairs_per_process, time.perf_counter()
    rows = min(FIRST_PAIRS, whole)
    take_step(parts, pairs, rows)  # the first one starts kernels and makes the optimizer's state
    times = {rows: time_of_step(parts, pairs, rows)}
    while rows < whole and (len(times) < 2 or time.perf_counter() - start + GROWTH * times[rows] <= seconds):
        rows = min(GROWTH * rows, whole)
        times[rows] = time_of_step(parts, pairs, rows)
    again = [times[rows]]
    while time.perf_counter() - start + again[-1] < seconds:
        again.append(time_of_step(parts, pairs, rows))
    times[rows] = sorted(again)[len(again) // 2]
    return whole / extrapolated(times, whole), rows


def extrapolated(times: dict[int, float], rows: int) -> float:
    """Return the seconds of a step of so many pairs, on a line through those measured with the most."""
    largest = sorted(times)[-2:]
    last = times[largest[-1]]
    if rows == largest[-1]:
        return last
    slope = (last - times[largest[0]]) / (largest[-1] - largest[0])
    return last + max(slope, 0.0) * (rows - largest[-1])


def time_of_step(parts: PlannedParts, pairs: list[SampledPair], rows: int) -> float:
    """Return the seconds that one step takes."""
    start = time.perf_counter()
    take_step(parts, pairs, rows)
    return time.perf_counter() - start


def take_step(parts: PlannedParts, pairs: list[SampledPair], rows: int) -> None:
    """Take one optimizer step on made-up pairs and wait for its end; raises `ConfigError` for too little memory."""
    accelerator = parts.accelerator
    plan = plan_for(parts.plan, rows, parts.pairs_per_process)
    step = ContrastiveStep(parts.parallel, parts.loss, parts.anatomy, plan)
    parts.parallel.model.train()
    try:
        with parts.parallel.accumulating():
            step(made_up_batch(parts, pairs, rows))
            parts.optimizer.step()
            parts.optimizer.zero_grad()
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"train.activation_gib: a step of {rows} pairs does not fit in memory: lower it, or train.micro_batch_size"
        ) from error
    if accelerator.device.type != "cpu":
        torch.get_device_module(accelerator.device).synchronize()


def plan_for(plan: Plan, rows: int, whole: int) -> Plan:
    """Return the plan for a smaller part of a batch: micro-batches of the same size, the same share of graphs kept."""
    size = min(plan.micro_batch_size, rows)
    chunks, all_chunks = -(-rows // size), -(-whole // plan.micro_batch_size)
    kept = {side: round(number * chunks / all_chunks) for side, number in plan.kept.items()}
    return Plan(size, plan.captions_per_chunk, kept, plan.cost_of_a_group)


def made_up_batch(parts: PlannedParts, pairs: list[SampledPair], rows: int) -> Batch:
    """Return noise for pictures with captions as long as those of the sample."""
    picks = [pairs[row % len(pairs)] for row in range(rows)]
    names = picks[0].numbers
    return Batch(
        image=torch.randint(0, 256, (rows, 3, *parts.model.picture_size), dtype=torch.uint8),
        tokens=made_up_tokens([pair.tokens for pair in picks], len(pairs)),
        sample=torch.arange(rows),
        caption_hash=torch.arange(rows),
        picture_hash=torch.arange(rows),
        extra={name: torch.stack([pair.numbers[name] for pair in picks]) for name in names},
        features=known_features(parts, rows),
    )


def made_up_tokens(tokens: list[Tensor], num_different: int) -> Tensor:
    """Return tokens [b, L]; those that repeat the sample get another first word, since equal ones are encoded once."""
    stacked = torch.stack(tokens)
    repeats = torch.arange(len(stacked)) // num_different
    again = repeats > 0
    stacked[again, 1] = 300 + repeats[again].to(stacked.dtype)
    return stacked


def known_features(parts: PlannedParts, rows: int) -> dict[str, Tensor]:
    """Return made-up features of the tower whose features are cached, float32 [rows, D]."""
    side = parts.config.cached_tower
    if side is None:
        return {}
    width = parts.model.model_config["embed_dim"]
    return {f"{side}_features": functional.normalize(torch.randn(rows, width), dim=-1)}
