"""The processes of a run: the `Accelerator` as the settings ask for it, its precision and its threads."""

from __future__ import annotations

import os
import shlex
import socket
import sys
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from datetime import timedelta

import psutil
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, gather_object

from accel_clip.config import TrainConfig
from accel_clip.console import say
from accel_clip.faults import AccelClipError, ConfigError, one_line
from accel_clip.process.container import core_limit
from accel_clip.process.environment import check_environment, refusal
from accel_clip.process.signals import has_launcher
from accel_clip.process.watchdog import long_patience

SHARDED = ("FSDP", "DEEPSPEED", "MEGATRON_LM", "XLA")
"""Ways of Accelerate's to train under which a step has not been shown to be exact."""


def build_accelerator(config: TrainConfig) -> Accelerator:
    """Return the `Accelerator` of this process; several processes without a GPU for each are told to meet on the CPU.

    It sets threads and TF32 for the whole process: call it inside `process_as_found`. Raises `ConfigError` when the
    launcher's processes did not find each other, or for a precision this machine lacks.
    """
    check_environment(os.environ, config)
    check_device(os.environ)
    stay_on_this_machine(os.environ)
    set_threads(config.threads)
    allow_tf32()
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    forget_previous_accelerator()
    on_cpu = must_train_on_cpu(os.environ, torch.accelerator.device_count())
    precision = choose_precision(config.precision, os.environ, on_cpu)
    patience = timedelta(seconds=long_patience(config.timeout))  # not before the watchdog's
    try:
        accelerator = Accelerator(
            cpu=on_cpu,
            mixed_precision=precision,
            gradient_accumulation_steps=config.accumulate,
            kwargs_handlers=[
                InitProcessGroupKwargs(timeout=patience),
                DistributedDataParallelKwargs(gradient_as_bucket_view=True),  # no second copy of every gradient
            ],
        )
    except ValueError as error:
        raise ConfigError(describe_refusal(error, precision)) from error
    if accelerator.num_processes != world_size:
        raise ConfigError(
            f"the launcher started {world_size} processes and this one sees {accelerator.num_processes}: "
            "launch with one of the files in accelerate_configs/"
        )
    require_as_asked(accelerator, precision, config.accumulate)
    return accelerator


@contextmanager
def process_as_found() -> Iterator[None]:
    """Give threads and TF32 back as they were before the block: a notebook goes on with its own.

    What Accelerate keeps stays until the next `build_accelerator`: results of the block may still ask for it.
    """
    threads = torch.get_num_threads()
    matmul, conv = torch.backends.cuda.matmul, torch.backends.cudnn.conv  # type: ignore[attr-defined]
    precisions, of_products = (matmul.fp32_precision, conv.fp32_precision), product_precision()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        if of_products is not None:
            set_product_precision(of_products)
        matmul.fp32_precision, conv.fp32_precision = precisions


def product_precision() -> str | None:
    """Return torch's older setting of how float32 is multiplied, None where the newer ones were set without it."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return None


def set_product_precision(word: str) -> None:
    """Set how float32 is multiplied on a GPU by torch's older setting; that of the CPU stays as it is."""
    of_cpu = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = of_cpu.fp32_precision
    torch.set_float32_matmul_precision(word)
    of_cpu.fp32_precision = before


def stay_on_this_machine(environment: MutableMapping[str, str]) -> None:
    """Let gloo, which asks nobody who they are, listen on the loopback device alone when no other machine takes part.

    A `GLOO_SOCKET_IFNAME` that is set already stays.
    """
    world_size = environment.get("WORLD_SIZE", "1")
    loopback = next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), None)  # Linux, macOS
    if world_size != "1" and environment.get("LOCAL_WORLD_SIZE") == world_size and loopback is not None:
        environment.setdefault("GLOO_SOCKET_IFNAME", loopback)


def check_device(environment: Mapping[str, str]) -> None:
    """Say that the environment chooses the device; raises `ConfigError` for one that is not there, or for several."""
    name = "ACCELERATE_TORCH_DEVICE"
    if name not in environment:
        return
    value, way_out = environment[name], "unset it, and choose by CUDA_VISIBLE_DEVICES or accelerate launch --gpu_ids"
    if environment.get("WORLD_SIZE", "1") != "1":
        raise refusal(name, value, "every process would train on this one device", way_out)
    try:
        torch.empty(1, device=value).item()
    except (RuntimeError, AssertionError) as error:  # unknown, missing, or without numbers (meta)
        raise refusal(name, value, one_line(error, 100), way_out) from error
    say(f"{name}: training on {value}")


def describe_refusal(error: ValueError, precision: str) -> str:
    """Return in one line why Accelerate could not be set up."""
    if precision != "no" and precision in str(error):
        return f"train.precision: '{precision}' does not work on this machine: {error}"
    return f"these processes cannot be set up: {one_line(error)}: launch with one of the files in accelerate_configs/"


