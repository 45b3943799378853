"""A copy of everything a run needs to go on, taken in CPU memory at one step."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from accel_clip.checkpoint.tensors import copied_to_cpu, flatten
from accel_clip.faults import reached
from accel_clip.randomness import RandomState

MODEL = "model.safetensors"
OPTIMIZER_TENSORS = "optimizer.safetensors"
OPTIMIZER = "optimizer.json"
STATE = "state.json"
HEADER_BYTES = 256  # at most, for one tensor's entry in the header of its file


@dataclass(frozen=True)
class Snapshot:
    """The contents of a checkpoint's files; nothing else refers to the tensors."""

    step: int
    """optimizer steps taken"""
    num_processes: int
    """processes of the run"""
    is_best: bool
    """whether `BEST` is to point to it"""
    tensors: dict[str, dict[str, Tensor]]
    """by the name of the file, and in it by name"""
    documents: dict[str, str]
    """JSON text by the name of the file"""
    seconds: float
    """what taking it cost the training thread"""

    @property
    def num_bytes(self) -> int:
        """Room that the files take on disk."""
        tensors = [tensor for file in self.tensors.values() for tensor in file.values()]
        text = sum(len(document.encode()) for document in self.documents.values())
        return text + sum(tensor.nbytes + HEADER_BYTES for tensor in tensors)


def take_snapshot(
    step: int,
    model: Module,
    optimizer: Optimizer,
    random_states: Sequence[Mapping[str, Tensor]],
    state: Mapping[str, Any],
    is_best: bool = False,
) -> Snapshot:
    """Return a copy of model, optimizer, random states and `state` as they are now; training may go on at once.

    model: the unwrapped model; several make one with `torch.nn.ModuleDict`. random_states: from `gather_random_states`.
    state: whatever else the run needs, as plain JSON. Raises `ConfigError` for an optimizer whose state cannot be
    stored.
    """
    begin = time.perf_counter()
    optimizer_tensors: dict[str, Tensor] = {}
    optimizer_state = flatten(optimizer.state_dict(), "optimizer", optimizer_tensors)
    tensors = {
        MODEL: {name: copied_to_cpu(tensor) for name, tensor in model.state_dict().items()},
        OPTIMIZER_TENSORS: optimizer_tensors,
    }
    for rank, random_state in enumerate(random_states):
        tensors[random_file(rank)] = {name: copied_to_cpu(tensor) for name, tensor in random_state.items()}
    documents = {OPTIMIZER: json.dumps(optimizer_state), STATE: json.dumps(dict(state), ensure_ascii=False)}
    reached("snapshot", step)
    return Snapshot(step, len(random_states), is_best, tensors, documents, time.perf_counter() - begin)


def gather_random_states(accelerator: Accelerator) -> list[dict[str, Tensor]]:
    """Return the states of torch's generators in every process, by rank: uint8 tensors `cpu` and the device's type.

    Collective: every process calls it.
    """
    now = RandomState(accelerator.device)
    states = {"cpu": now.cpu}
    if now.on_device is not None:
        states[accelerator.device.type] = now.on_device
    mine = torch.cat([state.cpu() for state in states.values()])
    rows = accelerator.gather(mine.to(accelerator.device)[None]).cpu()  # [processes, bytes]
    sizes = [state.numel() for state in states.values()]
    return [dict(zip(states, row.split(sizes), strict=True)) for row in rows]


def random_file(rank: int) -> str:
    """Return the name of the file with a process's random states."""
    return f"random-{rank}.safetensors"


def expected_bytes(model: Module, optimizer: Optimizer) -> int:
    """Return the room that a checkpoint will take on disk, before the optimizer has any state.

    Two numbers are counted for every trained one, as Adam keeps them.
    """
    weights = list(model.state_dict().values())
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return sum(each.nbytes + HEADER_BYTES for each in weights) + 2 * sum(each.nbytes + HEADER_BYTES for each in trained)
