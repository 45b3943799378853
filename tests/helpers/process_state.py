"""What a test may leave to the next one: settings of this process, read before and after it and compared.

1. `process_state` reads them from what is imported already. It imports nothing, and takes less than half a millisecond.
2. `left_behind` compares with an earlier state. What the first import of a module brings is no difference.

Random numbers are not among them: tests draw from generators and seeds of their own.
"""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from multiprocessing import resource_tracker
from operator import attrgetter
from pathlib import Path
from typing import Any

ABSENT = "absent"
PATIENCE_SECONDS = 20.0  # with a thread that is about to end: only a test that fails waits for so long
SIGNALS = sorted(signal.valid_signals())
START_METHOD = multiprocessing.get_all_start_methods()[0]  # the default, until one is asked for
ACCELERATE_STATES = ("PartialState", "AcceleratorState", "GradientState")
PRECISIONS = ("cuda.matmul", "cudnn", "cudnn.conv", "cudnn.rnn", "mkldnn", "mkldnn.conv", "mkldnn.matmul", "mkldnn.rnn")
REGISTRIES = {
    "accel_clip.losses.base": "LOSSES",
    "accel_clip.optim.optimizers": "OPTIMIZERS",
    "accel_clip.optim.schedules": "SCHEDULES",
    "accel_clip.data.sources.base": "SOURCES",
    "accel_clip.evaluation.base": "EVALUATORS",
    "accel_clip.run.hooks": "HOOKS",
}
CUDNN = attrgetter("enabled", "benchmark", "benchmark_limit", "deterministic", "allow_tf32")
COME_WITH_MODULES = ("sys: levels of logging", "accel_clip.registry: names")  # new keys of these
SET_BY_IMPORTS = ("PYTEST_CURRENT_TEST", "TOKENIZERS_PARALLELISM", "TORCHINDUCTOR_CACHE_DIR")  # open_clip's and torch's
SET_BY_TIMM = "recompile_limit"  # as one of its optimizers is imported

Readers = dict[str, Callable[[Any], object]]


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in SET_BY_IMPORTS}


def handlers() -> dict[signal.Signals, object]:
    """Return what answers each signal, but for the handler that torch sets once and for all with its first workers."""
    found = {number: signal.getsignal(number) for number in SIGNALS}
    of_torch = getattr(found[signal.SIGCHLD], "__module__", None) == "torch.utils.data._utils.signal_handling"
    return {**found, signal.SIGCHLD: signal.SIG_DFL} if of_torch else found


def threads() -> set[threading.Thread]:
    """Return the threads that run, but for the one that tqdm keeps to look after its bars."""
    return {each for each in threading.enumerate() if each.name != "tqdm_monitor"}


def children() -> set[int]:
    """Return the processes that this one started and did not wait for, but for the one that tidies up after it."""
    found: set[int] = set()
    for task in Path("/proc/self/task").glob("*/children"):  # Linux has it; elsewhere none are seen
        with suppress(OSError):  # a thread that has ended meanwhile
            found.update(map(int, task.read_text().split()))
    return found - {getattr(resource_tracker._resource_tracker, "_pid", None)}


def levels() -> dict[str, int]:
    loggers = logging.root.manager.loggerDict.items()
    return {name: each.level for name, each in loggers if type(each) is logging.Logger}


def accelerate_states() -> dict[str, dict[str, Any]]:
    """Return what Accelerate keeps for this process, by the name of the class; empty before it is imported."""
    home = sys.modules.get("accelerate.state")
    return {} if home is None else {name: getattr(home, name)._shared_state for name in ACCELERATE_STATES}


