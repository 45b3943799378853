"""What can be known before anything is built: the folder, and every name and every file that the settings mention."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from accel_clip.checkpoint.saved_state import ModelState
from accel_clip.config import Config, SourceConfig
from accel_clip.console import say
from accel_clip.data.sources.resolve import Locations, as_written, locate
from accel_clip.models.description import check_described
from accel_clip.plugins import load_plugins
from accel_clip.process.environment import check_environment
from accel_clip.redaction import refuse_credentials
from accel_clip.run.problems import Attempts
from accel_clip.run.rates import describe_rates
from accel_clip.run.resume import Decision, decide

Check = Callable[[], object]
"""One look at one setting; it raises when the setting cannot work, whatever the others are."""


@dataclass(frozen=True)
class Start:
    """All that is known of a run before torch is imported, looked at once."""

    config: Config
    """the settings"""
    decision: Decision
    """what becomes of the run's folder"""
    locations: Locations
    """where each source is that the settings name"""


def prepare(config: Config) -> Start:
    """Return the start of a run; torch is not imported.

    Raises for a launch, a model's file, a run folder, a plugin or data that cannot be used.
    """
    check_environment(os.environ, config.train)
    refuse_credentials(config.to_dict())
    decision = decide(config)
    if decision.described is None:  # a run that goes on has it in its checkpoint
        check_described(config.model)
    decision.require_allowed()
    rates = describe_rates(config, decision.config) if decision.kind == "new" else None
    if rates is not None:
        say(rates)
    return Start(decision.config, decision, find_sources(config))


def find_sources(config: Config) -> Locations:
    """Run the plugins and return where each source is; raises for one that cannot be found."""
    load_plugins(config.plugins)
    return locate_sources(config, Attempts())


def check_names(config: Config, described: ModelState | None) -> None:
    """Raise `ConfigError` for an unknown loss, tracker, optimizer, schedule or model, before anything is built.

    described: the model, where a checkpoint has it.
    """
    for check in name_checks(config, described):
        check()


def locate_sources(config: Config, attempts: Attempts) -> Locations:
    """Return where each source is that the settings name; plugins that register some must have run."""
    located = {}
    for setting, item in named_sources(config):
        location = attempts.attempt(partial(locate, item, setting))
        if location is not None:
            located[setting, as_written(item)] = location
    return located


def named_sources(config: Config) -> Iterator[tuple[str, str | SourceConfig]]:
    """Yield every source that the settings name, with the setting, each once for a setting."""
    named = {"data.train": config.data.train, "data.val": config.data.val or []}
    if config.eval.zero_shot is not None:
        named["eval.zero_shot"] = [config.eval.zero_shot]
    for setting, items in named.items():
        yield from ((setting, item) for item in {as_written(item): item for item in items}.values())


def name_checks(config: Config, described: ModelState | None) -> Iterator[Check]:
    """Yield a look at every name that stands for code; plugins that register some must have run."""
    from accel_clip.losses.base import build_loss
    from accel_clip.optim.optimizers import check_optimizer
    from accel_clip.optim.schedules import check_schedule
    from accel_clip.run.tracking import check_trackers

    yield partial(build_loss, config.loss)
    for name in config.track.to:
        yield partial(check_trackers, [name])
    yield partial(check_schedule, config.optim)
    yield partial(check_optimizer, config.optim)
    from accel_clip.evaluation.evaluator import check_evaluator  # imports open_clip, as what follows, so it comes last
    from accel_clip.models.build import registered_name
    from accel_clip.run.hooks import check_hook

    for item in config.eval.also:
        yield partial(check_evaluator, item)
    for item in config.hooks:
        yield partial(check_hook, item)
    if described is not None:
        return
    yield partial(registered_name, config.model.name)
    if config.data.transforms:
        yield partial(check_transforms, config)


def check_transforms(config: Config) -> None:
    """Raise `ConfigError` for an augmentation that is unknown or does not keep a picture at the model's size."""
    from open_clip.model import CLIPVisionCfg
    from open_clip.transform import PreprocessCfg

    from accel_clip.data.pictures.transforms import build_transforms, try_out
    from accel_clip.models.build import registered_name, resolved_config
    from accel_clip.models.description import height_and_width
    from accel_clip.process.network import go_offline_without_hub

    name = registered_name(config.model.name)
    if name.startswith("hf-hub:"):
        go_offline_without_hub()
    vision = resolved_config(name, config.model.options)["vision_cfg"]
    size = height_and_width(vision.get("image_size", CLIPVisionCfg.image_size))
    transforms = build_transforms(config.data.transforms, size, PreprocessCfg.mean)
    assert transforms is not None, "they are checked where there are some"
    try_out(transforms, size)