def require_as_asked(accelerator: Accelerator, precision: str, accumulate: int) -> None:
    """Raise `ConfigError` where an `Accelerator` is another than was asked for: the environment has a say in it."""
    state, loading = accelerator.state, accelerator.dataloader_config
    asked_and_built = {
        "mixed precision": (precision, accelerator.mixed_precision),
        "gradient accumulation": (accumulate, accelerator.gradient_accumulation_steps),
        "torch.compile": ("NO", state.dynamo_plugin.backend.value),
        "sharding": (None, next((kind for kind in SHARDED if accelerator.distributed_type.value == kind), None)),
        "FSDP": (None, getattr(state, "fsdp_plugin", None)),
        "DeepSpeed": (None, state.deepspeed_plugins),
        "parallelism": (None, state.parallelism_config),
        "fp8": (False, accelerator.fp8_enabled),
        "split batches": (False, loading.split_batches),
        "device placement": (True, accelerator.device_placement),
    }
    for what, (asked, built) in asked_and_built.items():
        if asked != built:
            raise ConfigError(
                f"{what}: {asked} was asked for, and Accelerate is set to {built} by its environment: launch with one "
                "of the files in accelerate_configs/, without variables that begin with ACCELERATE_"
            )


def forget_previous_accelerator() -> None:
    """Drop the state that Accelerate keeps in a process, so that a notebook can train twice with other settings."""
    if AcceleratorState._shared_state and not torch.distributed.is_initialized():
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


def must_train_on_cpu(environment: Mapping[str, str], num_devices: int) -> bool:
    """Return whether the run trains on the CPU: it is told to, or has several processes where there is no GPU.

    Raises `ConfigError` for more processes on this machine than it has GPUs.
    """
    number = int(environment.get("LOCAL_WORLD_SIZE", "1"))
    if environment.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes"):
        return True
    if number > max(num_devices, 1) and num_devices:
        raise ConfigError(
            f"{number} processes and {num_devices} GPU(s) on this machine: launch one process a GPU "
            f"(--num_processes {num_devices}, times the number of machines), or hide them by CUDA_VISIBLE_DEVICES= to "
            "train on the CPU"
        )
    return number > 1 and not num_devices


def choose_precision(setting: str, environment: Mapping[str, str], on_cpu: bool = False) -> str:
    """Return the mixed precision to ask Accelerate for. Raises `ConfigError` for fp16 on a CPU, which it would ignore.

    `accelerate launch` always writes its `no`, so that counts as unset. Emulated bf16 (T4, V100) does not count as
    bf16: it is slower than fp32.
    """
    launchers = environment.get("ACCELERATE_MIXED_PRECISION", "no")
    if on_cpu and "fp16" in (setting, launchers if setting == "auto" else ""):
        raise ConfigError("train.precision: fp16 needs a GPU, and this run trains on the CPU: use no or bf16")
    if setting != "auto":
        if launchers not in ("no", setting):
            say(f"ACCELERATE_MIXED_PRECISION is {launchers}, and train.precision {setting} is what is done")
        return setting
    if launchers != "no":
        return launchers
    if torch.cuda.is_available() and not on_cpu:
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "no"


def allow_tf32() -> None:
    """Let towers multiply float32 in TF32 where the hardware has it; losses switch it off around themselves."""
    set_product_precision("high")  # set by the newer flag, readers of the older one raise
    torch.backends.cudnn.conv.fp32_precision = "tf32"  # type: ignore[attr-defined]


def num_local_processes() -> int:
    """Return how many processes of the run share this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def own_command() -> str:
    """Return the command that started this run, with its launcher where there is one."""
    own = [sys.executable, *sys.argv]
    if not has_launcher(os.environ):
        return shlex.join(own)
    try:
        return shlex.join(psutil.Process(os.getppid()).cmdline())
    except psutil.Error:
        return shlex.join(own)


def cores_per_process() -> int:
    """Return the CPU cores that each process of the run may count on."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min(cores, core_limit())) // num_local_processes())


def set_threads(threads: int | None) -> None:
    """Set the CPU threads of this process (plain `accelerate launch` sets one)."""
    torch.set_num_threads(threads or cores_per_process())


def choose_workers(workers: int | None, device: torch.device) -> int:
    """Return the loader processes per training process: as many as there are cores when a GPU does the training.

    On a CPU the towers need the cores, so one in four loads.
    """
    if workers is not None:
        return workers
    cores = cores_per_process()
    return max(1, cores // 4) if device.type == "cpu" else min(cores, 16)


def raise_for_all(accelerator: Accelerator, error: AccelClipError | None) -> None:
    """Raise an error that one process has met on every process, so that none waits for one that is gone; collective."""
    failed = accelerator.gather(torch.tensor([error is not None], device=accelerator.device).int())
    if failed.any():
        told = next(each for each in gather_object([error]) if each is not None)
        raise told if error is None else error


@contextmanager
def known_to_all(accelerator: Accelerator) -> Iterator[None]:
    """Raise on every process what one of them raises in a block; collective."""
    met: AccelClipError | None = None
    try:
        yield
    except AccelClipError as error:
        met = error
    raise_for_all(accelerator, met)


def describe_processes(accelerator: Accelerator) -> None:
    """Say on what the run trains."""
    say(
        f"training on {accelerator.num_processes} process(es), {accelerator.device.type}, "
        f"precision {accelerator.mixed_precision}, {torch.get_num_threads()} CPU thread(s) each"
    )