def modes(torch: Any) -> dict[str, object]:
    return {
        "gradient": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "anomaly": (torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()),
        "autocast": [(torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda")],
        "functions": torch._C._len_torch_function_stack(),
        "dispatch": torch._C._len_torch_dispatch_stack(),
    }


def kernels(backends: Any) -> dict[str, object]:
    attention = ("flash", "mem_efficient", "math", "cudnn")
    return {
        "cudnn": CUDNN(backends.cudnn),
        "mkldnn": (backends.mkldnn.enabled, backends.mkldnn.deterministic),
        "attention": [getattr(backends.cuda, f"{kind}_sdp_enabled")() for kind in attention],
    }


def precisions(backends: Any) -> dict[str, object]:
    matmul = backends.cuda.matmul
    reduced = (matmul.allow_fp16_reduced_precision_reduction, matmul.allow_bf16_reduced_precision_reduction)
    of_float32 = {name: attrgetter(name)(backends).fp32_precision for name in PRECISIONS}
    return {"all": backends.fp32_precision, **of_float32, "sums of half precision": reduced}


def registries() -> list[Any]:
    """Return the registries of the package whose modules are imported."""
    return [getattr(sys.modules[home], name) for home, name in REGISTRIES.items() if home in sys.modules]


def names_of_others(registry: Any) -> set[str]:
    """Return the names in a registry that the package itself did not register."""
    return {each.name for each in registry if not each.target.__module__.startswith("accel_clip.")}


OF_PYTHON: Readers = {
    "environment": lambda _: environment(),
    "folder": lambda _: os.getcwd(),
    "signals": lambda _: handlers(),
    "signal mask": lambda _: signal.pthread_sigmask(signal.SIG_BLOCK, ()),
    "alarms": lambda _: (signal.getitimer(signal.ITIMER_REAL), signal.getitimer(signal.ITIMER_PROF)),
    "threads": lambda _: threads(),
    "child processes": lambda _: children(),
    "start method": lambda _: multiprocessing.get_start_method(allow_none=True) or START_METHOD,
    "modules": lambda sys: set(sys.modules),
    "import path": lambda sys: list(sys.path),
    "arguments": lambda sys: list(sys.argv),
    "hooks": lambda sys: (sys.excepthook, sys.unraisablehook, threading.excepthook, sys.gettrace()),
    "limits": lambda sys: (sys.getrecursionlimit(), sys.getswitchinterval(), sys.get_int_max_str_digits()),
    "collector": lambda _: (gc.isenabled(), gc.get_threshold(), gc.get_freeze_count()),
    "socket timeout": lambda _: socket.getdefaulttimeout(),
    "tiny numbers are flushed": lambda sys: sys.float_info.min / 2 == 0,
    "logging": lambda _: (
        logging.root.level,
        *logging.root.handlers,
        *logging.root.filters,
        logging.root.manager.disable,
    ),
    "levels of logging": lambda _: levels(),
}
OF_TORCH: Readers = {
    "threads": lambda torch: (torch.get_num_threads(), torch.get_num_interop_threads()),
    "precision": lambda torch: precisions(torch.backends),
    "kernels": lambda torch: kernels(torch.backends),
    "determinism": lambda torch: (
        torch.get_deterministic_debug_mode(),
        torch.utils.deterministic.fill_uninitialized_memory,
    ),
    "defaults": lambda torch: (torch.get_default_dtype(), str(torch.get_default_device())),
    "modes": modes,
    "sharing": lambda torch: torch.multiprocessing.get_sharing_strategy(),
    "process group": lambda torch: torch.distributed.is_available() and torch.distributed.is_initialized(),
}
READERS: dict[str, Readers] = {
    "sys": OF_PYTHON,
    "torch": OF_TORCH,
    "torch.nn.modules.module": {
        "hooks": lambda home: [
            len(each) for name, each in vars(home).items() if name.endswith("_hooks") and name[0] == "_"
        ]
    },
    "torch._dynamo.config": {"settings": lambda config: {**config.get_config_copy(), SET_BY_TIMM: None}},
    "torch._inductor.config": {"settings": lambda config: config.get_hash()},  # a copy takes half a millisecond
    "accelerate.state": {"state": lambda _: {name: dict(shared) for name, shared in accelerate_states().items()}},
    "accel_clip.registry": {"names": lambda _: {each.setting: names_of_others(each) for each in registries()}},
    "PIL.Image": {"largest picture": lambda home: home.MAX_IMAGE_PIXELS},
    "PIL.ImageFile": {"cut pictures are read": lambda home: home.LOAD_TRUNCATED_IMAGES},
    "huggingface_hub.constants": {"offline": lambda constants: constants.HF_HUB_OFFLINE},
    "datasets.config": {"offline": lambda config: config.HF_HUB_OFFLINE},
}


def process_state() -> dict[str, Any]:
    """Return what every reader reads whose module is imported."""
    return {
        f"{module}: {name}": read(sys.modules[module])
        for module, readers in READERS.items()
        if module in sys.modules
        for name, read in readers.items()
    }


def left_behind(before: dict[str, Any]) -> list[str]:
    """Return what differs from an earlier state, one line a setting."""
    after = process_state()
    return [line for name, old in before.items() for line in differences(name, old, after[name])]


def differences(name: str, old: Any, new: Any) -> list[str]:
    """Return how one setting differs: by the keys of a mapping, by what is new in a set."""
    if isinstance(old, Mapping):
        keys = old if name in COME_WITH_MODULES else {**old, **new}
        differing = [key for key in keys if old.get(key, ABSENT) != new.get(key, ABSENT)]
        return [f"{name} {key}: {old.get(key, ABSENT)!r} is now {new.get(key, ABSENT)!r}" for key in differing]
    if isinstance(old, set):
        return [f"{name}: {each} is new" for each in sorted(new - old, key=str) if matters(each)]
    return [] if old == new else [f"{name}: {old!r} is now {new!r}"]


def matters(new: object) -> bool:
    """Return whether something new in a set was left: a thread that goes on, or a module from a folder of a test."""
    if isinstance(new, threading.Thread):
        new.join(PATIENCE_SECONDS)
        return new.is_alive()
    return new not in sys.modules or is_of_a_test(str(new))


def is_of_a_test(module: str) -> bool:
    """Return whether a module was loaded from a test's folder; the project itself may lie among these."""
    file = getattr(sys.modules[module], "__file__", None)
    if not isinstance(file, str) or not file.startswith(tempfile.gettempdir()):
        return False
    return not file.startswith((sys.prefix, str(Path(__file__).parents[2])))
