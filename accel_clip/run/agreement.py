"""What the processes of a run agree on in a step, before its weights change: one small reduction."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from accelerate import Accelerator

from accel_clip.meters import MeterGroup

PAIRS_OF = "pairs/"  # and the name of one of several sources
CUT_CAPTIONS = "num_cut_captions"


@dataclass(frozen=True)
class Request:
    """What one process asks of all, beside what it has measured."""

    num_bad_samples: int
    """unusable samples that it has met and nobody else knows of"""
    save_is_due: bool
    """whether it is time for a checkpoint, by this process's clock"""
    save_has_failed: bool
    """whether writing a checkpoint in the background went wrong"""
    stop_is_asked: bool
    """whether a signal has asked this process to stop"""


@dataclass(frozen=True)
class Agreement:
    """What all processes know of a step, the same on each."""

    num_bad_samples: int
    """unusable samples that one process alone knows of, in all of them"""
    save_is_due: bool
    """whether it is time for a checkpoint, by the clock of the first process"""
    save_has_failed: bool
    """whether writing a checkpoint in the background went wrong on a process"""
    stop_is_asked: bool
    """whether a signal has asked at least one process to stop"""
    num_cut_captions: int
    """captions of the step's pairs with more tokens than the model reads"""
    num_pairs: dict[str, int]
    """pairs of the step by the source that they come from"""
    means: dict[str, float]
    """what was measured: `loss`, its terms as `loss/…`, `grad_norm`, and `data_time` in seconds"""


def agree(accelerator: Accelerator, report: MeterGroup, request: Request) -> Agreement:
    """Return what all processes measured and asked for in a step; collective, one reduction, and `report` starts anew.

    report: the means of this process, its cut captions and its pairs, under the names above.
    """
    for name, asked in asdict(request).items():
        report.add(name, float(asked))
    reduced = report.reduce(accelerator)
    pairs = [name for name in reduced if name.startswith(PAIRS_OF)]
    return Agreement(
        num_bad_samples=round(reduced.pop("num_bad_samples")),
        save_is_due=reduced.pop("save_is_due") > 0,
        save_has_failed=reduced.pop("save_has_failed") > 0,
        stop_is_asked=reduced.pop("stop_is_asked") > 0,
        num_cut_captions=round(reduced.pop(CUT_CAPTIONS)),
        num_pairs={name.removeprefix(PAIRS_OF): round(reduced.pop(name)) for name in pairs},
        means=reduced,
    )
