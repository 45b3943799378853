"""What a person sees: lines, errors and the progress bar, from the first process only."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, TypeVar

from accel_clip.faults import UNREAD_EXIT_CODE
from accel_clip.redaction import masked, printable

if TYPE_CHECKING:
    from tqdm import tqdm

    from accel_clip.meters import AverageMeter, RateMeter  # imports torch

T = TypeVar("T")


def is_first_process() -> bool:
    """Return whether this process speaks for all, judged by the launcher's `RANK` (torch is not needed)."""
    return os.environ.get("RANK", "0") == "0"


def say(message: str) -> None:
    """Write one line to standard error, above a progress bar where there is one."""
    if is_first_process():
        write_line(message)


def write_line(message: str) -> None:
    """Write one line to standard error from whichever process this is, without credentials."""
    message = printable(masked(message))
    tqdm = sys.modules.get("tqdm")
    if tqdm is None:
        sys.stderr.write(message + "\n")
    else:
        tqdm.tqdm.write(message, file=sys.stderr)
    sys.stderr.flush()


def result(text: str) -> None:
    """Write what a command was asked for to standard output, for a person or a pipe; without a reader it ends."""
    if is_first_process():
        sys.stdout.write(text + "\n")
        sys.stdout.flush()
        if getattr(sys.stdout, "is_lost", False):
            raise SystemExit(UNREAD_EXIT_CODE)


def error(message: str) -> None:
    """Write one line that says why the command ends, from whichever process this is."""
    write_line(f"accel-clip: error: {message}")


def progress_bar(
    total: int, unit: str, items: Iterable[T] = (), num_done: int = 0, stays: bool = True, is_hidden: bool = False
) -> tqdm[T]:
    """Return a bar that is shown by the first process alone, and goes forward with `items` or by its `update`.

    stays: whether it is left standing when it is closed.
    """
    from tqdm.auto import tqdm

    return tqdm(
        items,
        total=total,
        unit=unit,
        initial=num_done,
        leave=stays,
        disable=is_hidden or not is_first_process(),
        dynamic_ncols=True,
        mininterval=0.2 if sys.stderr.isatty() else 5.0,  # seconds; in a log file every redraw is a line
    )


class Progress:
    """A progress bar over the steps of a run, on the first process."""

    def __init__(self) -> None:
        self.bar: tqdm = progress_bar(0, "step", is_hidden=True)

    def open(self, num_steps: int, num_done: int = 0) -> None:
        """Show the bar of a run of which some steps are done."""
        self.bar.close()
        self.bar = progress_bar(num_steps, "step", num_done=num_done)

    def advance(self) -> None:
        """Count one step."""
        self.bar.update()

    def show(self, loss: AverageMeter, rate: RateMeter, point: Mapping[str, float]) -> None:
        """Put loss, learning rate, logit scale, rate and the share of time spent waiting for data behind the bar.

        loss: the last one, and their mean since the last point.
        """
        waiting = point["data_time"] / max(point["data_time"] + point["step_time"], 1e-9)
        shown = (
            str(loss) if loss.count else f"{loss.name} nan",  # without any: every step was left out
            f"lr {point['lr']:.2e}",
            f"scale {point['logit_scale']:.2f}",
            str(rate),
            f"data {waiting:.0%}",
        )
        self.bar.set_postfix_str(", ".join(shown), refresh=False)

    def report(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the figures of an evaluation above the bar."""
        shown = [f"{key.removeprefix('val/')} {value:.4f}" for key, value in metrics.items() if worth_a_line(key)]
        if shown:
            say(f"step {step}: " + "  ".join(shown))

    def close(self) -> None:
        """Leave the bar as it is and go on below it."""
        self.bar.close()


def worth_a_line(metric: str) -> bool:
    """Return whether a metric is among those that are shown while training: a few of the package's own, all others."""
    of_package = metric.startswith(("val/", "zero_shot/"))
    return not of_package or metric == "val/loss" or metric.endswith(("R@1", "R@10", "top1"))
