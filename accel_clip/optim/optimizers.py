"""Optimizers by name, and the parameter groups that decide rate and weight decay."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch.nn import Parameter
from torch.optim import Optimizer

from accel_clip.config import OptimConfig, require
from accel_clip.faults import ConfigError, one_line
from accel_clip.models.names import matches
from accel_clip.registry import Registry, check_options
from accel_clip.typed import Range

# An optimizer is `(parameter_groups, lr, weight_decay, **options) -> torch.optim.Optimizer`: a function or a class.
OPTIMIZERS = Registry("optimizer", setting="optim.name")
SHARE = Range(0, 1)
FUSED_DEVICE_TYPES = {"cpu", "cuda", "mps", "xpu"}  # where torch has one kernel for a whole AdamW step


@OPTIMIZERS.register("adamw")
def adamw(
    parameter_groups: list[dict[str, Any]],
    lr: float,
    weight_decay: float,
    betas: tuple[float, float] = (0.9, 0.98),
    eps: float = 1e-6,
    amsgrad: bool = False,
    foreach: bool | None = None,
    fused: bool | None = None,
) -> Optimizer:
    """torch.optim.AdamW with the constants of CLIP's vision transformers (arXiv 2103.00020), fused where torch can."""
    if fused is None and not foreach:
        devices = {parameter.device.type for group in parameter_groups for parameter in group["params"]}
        fused = devices <= FUSED_DEVICE_TYPES or None
    return torch.optim.AdamW(
        parameter_groups, lr, betas, eps, weight_decay, amsgrad=amsgrad, foreach=foreach, fused=fused
    )


@OPTIMIZERS.register("sgd")
def sgd(
    parameter_groups: list[dict[str, Any]],
    lr: float,
    weight_decay: float,
    momentum: float = 0.9,
    dampening: float = 0.0,
    nesterov: bool = False,
) -> Optimizer:
    """torch.optim.SGD with momentum; its weight decay is added to the gradient (timm's sgdw decouples it)."""
    for name, share in (("momentum", momentum), ("dampening", dampening)):
        require(SHARE.holds(share), f"optim.options.{name}", share, f"it must be {SHARE.words}")
    return torch.optim.SGD(parameter_groups, lr, momentum, dampening, weight_decay, nesterov)


def build_optimizer(
    named_parameters: Iterable[tuple[str, Parameter]], config: OptimConfig, no_weight_decay: Collection[str] = ()
) -> Optimizer:
    """Return the optimizer of `config` over the trainable ones of an open_clip model's named parameters.

    `no_weight_decay` are names that never decay (`model.no_weight_decay()`). Raises `ConfigError` as `check_optimizer`
    does, for option values that cannot work, and for patterns that match nothing.
    """
    factory = check_optimizer(config)
    groups = parameter_groups(named_parameters, config, no_weight_decay)
    try:
        optimizer = factory(groups)
    except (TypeError, ValueError, ArithmeticError, AssertionError) as problem:
        raise ConfigError(f"optim.options: {config.name} refuses {config.options}: {one_line(problem)}") from problem
    for group in optimizer.param_groups:
        group.setdefault("peak_lr", group["lr"])
    return optimizer


def check_optimizer(config: OptimConfig) -> Callable[[list[dict[str, Any]]], Optimizer]:
    """Return what makes the optimizer of parameter groups, with rate, weight decay and options bound.

    Raises `ConfigError` for an unknown or unusable optimizer and for options that it does not take.
    """
    factory = find_optimizer(config.name)
    parameters = inspect.signature(factory).parameters
    given = (next(iter(parameters), ""), "lr", "weight_decay")
    check_options("optim.options", config.name, factory, config.options, given)
    takes_any = any(entry.kind is inspect.Parameter.VAR_KEYWORD for entry in parameters.values())
    shared = {"lr": config.peak_lr, "weight_decay": config.decay}
    taken = {name: value for name, value in shared.items() if takes_any or name in parameters}
    if "weight_decay" not in taken and config.decay > 0:
        raise ConfigError(f"optim.weight_decay: {config.name} has none; set it to 0, or choose another optimizer")
    return partial(factory, **taken, **plain_options(config.options))


def find_optimizer(name: str) -> Callable[..., Optimizer]:
    """Return the registered optimizer of that name, else timm's; raises `ConfigError` for one that cannot be used."""
    return OPTIMIZERS.get(name) if name in OPTIMIZERS else timm_optimizer(name)


