"""How large a micro-batch is and how many graphs are kept: what this machine's memory allows, found by trying.

1. Try one chunk of each tower, forward and backward, and count the bytes that its graph holds. Without
   `train.micro_batch_size` the chunk is the process's whole part of the batch, halved until it fits.
2. All processes take the smallest size that one of them found.
3. Keep the graphs of as many of the last chunks as the budget holds: `train.activation_gib`, else most of what is free.

The result decides time and memory only: the gradient is the same for every plan, to rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from accel_clip.config import TrainConfig
from accel_clip.console import say
from accel_clip.faults import ConfigError
from accel_clip.models.anatomy import Anatomy
from accel_clip.models.build import ClipModel
from accel_clip.processes import num_local_processes
from accel_clip.randomness import RandomState
from accel_clip.step import Plan, unchanged_statistics

SHARE_OF_FREE_MEMORY = {"cpu": 0.5}  # other programs want theirs; on a device the run is alone
SHARE_ON_A_DEVICE = 0.8
PROBE_ROWS = 4  # on a CPU, where too large a trial would swap, a graph's size is computed from that of a few rows
GIB = 2**30


@dataclass(frozen=True)
class Workplace:
    """What a trial needs: the wrapped model, how to make up inputs for it, and where it runs."""

    accelerator: Accelerator
    wrapped: nn.Module
    model: ClipModel
    anatomy: Anatomy

    def inputs(self, rows: int) -> list[dict[str, Tensor]]:
        """Return made-up inputs of one chunk of each side, or of one chunk of pairs, for `rows` rows."""
        device, size = self.accelerator.device, self.model.preprocess_config["size"]
        height, width = (size, size) if isinstance(size, int) else size
        image = torch.zeros(rows, 3, height, width, dtype=torch.uint8, device=device)
        text = self.model.tokenizer(["a picture"]).to(device).expand(rows, -1).contiguous()
        if not self.anatomy.separate:
            return [{"image": image, "text": text}]
        sides = {"image": image, "text": text}
        return [{side: each} for side, each in sides.items() if side not in self.anatomy.frozen]


def choose_plan(place: Workplace, config: TrainConfig) -> Plan:
    """Return the plan of a run; collective. Raises `ConfigError` when not even one row, or the size asked for, fits."""
    whole = config.batch_size // place.accelerator.num_processes
    asked = config.micro_batch_size
    rows = largest_that_fits(place, min(asked or whole, whole), may_shrink=asked is None)
    rows = -agreed_maximum(place.accelerator, -rows)
    num_kept = graphs_within(place, config, rows, whole)
    plan = Plan(rows, -agreed_maximum(place.accelerator, -num_kept))
    if rows < whole:
        say(f"micro-batches of {rows} rows, {plan.num_kept} graphs kept between the two passes")
        warn_of_batch_norm(place.wrapped)
    return plan


def largest_that_fits(place: Workplace, rows: int, may_shrink: bool) -> int:
    """Return `rows`, or the first of its halves for which every tower's forward and backward pass fits."""
    while not fits(place, rows):
        if not may_shrink:
            raise ConfigError(f"train.micro_batch_size: {rows} rows do not fit into memory: make it smaller, or null")
        if rows == 1:
            raise ConfigError("model.name: not even one row fits into memory: choose a smaller model or image size")
        rows = (rows + 1) // 2
    return rows


def fits(place: Workplace, rows: int) -> bool:
    """Return whether one chunk of each side fits: tried on a device, computed from a few rows on a CPU."""
    device = place.accelerator.device
    if device.type == "cpu":
        return max(graph_bytes(place, rows)) <= SHARE_OF_FREE_MEMORY["cpu"] * free_bytes(device)
    try:
        for inputs in place.inputs(rows):
            try_chunk(place, inputs)
    except torch.OutOfMemoryError:
        return False
    finally:
        torch.get_device_module(device).empty_cache()
    return True


def graphs_within(place: Workplace, config: TrainConfig, rows: int, whole: int) -> int:
    """Return how many of the last chunks of a batch of `whole` pairs keep their graph; captions come last."""
    device = place.accelerator.device
    share = SHARE_OF_FREE_MEMORY.get(device.type, SHARE_ON_A_DEVICE)
    budget = share * free_bytes(device) if config.activation_gib is None else config.activation_gib * GIB
    num_chunks = -(-whole // rows)
    num_kept = 0
    for size in reversed(graph_bytes(place, rows)):
        fitting = num_chunks if size == 0 else min(num_chunks, int(budget // size))
        num_kept, budget = num_kept + fitting, budget - fitting * size
        if fitting < num_chunks:
            break
    return num_kept


def graph_bytes(place: Workplace, rows: int) -> list[int]:
    """Return the bytes that the graph of one chunk of each side holds, in the order of the sides."""
    tried = min(rows, PROBE_ROWS)
    return [try_chunk(place, inputs) * rows // tried for inputs in place.inputs(tried)]


def try_chunk(place: Workplace, inputs: dict[str, Tensor]) -> int:
    """Return the bytes that the graph of one forward pass holds, after a backward pass through it; leaves no trace."""
    held: dict[int, int] = {}
    parameters = {each.data_ptr() for each in place.wrapped.parameters()}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    before = RandomState(place.accelerator.device)
    place.wrapped.train()
    with unchanged_statistics(place.wrapped), place.accelerator.no_sync(place.wrapped):
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            outputs: dict[str, Any] = place.wrapped(**inputs)
            total = torch.stack([each.float().sum() for each in outputs.values() if each.is_floating_point()]).sum()
        total.backward()
    for parameter in place.wrapped.parameters():
        parameter.grad = None
    before.restore()
    return sum(held.values())


def free_bytes(device: torch.device) -> int:
    """Return the bytes that are free on a device, or in this machine's memory for one of its processes."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available) // num_local_processes()


def agreed_maximum(accelerator: Accelerator, value: int) -> int:
    """Return the largest value of all processes."""
    return int(accelerator.gather(torch.tensor([value], device=accelerator.device)).max())


def warn_of_batch_norm(model: nn.Module) -> None:
    """Say once that batch norm makes a model depend on how the batch is cut."""
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training for module in model.modules()):
        say("warning: batch norm takes its statistics from a micro-batch, so the size of one changes the result")
