"""What `STATUS.json` says of a run while it goes, and how it ended."""

from __future__ import annotations

from accel_clip.checkpoint.run_state import RunState
from accel_clip.faults import INTERRUPTED_EXIT_CODE, Preempted, describe, exit_code_of
from accel_clip.run.folder import RunFolder


class RunStatus:
    """Writes the file as the run goes; how it ended early is said by the first that says it."""

    def __init__(self, folder: RunFolder, state: RunState, command: str, is_main_process: bool) -> None:
        self.folder, self.state, self.command, self.is_main_process = folder, state, command, is_main_process

    def running(self) -> None:
        """Say that the run goes on from here; the first process does."""
        if self.is_main_process:
            self.folder.write_status("running", self.state.step, command=self.command)

    def complete(self) -> None:
        """Say that the run has come to its end; the first process does."""
        if self.is_main_process:
            self.folder.write_status("complete", self.state.step, exit_code=0)

    def ended_by(self, error: BaseException) -> None:
        """Say why the run ended early, from the first process where all know it."""
        known_to_all = getattr(error, "on_every_process", False)
        if self.is_main_process or not known_to_all:
            state = "preempted" if isinstance(error, (Preempted, KeyboardInterrupt)) else "failed"
            self.folder.write_end(state, self.state.step, exit_code_of(error), describe(error), self.command)

    def interrupted(self) -> None:
        """Say that the run was stopped, before a process that does not hear of it is ended."""
        self.folder.write_end("preempted", self.state.step, INTERRUPTED_EXIT_CODE, "interrupted", self.command)

    def hangs(self, message: str) -> None:
        """Say that the run hangs, before the watchdog ends this process."""
        self.folder.write_end("failed", self.state.step, 1, message, self.command)
