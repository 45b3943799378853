"""Where measured points go: `metrics.jsonl`, Accelerate's trackers and the console."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
import yaml
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, TensorBoardTracker, filter_trackers

from accel_clip.config import Config
from accel_clip.console import say
from accel_clip.faults import ConfigError, StorageError, nearest, one_line
from accel_clip.process.accelerator import known_to_all
from accel_clip.run.folder import RunFolder

TENSORBOARD = "tensorboard"
TRAINING_METRICS = ("loss", "lr", "logit_scale", "grad_norm", "samples_per_second", "data_time", "step_time")
OWN_CLOCK = ("samples_per_second", "step_time")  # differ between processes
OF_WANDB = {"id": "RUN_ID", "resume": "RESUME", "dir": "DIR"}  # arguments of its own, and the ends of its variables
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
    """The trackers of a run; `log` and `log_picture` write on the main process only, and every process calls them.

    What cannot be kept in the run folder, `metrics.jsonl` or the files of TensorBoard, raises `StorageError` on every
    process. Any other tracker that raises is left out from then on, and that is said: its server is not the run's.
    """

    def __init__(
        self, accelerator: Accelerator, config: Config, folder: RunFolder, run_id: str, resumed_step: int | None = None
    ) -> None:
        """Open the trackers; TensorBoard forgets the points after `resumed_step`, which come anew.

        run_id: under which trackers on a server know the run, the same when it goes on.
        """
        self.accelerator, self.folder, self.run_id = accelerator, folder, run_id
        accelerator.project_configuration.logging_dir = str(folder.path)
        self.trackers: list[GeneralTracker] = []
        purge = {} if resumed_step is None else {"purge_step": resumed_step + 1}
        with known_to_all(accelerator):
            for name in config.track.to:
                with self.guarded(name):
                    self.open(TensorBoardTracker(name, str(folder.path), **purge) if name == TENSORBOARD else name)
            self.each(lambda tracker: store_settings(tracker, config, accelerator.is_main_process))

    def open(self, tracker: str | GeneralTracker) -> None:
        """Start one tracker."""
        accelerator = self.accelerator
        accelerator.log_with = filter_trackers(tracker, str(self.folder.path))
        if not accelerator.log_with:
            raise ImportError("Accelerate does not find its package")  # and would go on without a word
        try:
            accelerator.init_trackers("accel_clip", init_kwargs=identities(self.run_id, self.folder.path))
            self.trackers += accelerator.trackers
        finally:
            accelerator.trackers = []  # or the end of the training would close them too

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write one point; raises `StorageError`."""
        with known_to_all(self.accelerator):
            if self.accelerator.is_main_process:
                self.append(step, values)
            self.each(lambda tracker: tracker.log(dict(values), step=step))

    def append(self, step: int, values: Mapping[str, float]) -> None:
        """Write one point into `metrics.jsonl`."""
        point = {"step": step, **{key: finite_or_none(value) for key, value in values.items()}}
        try:
            with self.folder.metrics.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(point) + "\n")
        except OSError as error:
            raise StorageError(f"{self.folder.metrics}: {error}") from error

    def log_picture(self, step: int, name: str, draw: Callable[[], numpy.ndarray | None]) -> None:
        """Show a picture, uint8 [H, W, 3], in the trackers that show pictures; it is drawn only where there is one.

        Raises `StorageError`.
        """
        showing = [tracker for tracker in self.trackers if hasattr(tracker, "log_images")]
        picture = draw() if showing and self.accelerator.is_main_process else None
        with known_to_all(self.accelerator):
            if picture is not None:
                self.each(lambda tracker: show_picture(tracker, step, name, picture))

    def close(self) -> None:
        """Flush and close the trackers; raises `StorageError`."""
        with known_to_all(self.accelerator):
            self.each(lambda tracker: tracker.finish())
        self.trackers = []

    def each(self, action: Callable[[Any], object]) -> None:
        """Let every tracker do something."""
        for tracker in list(self.trackers):
            with self.guarded(tracker.name):
                action(tracker)

    @contextmanager
    def guarded(self, name: str) -> Iterator[None]:
        """Meet the errors of a tracker: raise `StorageError` for TensorBoard's, and leave any other one out."""
        try:
            yield
        except Exception as error:  # trackers are libraries of many people
            if name == TENSORBOARD:
                raise StorageError(
                    f"{self.folder.path / TENSORBOARD}: {one_line(error)}: free some space, or leave tensorboard out "
                    "of track.to"
                ) from error
            self.trackers = [tracker for tracker in self.trackers if tracker.name != name]
            say(f"warning: track.to: {name} has failed and is left out, the run goes on: {one_line(error)}")


def store_settings(tracker: Any, config: Config, is_main_process: bool) -> None:
    """Show the settings of a run in a tracker."""
    if tracker.name != TENSORBOARD:
        tracker.store_init_configuration(flat_for_trackers(config.to_dict()))
    elif is_main_process:
        tracker.writer.add_text("config", f"```yaml\n{yaml.safe_dump(config.to_dict())}\n```")
        tracker.writer.flush()


def show_picture(tracker: Any, step: int, name: str, picture: numpy.ndarray) -> None:
    """Show a picture, uint8 [H, W, 3], in a tracker that shows pictures."""
    if tracker.name == TENSORBOARD:
        tracker.log_images({name: picture[None]}, step=step, dataformats="NHWC")
        tracker.writer.flush()
    elif hasattr(tracker, "log_images"):
        tracker.log_images({name: [picture]}, step=step)


@contextmanager
def quiet_writer() -> Iterator[None]:
    """Keep Python from writing a traceback where TensorBoard's writing thread fails: its next call raises the error."""
    before = threading.excepthook

    def say_of_others(failed: threading.ExceptHookArgs) -> None:
        if not type(failed.thread).__module__.startswith("tensorboard"):
            before(failed)

    threading.excepthook = say_of_others
    try:
        yield
    finally:
        threading.excepthook = before


def identities(run_id: str, folder: Path) -> dict[str, dict[str, Any]]:
    """Return, by tracker, what makes a run that goes on the one that it was there, with its files in the run's folder.

    What the tracker's own variables of the environment say stays.
    """
    wandb = {"id": run_id, "resume": "allow", "dir": str(folder)}
    return {
        "wandb": {key: value for key, value in wandb.items() if f"WANDB_{OF_WANDB[key]}" not in os.environ},
        "swanlab": {"id": run_id, "resume": "allow", "logdir": str(folder / "swanlog")},
        "trackio": {"name": run_id, "resume": "allow"},
    }


def finite_or_none(value: float) -> float | None:
    """Return the value, or None where JSON has no number for it."""
    return value if math.isfinite(value) else None


def flat_for_trackers(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings as one dictionary of dotted keys and values that trackers take."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            flat.update(flat_for_trackers(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value if isinstance(value, (bool, int, float, str)) else str(value)
    return flat
