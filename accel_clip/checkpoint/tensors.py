"""Nested state as JSON and named tensors: the two forms in which it can be stored without pickling."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from accel_clip.faults import ConfigError

OF_THE_SETTINGS = ("peak_lr", "weight_decay")  # in a group of parameters, where no step changes them
PLAIN = (bool, int, float, str, type(None))


def copied_to_cpu(tensor: Tensor) -> Tensor:
    """Return a contiguous copy in CPU memory that shares nothing with any other tensor."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu").copy_(tensor.detach())


def flatten(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Return nested state as JSON that keeps tuples and the types of keys; its tensors are copied into `tensors`.

    name: what the value's tensors are called, extended by a key for every level. What JSON has no form for is an object
    with one entry that says its kind. Raises `ConfigError` for a value of any other kind.
    """
    if isinstance(value, PLAIN):
        return value
    if isinstance(value, Tensor):
        tensors[name] = copied_to_cpu(value)
        return {"tensor": name}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, Mapping):
        return {"mapping": [[key, flatten(entry, f"{name}.{key}", tensors)] for key, entry in value.items()]}
    if isinstance(value, (list, tuple)):
        entries = [flatten(entry, f"{name}.{index}", tensors) for index, entry in enumerate(value)]
        return {"tuple": entries} if isinstance(value, tuple) else entries
    raise ConfigError(
        f"optim.name: this optimizer keeps a {type(value).__name__} in its state ({name}), which a checkpoint cannot "
        "store: choose another optimizer"
    )


def unflatten(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Return the nested state that `flatten` was given, with tensors from `tensors`.

    Raises ValueError, LookupError, TypeError or AttributeError for what `flatten` never gives.
    """
    if isinstance(value, list):
        return [unflatten(entry, tensors) for entry in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dtype" and isinstance(dtype := getattr(torch, content), torch.dtype):
        return dtype
    if kind == "tuple":
        return tuple(unflatten(entry, tensors) for entry in content)
    if kind != "mapping":
        raise ValueError(f"{str(kind)[:80]!r} with {str(content)[:80]!r}")
    return {key: unflatten(entry, tensors) for key, entry in content}


def load_optimizer_state(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Put an optimizer into a saved state, exactly.

    torch moves the state to each parameter's device (and the step count to where fused and capturable kernels want it),
    but it also casts to the parameter's dtype, and stored tensors have lost their memory layout, which fused kernels
    rely on; both are put right here. Raises ValueError or KeyError for the state of other parameters, and for other
    rates than this one was built with, which a schedule multiplies.
    """
    built = [{name: group.get(name) for name in OF_THE_SETTINGS} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    loaded_groups = [{name: group.get(name) for name in OF_THE_SETTINGS} for group in optimizer.param_groups]
    if loaded_groups != built:
        raise ValueError(f"its groups have {loaded_groups}, and the settings say {built}")
    for parameter, loaded, saved in matched_states(optimizer, state):
        for key, value in saved.items():
            now = loaded.get(key)
            if key != "step" and isinstance(now, Tensor) and isinstance(value, Tensor):
                loaded[key] = in_form_of(parameter, now, value)


def matched_states(optimizer: Optimizer, state: dict[str, Any]) -> Iterator[tuple[Tensor, dict[str, Any], Any]]:
    """Yield every parameter that has a saved state, with its state in the optimizer and the saved one."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, saved in state["state"].items():
        if isinstance(index, int):
            yield parameters[index], optimizer.state[parameters[index]], saved


def in_form_of(parameter: Tensor, loaded: Tensor, saved: Tensor) -> Tensor:
    """Return a loaded tensor with the dtype it was saved in and, where it has the parameter's shape, its layout."""
    like = parameter if loaded.shape == parameter.shape else loaded
    if loaded.dtype == saved.dtype and loaded.stride() == like.stride():
        return loaded
    return torch.empty_like(like, dtype=saved.dtype, device=loaded.device).copy_(saved)
