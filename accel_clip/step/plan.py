"""How large a micro-batch is and how many graphs are kept: what this machine's memory allows, found by trying.

1. Try one chunk of each tower, forward and backward, and count the bytes that its graph holds. Without
   `train.micro_batch_size` the chunk is the process's whole part of the batch, halved until it fits.
2. All processes take the smallest size that one of them found.
3. Keep the graphs of as many of the last chunks as the budget holds: `train.activation_gib`, else most of what is free.

The result decides time and memory only: the gradient is the same for every plan, to rounding.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from accel_clip.config import GIB, TrainConfig
from accel_clip.console import say
from accel_clip.faults import ConfigError
from accel_clip.models.anatomy import Anatomy
from accel_clip.models.build import ClipModel
from accel_clip.models.data_parallel import DataParallel
from accel_clip.process.accelerator import num_local_processes
from accel_clip.process.container import memory_left
from accel_clip.randomness import RandomState
from accel_clip.step.chunks import Plan
from accel_clip.step.contrastive import unchanged_statistics

SHARE_OF_FREE_MEMORY = {"cpu": 0.5}  # other programs want theirs; on a device the run is alone
SHARE_ON_A_DEVICE = 0.8
PROBE_ROWS = (2, 4)  # a graph's size is computed from these; on a CPU too large a trial would swap
COST_OF_A_GROUP = {"cpu": 32}  # tokens; measured on two cores with 4 layers of width 256
COST_OF_A_GROUP_ON_A_DEVICE = 8192  # a few hundred kernels, each at least as long as its start takes
STATE_BYTES = 12  # a parameter's gradient and the two moments of Adam in float32, which come after the trial


@dataclass(frozen=True)
class ModelTrial:
    """What a trial of a model on this machine needs."""

    parallel: DataParallel
    """the wrapped model, and where it runs"""
    model: ClipModel
    """its picture size and tokenizer, which made-up inputs are of"""
    anatomy: Anatomy
    """what may be done with its towers"""
    optimizer: Any
    """which holds moments already where the run goes on"""

    @property
    def accelerator(self) -> Accelerator:
        """Return the accelerator that has wrapped the model."""
        return self.parallel.accelerator

    @property
    def wrapped(self) -> nn.Module:
        """Return the wrapped model."""
        return self.parallel.model

    def inputs(self, rows: int) -> dict[str, dict[str, Any]]:
        """Return made-up inputs of `rows` rows for each trained side, or for chunks of whole pairs."""
        device = self.accelerator.device
        image = torch.zeros(rows, 3, *self.model.picture_size, dtype=torch.uint8, device=device)
        text = self.model.tokenizer(["a picture"]).to(device).expand(rows, -1).contiguous()
        if not self.anatomy.separate:
            return {"image": {"image": image, "text": [text]}}
        sides = {"image": image, "text": [text]}
        return {side: {side: each} for side, each in sides.items() if side not in self.anatomy.frozen}


def choose_plan(trial: ModelTrial, config: TrainConfig) -> Plan:
    """Return the plan of a run; collective. Raises `ConfigError` when not even one row, or the size asked for, fits."""
    whole = config.batch_size // trial.accelerator.num_processes
    asked = config.micro_batch_size
    rows = largest_that_fits(trial, min(asked or whole, whole), may_shrink=asked is None)
    rows = agreed_minimum(trial.accelerator, rows)
    kept = graphs_within(trial, config, rows, whole)
    cost_of_a_group = COST_OF_A_GROUP.get(trial.accelerator.device.type, COST_OF_A_GROUP_ON_A_DEVICE)
    kept = {side: agreed_minimum(trial.accelerator, number) for side, number in kept.items()}
    keeps_all_captions = not trial.anatomy.stochastic and kept.get("text", 0) * rows >= whole
    plan = Plan(rows, whole if keeps_all_captions else rows, kept, cost_of_a_group)
    if rows < whole:
        shown = ", ".join(f"{number} of {side}s" for side, number in plan.kept.items())
        say(f"micro-batches of {rows} rows; graphs kept between the two passes: {shown or 'none'}")
        warn_of_batch_norm(trial.wrapped)
    return plan


def plan_for_stage(trial: ModelTrial, config: TrainConfig, stage: int, saved: Mapping[str, Any] | None) -> Plan:
    """Return the plan of a stage, by its number: the one in a checkpoint where that was made for it, else a new one.

    config: the settings in force in the stage. Collective; raises as `choose_plan` does.
    """
    is_known = saved is not None and saved.get("stage", 0) == stage
    plan = kept_plan(trial, config, saved) if saved is not None and is_known else None
    return plan or choose_plan(trial, config)


def plan_state(trial: ModelTrial, config: TrainConfig, stage: int, plan: Plan) -> dict[str, Any]:
    """Return a plan, its stage and what it depends on beside the machine's memory, as plain JSON for a checkpoint."""
    made_for = made_for_now(trial, config)
    return {"stage": stage, "made_for": made_for, "threads": torch.get_num_threads(), **asdict(plan)}


