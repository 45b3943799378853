"""The rates of a run that its settings leave open, by what it begins with, and those of one that is lengthened."""

from __future__ import annotations

from dataclasses import replace

from accel_clip.config import Config
from accel_clip.optim.schedules import Schedule, build_schedule

FOR_WEIGHTS_LR, FOR_WEIGHTS_DECAY = 1e-5, 0.1  # published fine-tunes of CLIP lie between 1e-6 and 5e-5


def with_rates(config: Config, saved: Config | None) -> Config:
    """Return the settings with a rate and a decay: those given, else those of the run that goes on, else the usual.

    saved: the settings of the run in the folder. Weights that are trained further get the rate of a fine-tune.
    """
    optim = config.optim
    usual = (FOR_WEIGHTS_LR, FOR_WEIGHTS_DECAY) if config.model.trains_weights else (optim.peak_lr, optim.decay)
    of_run = (None, None) if saved is None else (saved.optim.lr, saved.optim.weight_decay)
    rate, decay = (first_known(*each) for each in zip((optim.lr, optim.weight_decay), of_run, usual, strict=True))
    return replace(config, optim=replace(optim, lr=rate, weight_decay=decay))


def first_known(*values: float | None) -> float:
    """Return the first of several values that is not None."""
    return next(value for value in values if value is not None)


def describe_rates(given: Config, settled: Config) -> str | None:
    """Return what to say of rates that were left open where weights are trained further, None where nothing is."""
    values = {"optim.lr": given.optim.lr, "optim.weight_decay": given.optim.weight_decay}
    if None not in values.values() or not settled.model.trains_weights:
        return None
    numbers = {"optim.lr": settled.optim.peak_lr, "optim.weight_decay": settled.optim.decay}
    chosen = ", ".join(f"{key} {numbers[key]:g}" for key, value in values.items() if value is None)
    return f"{chosen}: the model brings weights, and this is gentle to them; a value of your own wins"


def describe_lengthening(config: Config, schedule: Schedule, former_steps: int, step: int) -> str | None:
    """Return what becomes of the rate in a run that goes on after `step` and had `former_steps`, None where nothing."""
    if schedule.num_steps == former_steps or step >= schedule.num_steps:
        return None
    former = build_schedule(config.optim, former_steps).multiplier(min(step, former_steps - 1))
    now = schedule.multiplier(step)
    rates = f"optim.lr goes on at {config.optim.peak_lr * now:.3g}"
    if now == former:
        return f"{rates}, by the curve of {schedule.num_curve_steps} steps that it had (optim.length)"
    return (
        f"{rates}, where it was {config.optim.peak_lr * former:.3g}: its curve is that of {schedule.num_curve_steps} "
        f"steps now, and had {former_steps}; --optim.length {former_steps} keeps the former curve"
    )
