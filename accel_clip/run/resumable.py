"""What of a run a checkpoint holds: taken down after a step, put back at a start and where the run rolls back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from accel_clip.checkpoint.contents import check_run
from accel_clip.checkpoint.manifest import Checkpoint
from accel_clip.checkpoint.run_state import RunState
from accel_clip.checkpoint.saver import Saver
from accel_clip.command_line import save_config
from accel_clip.config import Config
from accel_clip.console import say
from accel_clip.data.feed import Feed
from accel_clip.process.accelerator import known_to_all
from accel_clip.run.folder import RunFolder
from accel_clip.run.hooks import Hooks
from accel_clip.run.inputs import Inputs
from accel_clip.run.logbook import Logbook
from accel_clip.run.parts import RunParts
from accel_clip.step.learner import Learner
from accel_clip.typed import fit


@dataclass(frozen=True)
class Resumable:
    """Everything in a run that changes from step to step."""

    config: Config
    """the settings that it goes by"""
    folder: RunFolder
    """where it stands on disk"""
    saver: Saver
    """weights and optimizer, and the checkpoints that they are written to"""
    state: RunState
    """where the run stands; whoever holds it sees a load"""
    feed: Feed
    """where the streams of the data stand"""
    logbook: Logbook
    """meters, early stopping and the list of unusable samples"""
    hooks: Hooks
    """what the user's own hooks keep"""
    inputs: Inputs | None
    """what the settings name by path, on the first process"""

    def begin(self, checkpoint: Checkpoint | None) -> Mapping[str, Any] | None:
        """Put the run into the state of a checkpoint, if there is one, and return what that says of the plan.

        Raises `ConfigError` for a checkpoint of another run, and where a new run would take back another one.
        """
        if checkpoint is None:
            self.folder.require_no_checkpoint()
            return None
        saved = self.load(checkpoint)
        self.feed.load_state_dict(saved["data"])
        if self.saver.is_own(checkpoint) and self.logbook.stopping.best_step == checkpoint.step:
            self.saver.point_to_best(checkpoint.step)
        say(f"going on from {checkpoint.path}")
        plan: Mapping[str, Any] = saved["plan"]
        return plan

    def open_folder(self, checkpoint: Checkpoint | None) -> None:
        """Create the run folder once every process is ready to go, and cut its files to what the checkpoint knows."""
        self.saver.accelerator.wait_for_everyone()
        if not self.saver.accelerator.is_main_process:
            return
        self.folder.create()
        if checkpoint is None:
            self.folder.require_no_checkpoint()
        self.folder.cut_files(self.saver.file_sizes(checkpoint))
        save_config(self.config, self.folder.config)
        if self.inputs is not None:
            self.inputs.keep(self.folder.checkpoints)

    def load(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """Take over what a checkpoint holds but the place in the data and the random states; return all of it."""
        saved = self.saver.restore(checkpoint)
        self.state.take_over(fit(saved["run"], RunState, "run"))
        self.logbook.load_state_dict(saved)
        self.hooks.load_state_dict(saved)
        if not self.saver.is_own(checkpoint):
            self.logbook.bad_samples.forget_list()
        return saved

    def roll_back(self) -> Mapping[str, Any]:
        """Put the run back to its last checkpoint but for its place in the data, and return what that says of the plan.

        Collective.
        """
        self.saver.finish()
        checkpoint = self.saver.find()
        assert checkpoint is not None, "a run that may be rolled back is saved at its start"
        saved = self.load(checkpoint)
        self.saver.restore_random(checkpoint, self.config.seed)
        if self.saver.accelerator.is_main_process:
            self.folder.cut_files(self.saver.file_sizes(checkpoint))
        plan: Mapping[str, Any] = saved["plan"]
        return plan

    def state_dict(self, learner: Learner) -> dict[str, Any]:
        """Return everything beside weights that makes a resumed run the uninterrupted one, as JSON; collective."""
        return {
            "run": self.state.to_dict(),
            "data": self.feed.state_dict(),
            **self.logbook.state_dict(),
            **self.hooks.state_dict(),
            "config": self.config.to_dict(),
            **learner.state_dict(),
            "file_sizes": self.folder.file_sizes(),
            "inputs": None if self.inputs is None else self.inputs.state_dict(),
        }


def build_saver(parts: RunParts, folder: RunFolder) -> Saver:
    """Return what saves weights and optimizer of a run, and puts them back."""
    config, loss = parts.config, parts.loss
    modules = nn.ModuleDict({"clip": parts.model.clip, "loss": nn.ParameterList(loss.parameters())})
    goes_past = config.train.non_finite == "rollback"
    check = partial(check_run, batches_per_step=config.train.accumulate, is_exact=not goes_past)
    optimizer = parts.assembly.optimizer
    return Saver(parts.accelerator, folder.checkpoints, config.checkpoint, modules, optimizer, check)


def read_inputs(parts: RunParts, checkpoint: Checkpoint | None) -> Inputs | None:
    """Return what the settings name by path, on the first process; raises `ConfigError` when it has changed since."""
    inputs = None
    with known_to_all(parts.accelerator):
        if parts.accelerator.is_main_process:
            inputs = Inputs(parts.config, parts.data.named)
            if checkpoint is not None:
                inputs.require_same_as_in(checkpoint)
    return inputs