def set_learning_rate(optimizer: Optimizer, multiplier: float) -> float:
    """Set every group to its highest rate times `multiplier`; return the first group's rate, the one to log."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * multiplier
    return float(optimizer.param_groups[0]["lr"])


def parameter_groups(
    named_parameters: Iterable[tuple[str, Parameter]], config: OptimConfig, no_weight_decay: Collection[str] = ()
) -> list[dict[str, Any]]:
    """Return one group of trainable parameters for each pair of rate and weight decay, those at `optim.lr` first.

    Parameters below two dimensions (biases, norms, logit scale) and those named in `no_weight_decay` do not decay.
    A group has `params`, `lr`, `weight_decay` and `peak_lr`, its highest rate, which schedules multiply.
    """
    trainable = {name: parameter for name, parameter in named_parameters if parameter.requires_grad}
    if not trainable:
        raise ConfigError("model.freeze: no parameter is left to train; freeze less")
    deciding = {name: first_match(config.lr_by_name, name) for name in trainable}
    check_patterns(config.lr_by_name, deciding)
    members: dict[tuple[float, float], list[Parameter]] = {}
    for name, parameter in trainable.items():
        pattern = deciding[name]
        rate = config.peak_lr if pattern is None else config.lr_by_name[pattern]
        decay = 0.0 if parameter.ndim < 2 or name in no_weight_decay else config.decay
        members.setdefault((rate, decay), []).append(parameter)
    order = sorted(members, key=lambda pair: (pair[0] != config.peak_lr, -pair[0], -pair[1]))
    return [{"params": members[pair], "lr": pair[0], "weight_decay": pair[1], "peak_lr": pair[0]} for pair in order]


def first_match(patterns: Iterable[str], name: str) -> str | None:
    """Return the first pattern that stands for the parameter, or None."""
    return next((pattern for pattern in patterns if matches(pattern, name)), None)


def check_patterns(patterns: Iterable[str], deciding: Mapping[str, str | None]) -> None:
    """Raise `ConfigError` for a pattern that decides over no trainable parameter (`deciding`: name to its pattern)."""
    for pattern in patterns:
        if pattern in deciding.values():
            continue
        if any(matches(pattern, name) for name in deciding):
            reason = "decides nothing, because patterns before it match all that it matches; write it first"
        else:
            some = ", ".join(list(deciding)[:: max(1, len(deciding) // 3)][:3])
            reason = f"matches no trainable parameter; write image, text or a name with *, names are like {some}"
        raise ConfigError(f"optim.lr_by_name: '{pattern}' {reason}")


def plain_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options with lists, which is all YAML has, as the tuples that optimizers expect."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}


def timm_optimizer(name: str) -> Callable[..., Optimizer]:
    """Return timm's optimizer of that name with timm's defaults.

    Raises `ConfigError` when there is none, when it needs a package or a device that is not here, and when it needs
    second derivatives, which a step cut into micro-batches does not have.
    """
    from timm.optim import get_optimizer_class, get_optimizer_info

    if name not in timm_names():
        raise OPTIMIZERS.unknown(name, [known for known, _ in list_optimizers()])
    info = get_optimizer_info(name)
    if info.second_order:
        raise ConfigError(f"optim.name: '{name}' needs second derivatives, which a training step does not compute")
    try:
        factory: Callable[..., Optimizer] = get_optimizer_class(name)
    except (ImportError, AssertionError) as problem:
        raise ConfigError(f"optim.name: '{name}' cannot be used on this machine: {problem}") from problem
    return partial(factory, momentum=0.9) if info.has_momentum else factory


def list_optimizers() -> list[tuple[str, str]]:
    """Return name and description of every optimizer: the registered ones, then timm's that they do not replace."""
    from timm.optim import get_optimizer_info

    infos = {name: get_optimizer_info(name) for name in timm_names() if name not in OPTIMIZERS}
    timms = [(name, info.description) for name, info in infos.items() if not info.second_order]
    return [(entry.name, entry.description) for entry in OPTIMIZERS] + timms


def timm_names() -> list[str]:
    """Return the names of timm's optimizers, sorted."""
    from timm.optim import list_optimizers

    return [str(name) for name in list_optimizers()]
