"""The environment of a launch: every variable that Accelerate reads is followed and said, refused, or of no effect."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import accelerate
import pytest
import torch

from accel_clip.config import TrainConfig
from accel_clip.faults import ConfigError
from accel_clip.process.accelerator import build_accelerator, process_as_found
from accel_clip.process.environment import check_environment
from helpers.commands import accel_clip, launch, train_py
from helpers.models import small_model

READERS = ("getenv", "parse_flag_from_env", "parse_choice_from_env", "get_int_from_env")
OF_MAPPINGS = ("get", "pop", "setdefault")
SCOPES = (ast.FunctionDef, ast.ClassDef, ast.Module)

FOLLOWED = {"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_USE_CPU": "true", "ACCELERATE_TORCH_DEVICE": "cpu"}
REFUSED = {
    "ACCELERATE_DYNAMO_BACKEND": "inductor",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_USE_FSDP": "true",
    "ACCELERATE_USE_MEGATRON_LM": "true",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
    "ACCELERATE_USE_SAGEMAKER": "true",
    "LOCAL_RANK": "0",
    "LOCAL_WORLD_SIZE": "8",
    "MASTER_PORT": "29500",
    "MV2_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_SIZE": "2",
    "PMI_SIZE": "2",
    "RANK": "1",
    "WORLD_SIZE": "2",
}
"""Each by itself; the place of a process among several is followed where it is named in full."""
BY_ITSELF_NOTHING = {
    "ACCELERATE_ALLOW_CP_STANDALONE": "true",
    "ACCELERATE_BYPASS_DEVICE_MAP": "true",
    "ACCELERATE_CPU_AFFINITY": "1",
    "ACCELERATE_DEBUG_MODE": "true",
    "ACCELERATE_DEBUG_RDV_FILE": "/nowhere",
    "ACCELERATE_DOWNCAST_BF16": "true",
    "ACCELERATE_DYNAMO_MODE": "max-autotune",
    "ACCELERATE_DYNAMO_USE_DYNAMIC": "true",
    "ACCELERATE_DYNAMO_USE_FULLGRAPH": "true",
    "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION": "true",
    "ACCELERATE_ENABLE_RICH": "true",
    "ACCELERATE_FP8_BACKEND": "TE",
    "ACCELERATE_GRADIENT_CLIPPING": "0.1",
    "ACCELERATE_INIT_INCLUDE_BUFFERS": "true",
    "ACCELERATE_LOG_LEVEL": "ERROR",
    "ACCELERATE_SAGEMAKER_DISTRIBUTED_TYPE": "DATA_PARALLEL",
    "FORK_LAUNCHED": "1",
    "HF_HOME": "/nowhere",
    "MASTER_ADDR": "10.0.0.1",
    "MPI_LOCALNRANKS": "2",
    "MPI_LOCALRANKID": "1",
    "MV2_COMM_WORLD_LOCAL_RANK": "1",
    "MV2_COMM_WORLD_LOCAL_SIZE": "2",
    "MV2_COMM_WORLD_RANK": "1",
    "NCCL_IB_DISABLE": "1",
    "NCCL_P2P_DISABLE": "1",
    "NODE_RANK": "1",
    "NPROC": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMP_NUM_THREADS": "3",
    "PJRT_DEVICE": "CPU",
    "PMI_RANK": "1",
    "PT_HPU_LAZY_MODE": "1",
    "TPU_NAME": "mine",
    "USE_TORCH_XLA": "1",
    "XDG_CACHE_HOME": "/nowhere",
    "systemdrive": "/nowhere",
}
OF_REFUSED_MODES = ("ACCELERATE_CONFIG_DS_", "ACCELERATE_DEEPSPEED_", "ACCELERATE_FP8_", "FSDP_", "MEGATRON_LM_")
OF_REFUSED_MODES += ("PARALLELISM_CONFIG_",)
OF_TRACKERS = ("MLFLOW_", "CLEARML_")  # where the points go, not what is trained


def own_nodes(scope: ast.AST) -> Iterator[ast.AST]:
    """Yield what stands in a scope and not in one inside it."""
    for child in ast.iter_child_nodes(scope):
        yield child
        if not isinstance(child, SCOPES):
            yield from own_nodes(child)


def texts(node: ast.AST, known: dict[str, list[str]]) -> list[str]:
    """Return the strings that an expression may be, as far as constants and names of constants say."""
    if isinstance(node, ast.Constant):
        return [node.value] if isinstance(node.value, str) else []
    if isinstance(node, (ast.List, ast.Tuple)):
        return [text for each in node.elts for text in texts(each, known)]
    if isinstance(node, ast.BinOp):
        return [a + b for a in texts(node.left, known) for b in texts(node.right, known)]
    return known.get(node.id, []) if isinstance(node, ast.Name) else []


def names_read(node: ast.AST, known: dict[str, list[str]]) -> list[str]:
    """Return the variables of the environment that a piece of code reads."""
    if isinstance(node, ast.Call) and node.args:
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        reads = name in READERS or (name in OF_MAPPINGS and "environ" in ast.unparse(node.func))
        return texts(node.args[0], known) if reads else []
    if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load) and "environ" in ast.unparse(node.value):
        return texts(node.slice, known)
    if isinstance(node, ast.Compare) and "environ" in ast.unparse(node.comparators[0]):
        return texts(node.left, known)
    return []


def read_by_accelerate() -> set[str]:
    """Return the variables that the installed Accelerate reads, by its source."""
    found: set[str] = set()
    package = Path(accelerate.__file__).parent
    for file in package.rglob("*.py"):
        if "test_utils" in file.parts:
            continue
        for scope in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(scope, SCOPES):
                continue
            known: dict[str, list[str]] = {}
            for node in own_nodes(scope):
                if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and texts(node.value, {}):
                    known.setdefault(node.targets[0].id, []).extend(texts(node.value, {}))
            for node in own_nodes(scope):
                found.update(names_read(node, known))
    return found


VARIABLES = sorted(read_by_accelerate())


def outcome(name: str) -> str:
    if name in FOLLOWED:
        return "followed"
    if name in REFUSED:
        return "refused"
    known = name in BY_ITSELF_NOTHING or name.startswith((*OF_REFUSED_MODES, *OF_TRACKERS))
    return "nothing" if known else "unknown"


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("accel_clip.process.accelerator.torch.set_num_threads", lambda _: None)
    with process_as_found():
        yield


def facts() -> dict[str, object]:
    """Return everything about the `Accelerator` of a run that its environment could change."""
    accelerator = build_accelerator(TrainConfig())
    state, loading = accelerator.state, vars(accelerator.dataloader_config)
    handlers = {key: value for key, value in vars(accelerator).items() if key.endswith("_handler")}
    handlers["init_handler"] = None  # its timeout is an object, new every time
    return {
        "precision": (accelerator.mixed_precision, accelerator.native_amp, accelerator.fp8_enabled, accelerator.scaler),
        "steps": (accelerator.gradient_accumulation_steps, accelerator.step_scheduler_with_optimizer),
        "compiled": state.dynamo_plugin.backend.value,
        "kind": (accelerator.distributed_type, accelerator.num_processes, accelerator.process_index),
        "device": (accelerator.device, accelerator.device_placement),
        "plugins": (getattr(state, "fsdp_plugin", None), state.deepspeed_plugins, state.parallelism_config),
        "loading": loading,
        "handlers": handlers,
        "project": vars(accelerator.project_configuration),
    }


@cache
def facts_without_any() -> dict[str, object]:
    return facts()


def test_every_variable_that_accelerate_reads_has_an_outcome() -> None:
    unknown = [name for name in VARIABLES if outcome(name) == "unknown"]
    assert not unknown
    assert set(FOLLOWED) | set(REFUSED) | set(BY_ITSELF_NOTHING) <= set(VARIABLES)
    assert len(VARIABLES) > 100


@pytest.mark.parametrize("name", [name for name in VARIABLES if outcome(name) == "refused"])
def test_a_variable_that_would_change_the_training_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, REFUSED[name])
    with pytest.raises(ConfigError, match=name) as caught:
        build_accelerator(TrainConfig())
    message = str(caught.value)
    assert REFUSED[name] in message or name == "MASTER_PORT"
    assert "unset" in message and "\n" not in message and "train.precision" not in message


@pytest.mark.parametrize("name", [name for name in VARIABLES if outcome(name) == "nothing"])
def test_every_other_variable_changes_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = facts_without_any()
    monkeypatch.setenv(name, BY_ITSELF_NOTHING.get(name, "true"))
    assert facts() == before


def test_what_is_followed_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from accel_clip.process.accelerator import describe_processes

    for name, value in FOLLOWED.items():
        monkeypatch.setenv(name, value)
    accelerator = build_accelerator(TrainConfig())
    describe_processes(accelerator)
    assert (accelerator.device.type, accelerator.mixed_precision) == ("cpu", "bf16")
    said = capsys.readouterr().err
    assert "ACCELERATE_TORCH_DEVICE: training on cpu" in said
    assert "1 process(es), cpu, precision bf16" in said
    assert build_accelerator(TrainConfig(precision="no")).mixed_precision == "no"
    assert "ACCELERATE_MIXED_PRECISION is bf16, and train.precision no is what is done" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("variables", "word"),
    [
        ({"ACCELERATE_USE_CPU": "maybe"}, "ACCELERATE_USE_CPU: 'maybe'"),
        ({"ACCELERATE_USE_FSDP": "1"}, "FSDP is not supported"),
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, "ACCELERATE_MIXED_PRECISION: 'fp8'"),
        ({"ACCELERATE_MIXED_PRECISION": "BF16"}, "ACCELERATE_MIXED_PRECISION: 'BF16'"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "auto"}, "must be a whole number"),
        ({"ACCELERATE_TORCH_DEVICE": "cuda:99"}, "ACCELERATE_TORCH_DEVICE: 'cuda:99'"),
        ({"ACCELERATE_TORCH_DEVICE": "gpu"}, "ACCELERATE_TORCH_DEVICE: 'gpu'"),
        ({"ACCELERATE_TORCH_DEVICE": "meta"}, "ACCELERATE_TORCH_DEVICE: 'meta'"),
        ({"ACCELERATE_LOG_LEVEL": "loud"}, "ACCELERATE_LOG_LEVEL: 'loud'"),
        ({"ACCELERATE_DYNAMO_USE_DYNAMIC": "perhaps"}, "ACCELERATE_DYNAMO_USE_DYNAMIC: 'perhaps'"),
        ({"FORK_LAUNCHED": "x"}, "FORK_LAUNCHED: 'x'"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE: 'two' does not work: it must be a whole number"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not set"),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, "MASTER_ADDR, MASTER_PORT is not set"),
        ({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "a rank counts"),
        ({"PMI_SIZE": "many"}, "PMI_SIZE: 'many'"),
    ],
)
def test_odd_variables_are_named_with_their_value(
    variables: dict[str, str], word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=word):
        build_accelerator(TrainConfig())


@pytest.mark.parametrize(
    "variables",
    [
        {"WORLD_SIZE": "1"},
        {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_WORLD_SIZE": "1"},
        {"LOCAL_RANK": "-1"},
        {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1", "ACCELERATE_USE_FSDP": "False"},
        {"ACCELERATE_USE_SAGEMAKER": "true", "ACCELERATE_SAGEMAKER_DISTRIBUTED_TYPE": "NO"},
        {"PMI_SIZE": "1", "OMPI_COMM_WORLD_SIZE": "1"},
    ],
)
def test_variables_that_ask_for_what_is_done_are_no_reason_to_stop(variables: dict[str, str]) -> None:
    check_environment(variables, TrainConfig())


def test_a_built_accelerator_that_differs_is_refused() -> None:
    from accel_clip.process.accelerator import require_as_asked

    accelerator = build_accelerator(TrainConfig())
    require_as_asked(accelerator, "no", 1)
    with pytest.raises(ConfigError, match="gradient accumulation: 2 was asked for, and Accelerate is set to 1"):
        require_as_asked(accelerator, "no", 2)
    accelerator.dataloader_config.split_batches = True
    with pytest.raises(ConfigError, match="split batches"):
        require_as_asked(accelerator, "no", 1)


def test_updates_are_those_of_the_settings_on_the_command_line(tmp_path: Path) -> None:
    words = ["--model.name", small_model(tmp_path), "--train.steps", "2", "--output_dir", "run"]
    done = train_py(*words, folder=tmp_path, ACCELERATE_GRADIENT_ACCUMULATION_STEPS="4")
    assert done.code == 2 and len(done.err.strip().splitlines()) == 1
    assert "set train.accumulate to 4, or unset it" in done.err and not (tmp_path / "run").exists()
    left = train_py(*words, folder=tmp_path, LOCAL_RANK="0")
    assert left.code == 2 and "LOCAL_RANK=0" in left.err and len(left.err.strip().splitlines()) == 1


@pytest.mark.slow
@pytest.mark.skipif(torch.accelerator.is_available(), reason="there it is refused too, after more is built")
def test_a_launcher_that_shards_is_refused_on_a_cpu(tmp_path: Path) -> None:
    launcher = ("--use_fsdp", "--num_processes", "2", "--main_process_port", "0")
    done = launch("--output_dir", "run", folder=tmp_path, launcher=launcher)
    assert done.code != 0 and "FSDP is not supported" in done.err and not (tmp_path / "run").exists()
    assert done.err.count("accel-clip: error:") == 1
    assert accel_clip("list", "losses", folder=tmp_path).code == 0
