"""What the environment of a process asks of its launch: followed and said, or refused; never followed unsaid.

Accelerate lets variables outrank what it is told in code, and a launcher or a cluster leaves some behind. Each that
would change the training is met here, before anything is imported that reads it.
"""

from __future__ import annotations

from collections.abc import Mapping

from accel_clip.config import TrainConfig
from accel_clip.faults import ConfigError

TRUE, FALSE = ("y", "yes", "t", "true", "on", "1"), ("n", "no", "f", "false", "off", "0")  # as Accelerate reads them
MODES = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "tensor, context or sequence parallelism",
    "ACCELERATE_USE_SAGEMAKER": "the distributed training of SageMaker",
}
"""Ways to divide a model or its training, under none of which a step has been shown to be exact."""
FLAGS = (
    *MODES,
    *("ACCELERATE_USE_CPU", "ACCELERATE_DEBUG_MODE", "ACCELERATE_CPU_AFFINITY", "ACCELERATE_ENABLE_RICH"),
    *("ACCELERATE_DYNAMO_USE_FULLGRAPH", "ACCELERATE_DYNAMO_USE_DYNAMIC", "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION"),
    *("ACCELERATE_INIT_INCLUDE_BUFFERS", "FORK_LAUNCHED", "USE_TORCH_XLA"),
)
"""Variables that Accelerate reads as truth values, at every start."""
LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
PRECISIONS = ("no", "bf16", "fp16")
PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
MEETING = ("MASTER_ADDR", "MASTER_PORT")
MPI_SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
MPI = (
    *MPI_SIZES,
    *("PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK"),
    *("MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_RANK"),
    *("MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE"),
)


def check_environment(environment: Mapping[str, str], train: TrainConfig) -> None:
    """Raise `ConfigError` for a variable that would have another training than the settings say, or none at all.

    It names the variable, its value and the way out. Torch and Accelerate are not imported for it.
    """
    for name in FLAGS:
        is_true(environment, name)
    check_launch(environment)
    refuse_modes(environment)
    check_precision(environment)
    check_accumulation(environment, train)
    level = environment.get("ACCELERATE_LOG_LEVEL")
    if level is not None and level.upper() not in LEVELS:
        raise refusal("ACCELERATE_LOG_LEVEL", level, f"it must be one of {', '.join(LEVELS)}", "unset it")


def check_launch(environment: Mapping[str, str]) -> None:
    """Raise `ConfigError` where several processes were asked for and one was started, or what names it is incomplete.

    `accelerate launch --cpu --num_processes 2` sets a rendezvous address and no `WORLD_SIZE`: one process starts, and
    says nothing. What a launch left in a shell makes a process wait for others that nobody started.
    """
    if "MASTER_PORT" in environment and not any(name in environment for name in PLACE):
        raise ConfigError(
            "several processes were asked for and only this one was started: for two processes on a CPU use "
            "'accelerate launch --config_file accelerate_configs/cpu_2.yaml train.py'; "
            "for one, leave --num_processes away (or unset MASTER_PORT)"
        )
    refuse_mpi(environment)
    has_no_rank = environment.get("LOCAL_RANK") == "-1"
    named = [name for name in PLACE if name in environment and not (has_no_rank and name == "LOCAL_RANK")]
    found = {name: whole(environment, name) for name in named}
    names_one = all(value == int("SIZE" in name) for name, value in found.items()) and "LOCAL_RANK" not in found
    if names_one or (not found and "MASTER_PORT" not in environment):
        return
    needed = (*PLACE[:3], *MEETING)
    missing = [name for name in needed if name not in found and not (name in MEETING and environment.get(name))]
    given = ", ".join(f"{name}={environment[name]}" for name in found)
    way_out = f"unset {' '.join(found)} where an earlier launch left them, or launch with accelerate_configs/"
    if missing:
        raise ConfigError(
            f"{given}: this names one of several processes, and {', '.join(missing)} is not set: {way_out}"
        )
    size_here = found.get("LOCAL_WORLD_SIZE", found["WORLD_SIZE"])
    if not (found["RANK"] < found["WORLD_SIZE"] and found["LOCAL_RANK"] < size_here <= found["WORLD_SIZE"]):
        raise ConfigError(f"{given}: a rank counts from 0 and stays below the number of processes: {way_out}")


def refuse_mpi(environment: Mapping[str, str]) -> None:
    """Raise `ConfigError` for processes that MPI started and nobody told of each other: each would train alone."""
    for name in MPI:
        if name in environment:
            whole(environment, name)
    for name in MPI_SIZES:
        if "WORLD_SIZE" not in environment and int(environment.get(name, "1")) > 1:
            way_out = "launch with one of accelerate_configs/ on each machine, or unset it"
            raise refusal(name, environment[name], "processes that MPI starts do not train together", way_out)


def refuse_modes(environment: Mapping[str, str]) -> None:
    """Raise `ConfigError` for a way to divide the training that is not supported."""
    for name, mode in MODES.items():
        is_off = name.endswith("SAGEMAKER") and environment.get("ACCELERATE_SAGEMAKER_DISTRIBUTED_TYPE") == "NO"
        if is_true(environment, name) and not is_off:
            way_out = "launch with accelerate_configs/multi_gpu.yaml, or unset it"
            raise refusal(name, environment[name], f"{mode} is not supported", way_out)
    backend = environment.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if backend.lower() != "no":
        way_out = "set train.compile true in its place, and --dynamo_backend no (or unset it)"
        raise refusal("ACCELERATE_DYNAMO_BACKEND", backend, "the launcher would compile the model as a whole", way_out)


def check_precision(environment: Mapping[str, str]) -> None:
    """Raise `ConfigError` for a precision of the launcher's that is not supported."""
    asked = environment.get("ACCELERATE_MIXED_PRECISION", "no")
    if asked not in PRECISIONS:
        way_out = "set train.precision, or unset it"
        raise refusal("ACCELERATE_MIXED_PRECISION", asked, f"it must be one of {', '.join(PRECISIONS)}", way_out)


def check_accumulation(environment: Mapping[str, str], train: TrainConfig) -> None:
    """Raise `ConfigError` where the environment has other gradient accumulation than `train.accumulate`."""
    name = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"
    if name in environment and whole(environment, name) != train.accumulate:
        rule = f"it outranks train.accumulate, which is {train.accumulate}"
        raise refusal(name, environment[name], rule, f"set train.accumulate to {environment[name]}, or unset it")


def is_true(environment: Mapping[str, str], name: str) -> bool:
    """Return a variable that holds a truth value, False where it is not set; raises `ConfigError` for any other."""
    value = environment.get(name, "no")
    if value.lower() not in (*TRUE, *FALSE):
        raise refusal(name, value, "it must be true or false", "set it so, or unset it")
    return value.lower() in TRUE


def whole(environment: Mapping[str, str], name: str) -> int:
    """Return a variable that holds a whole number from 0 on; raises `ConfigError` for any other."""
    if not (environment[name].isascii() and environment[name].isdigit()):
        raise refusal(name, environment[name], "it must be a whole number", "unset it, or launch anew")
    return int(environment[name])


def refusal(name: str, value: str, rule: str, way_out: str) -> ConfigError:
    """Return the error for a variable of the environment."""
    return ConfigError(f"environment variable {name}: {value!r} does not work: {rule}: {way_out}")