def made_for_now(trial: ModelTrial, config: TrainConfig) -> dict[str, Any]:
    """Return what a plan made now would be made for."""
    asked = {key: getattr(config, key) for key in ("micro_batch_size", "activation_gib", "threads")}
    return {**asked, "num_processes": trial.accelerator.num_processes}


def kept_plan(trial: ModelTrial, config: TrainConfig, saved: Mapping[str, Any]) -> Plan | None:
    """Return the plan in a checkpoint, None when it was made for other settings or no longer fits, which is said."""
    plan = Plan(**{field.name: saved[field.name] for field in fields(Plan)})
    same = saved["made_for"] == made_for_now(trial, config)
    if same:
        torch.set_num_threads(saved["threads"])
    if same and still_fits(trial, plan):
        return plan
    say("the batch is cut in another way than before: from here on the run is equal to rounding only")
    return None


def largest_that_fits(trial: ModelTrial, rows: int, may_shrink: bool) -> int:
    """Return `rows`, or the first of its halves for which every tower's forward and backward pass fits."""
    while not fits(trial, rows):
        if not may_shrink:
            raise ConfigError(f"train.micro_batch_size: {rows} rows do not fit into memory: make it smaller, or null")
        if rows == 1:
            raise ConfigError("model.name: not even one row fits into memory: choose a smaller model or image size")
        rows = (rows + 1) // 2
    return rows


def fits(trial: ModelTrial, rows: int) -> bool:
    """Return whether the graphs of one chunk of each side fit together: tried on a device, computed on a CPU."""
    device = trial.accelerator.device
    if device.type == "cpu":
        return sum(graph_bytes(trial, rows).values()) <= free_for_graphs(trial)
    try:
        for inputs in trial.inputs(rows).values():
            try_chunk(trial, inputs)
    except torch.OutOfMemoryError:
        return False
    finally:
        give_back_memory(device)
    return sum(graph_bytes(trial, rows).values()) <= free_for_graphs(trial)


def give_back_memory(device: torch.device) -> None:
    """Return to a device what trials have left: a pass that ran out of memory is held by the error that it raised."""
    gc.collect()
    torch.get_device_module(device).empty_cache()


