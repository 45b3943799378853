"""Where measured points go: `metrics.jsonl`, Accelerate's trackers and the console."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy
import yaml
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, TensorBoardTracker, filter_trackers

from accel_clip.config import Config
from accel_clip.faults import ConfigError, StorageError, nearest
from accel_clip.run_folder import RunFolder

TRAINING_METRICS = ("loss", "lr", "logit_scale", "grad_norm", "samples_per_second", "data_time", "step_time")
PACKAGES = {name: name for name in LOGGER_TYPE_TO_CLASS} | {"comet_ml": "comet-ml"}


def check_trackers(names: list[str]) -> None:
    """Raise `ConfigError` for a tracker that is unknown or not installed."""
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            known = ", ".join(sorted(LOGGER_TYPE_TO_CLASS))
            raise ConfigError(
                f"track.to: unknown tracker '{name}'{nearest(name, LOGGER_TYPE_TO_CLASS) or ';'} known: {known}"
            )
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"track.to: '{name}' is not installed: pip install {PACKAGES[name]}")


class Tracking:
    """The trackers of a run; `log` and `log_picture` write on the main process only."""

    def __init__(
        self, accelerator: Accelerator, config: Config, folder: RunFolder, resumed_step: int | None = None
    ) -> None:
        """Open the trackers; TensorBoard forgets the points after `resumed_step`, which come anew."""
        self.accelerator, self.folder = accelerator, folder
        others = [name for name in config.track.to if name != "tensorboard"]
        accelerator.log_with = filter_trackers(others, str(folder.path))
        if "tensorboard" in config.track.to:
            purge = {} if resumed_step is None else {"purge_step": resumed_step + 1}
            accelerator.log_with.append(TensorBoardTracker("tensorboard", str(folder.path), **purge))
        accelerator.init_trackers("accel_clip")
        for tracker in accelerator.trackers:
            if tracker.name == "tensorboard":
                if accelerator.is_main_process:
                    tracker.writer.add_text("config", f"```yaml\n{yaml.safe_dump(config.to_dict())}\n```")
            else:
                tracker.store_init_configuration(flattened(config.to_dict()))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write one point; raises `StorageError` when `metrics.jsonl` cannot be written."""
        if self.accelerator.is_main_process:
            point = {"step": step, **{key: finite_or_none(value) for key, value in values.items()}}
            try:
                with self.folder.metrics.open("a", encoding="utf-8") as lines:
                    lines.write(json.dumps(point) + "\n")
            except OSError as error:
                raise StorageError(f"{self.folder.metrics}: {error}") from error
        self.accelerator.log(dict(values), step=step)

    def log_picture(self, step: int, name: str, draw: Callable[[], numpy.ndarray | None]) -> None:
        """Show a picture, uint8 [H, W, 3], in the trackers that show pictures; it is drawn only where there is one."""
        showing = [tracker for tracker in self.accelerator.trackers if hasattr(tracker, "log_images")]
        picture = draw() if showing and self.accelerator.is_main_process else None
        if picture is None:
            return
        for tracker in showing:
            if tracker.name == "tensorboard":
                tracker.log_images({name: picture[None]}, step=step, dataformats="NHWC")
            else:
                tracker.log_images({name: [picture]}, step=step)

    def close(self) -> None:
        """Flush and close the trackers."""
        for tracker in self.accelerator.trackers:
            tracker.finish()
        self.accelerator.trackers = []


def finite_or_none(value: float) -> float | None:
    """Return the value, or None where JSON has no number for it."""
    return value if math.isfinite(value) else None


def flattened(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings as one dictionary of dotted keys and values that trackers take."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            flat.update(flattened(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value if isinstance(value, (bool, int, float, str)) else str(value)
    return flat
