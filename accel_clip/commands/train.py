"""`accelerate launch train.py`: a run that begins, goes on, or is complete already."""

from __future__ import annotations

from accel_clip.config import Config
from accel_clip.console import is_first_process
from accel_clip.models.export import read_metrics
from accel_clip.process.accelerator import process_as_found
from accel_clip.process.terminal import lasting_output
from accel_clip.run.folder import RunFolder
from accel_clip.run.preconditions import Start, check_names, prepare
from accel_clip.trainer import Trainer, TrainResult


@lasting_output()
@process_as_found()
def train(config: Config) -> TrainResult:
    """Train a model as the settings say, or go on with the run in `output_dir`; all of `accelerate launch train.py`.

    Raises the errors of `accel_clip.faults`; nothing is written before everything has been found and built. A run that
    is complete is left as it is. Threads and TF32, which are set for the whole process, are given back at the end.
    """
    return train_from(prepare(config))


@lasting_output()
@process_as_found()
def train_from(start: Start) -> TrainResult:
    """Train as a start says that has been looked at already, or return where its run ended."""
    folder = RunFolder(start.config.output_dir)
    if is_first_process():
        folder.tidy()
    if start.decision.kind == "complete":
        return finished_result(folder)
    check_names(start.config, start.decision.described)
    start.decision.say_changes(folder.path)
    with folder.lock:
        if is_first_process() and folder.path.exists():
            folder.own()
        try:
            trainer = Trainer(start, folder)
        except KeyboardInterrupt:
            folder.note_interrupted_start()
            raise
        return trainer.run()


def finished_result(folder: RunFolder) -> TrainResult:
    """Return where a complete run ended."""
    return TrainResult(read_metrics(folder.export), folder.read_status()["step"], folder.export)