def graphs_within(trial: ModelTrial, config: TrainConfig, rows: int, whole: int) -> dict[str, int]:
    """Return how many chunks of each trained side of a batch of `whole` pairs keep their graph; captions go first.

    The budget is what remains beside the one chunk of each side that is recomputed.
    """
    sizes = graph_bytes(trial, rows)
    num_chunks = -(-whole // rows)
    budget = free_for_graphs(trial) if config.activation_gib is None else config.activation_gib * GIB
    if config.activation_gib is None and sum(sizes.values()) * num_chunks > budget:
        budget -= sum(sizes.values())
    kept = {}
    for side, size in reversed(sizes.items()):
        kept[side] = num_chunks if size == 0 else max(0, min(num_chunks, int(budget // size)))
        budget -= kept[side] * size
    return kept


def graph_bytes(trial: ModelTrial, rows: int) -> dict[str, int]:
    """Return the bytes that the graph of one chunk of each trained side holds.

    A line through two small trials: copies of weights in half precision are in every graph, whatever its rows.
    """
    few, more = (
        {side: try_chunk(trial, inputs) for side, inputs in trial.inputs(number).items()} for number in PROBE_ROWS
    )
    per_row = {side: (more[side] - few[side]) / (PROBE_ROWS[1] - PROBE_ROWS[0]) for side in few}
    return {side: round(few[side] + per_row[side] * (rows - PROBE_ROWS[0])) for side in few}


def settle_reduction(trial: ModelTrial) -> None:
    """Let the reduction of gradients find its order now, in passes that leave no trace, and not in the first steps."""
    if trial.accelerator.num_processes == 1:
        return
    inputs = {name: each for side in trial.inputs(1).values() for name, each in side.items()}
    with leaving_no_trace(trial):
        trial.parallel.settle(inputs, sum_of)


def try_chunk(trial: ModelTrial, inputs: dict[str, Any]) -> int:
    """Return the bytes that the graph of one forward pass holds, after a backward pass through it; leaves no trace."""
    held: dict[int, int] = {}
    parameters = {each.data_ptr() for each in trial.wrapped.parameters()}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # itself, it would hold the graph that holds it, where no backward pass comes

    with leaving_no_trace(trial), trial.parallel.alone():
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            total = sum_of(trial.wrapped(**inputs))
        total.backward()
    return sum(held.values())


def sum_of(outputs: dict[str, Tensor]) -> Tensor:
    """Return a scalar that all outputs are part of."""
    return torch.stack([each.float().sum() for each in outputs.values() if each.is_floating_point()]).sum()


@contextmanager
def leaving_no_trace(trial: ModelTrial) -> Iterator[None]:
    """Run a block in training mode without leaving gradients, statistics of batch norm, or used random numbers."""
    before = RandomState(trial.accelerator.device)
    trial.wrapped.train()
    try:
        with unchanged_statistics(trial.wrapped):
            yield
    finally:
        for parameter in trial.wrapped.parameters():
            parameter.grad = None
        before.restore()


def free_for_graphs(trial: ModelTrial) -> float:
    """Return the bytes of memory that graphs may take: a share of what gradients and optimizer state will leave."""
    device = trial.accelerator.device
    trained = sum(each.numel() for each in trial.wrapped.parameters() if each.requires_grad)
    to_come = max(0, STATE_BYTES * trained - bytes_of_state(trial.optimizer))
    return SHARE_OF_FREE_MEMORY.get(device.type, SHARE_ON_A_DEVICE) * (free_bytes(device) - to_come)


def bytes_of_state(optimizer: Optimizer) -> int:
    """Return the bytes that an optimizer's state holds: nothing before the first step, and all of it after a resume."""
    values = [value for state in optimizer.state.values() for value in state.values()]
    return sum(value.nbytes for value in values if isinstance(value, Tensor))


def free_bytes(device: torch.device) -> int:
    """Return the bytes that are free on a device, or in this machine's memory for one of its processes."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(min(psutil.virtual_memory().available, memory_left())) // num_local_processes()


def still_fits(trial: ModelTrial, plan: Plan) -> bool:
    """Return whether a plan made earlier fits into every process's memory now; collective."""
    return bool(agreed_minimum(trial.accelerator, int(fits(trial, plan.micro_batch_size))))


def agreed_minimum(accelerator: Accelerator, value: int) -> int:
    """Return the smallest value of all processes."""
    return int(accelerator.gather(torch.tensor([value], device=accelerator.device)).min())


def warn_of_batch_norm(model: nn.Module) -> None:
    """Say once that batch norm makes a model depend on how the batch is cut."""
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training for module in model.modules()):
        say("warning: batch norm takes its statistics from a micro-batch, so the size of one changes the result")
