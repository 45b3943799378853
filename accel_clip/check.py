"""What can be known before the hours start: every name and every file that the settings mention."""

from __future__ import annotations

from accel_clip.config import Config
from accel_clip.data.sources.resolve import locate
from accel_clip.plugins import load_plugins
from accel_clip.run_folder import RunFolder


def check_files(config: Config) -> None:
    """Raise for a used run folder, a plugin or data that cannot be found; torch is not imported for it."""
    RunFolder(config.output_dir).refuse_used()
    check_sources(config)


def check_sources(config: Config) -> None:
    """Run the plugins and raise for a source that cannot be found."""
    load_plugins(config.plugins)
    named = {"data.train": config.data.train, "data.val": config.data.val or []}
    if config.eval.zero_shot is not None:
        named["eval.zero_shot"] = [config.eval.zero_shot]
    for setting, items in named.items():
        for item in items:
            locate(item, setting)


def check_names(config: Config) -> None:
    """Raise `ConfigError` for an unknown loss, tracker, optimizer, schedule or model, before anything is built."""
    from accel_clip.losses.base import build_loss
    from accel_clip.optim.optimizers import check_optimizer
    from accel_clip.optim.schedules import check_schedule
    from accel_clip.tracking import check_trackers

    build_loss(config.loss)
    check_trackers(config.track.to)
    check_schedule(config.optim)
    check_optimizer(config.optim)
    from accel_clip.models.build import registered_name  # imports open_clip, so it comes last

    registered_name(config.model.name)
