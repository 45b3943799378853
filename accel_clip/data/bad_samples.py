"""Samples that cannot be used: why, how many, and when there are too many."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object

from accel_clip import console
from accel_clip.faults import DataError, StorageError, shortened
from accel_clip.redaction import masked

SAMPLES_BEFORE_FIRST_LOOK = 1000
SAMPLES_TO_KNOW_THE_ROOT = 100
MISSING = "missing_file"
WITHOUT_PICTURE = "the sample has no picture"
NOT_FROM_THE_ROOT = re.compile(r"\.tar(\.\w+)?(/|$)|^[\w-]{2,}:")
"""in paths of shards and what is in them, and of addresses and datasets"""
LONGEST_DETAIL = 400  # characters
IS_THE_ROOT_RIGHT = "is data.image_root right? It is the folder that picture paths start from"
REASONS = (
    *("unreadable", "too_large", MISSING, "outside_root", "no_caption", "caption_encoding"),
    *("caption_too_large", "truncated_shard"),
)


class UnusableSample(Exception):
    """Raised where one sample turns out to be unusable, with its reason (one of `REASONS`) and a detail."""

    def __init__(self, reason: str, detail: str, path: str | None = None) -> None:
        assert reason in REASONS, reason
        detail, path = shortened(detail, LONGEST_DETAIL), None if path is None else shortened(path, LONGEST_DETAIL)
        super().__init__(reason, detail, path)
        self.reason, self.detail, self.path = reason, detail, path


@dataclass(frozen=True)
class BadSample:
    """One unusable sample, as it stands in `bad_samples.jsonl`."""

    source: str
    """name of its source"""
    sample: int | str
    """its number in the source, or its key in a stream"""
    reason: str
    """one of `REASONS`"""
    path: str | None
    """of the file, or of what is in a shard; None where there is none"""
    detail: str
    """what exactly is wrong"""
    epoch: int
    """of the source, in which it was met"""
    its_turn: bool = True
    """whether it stood at the place itself; others were met in search of what may stand there instead"""

    def place(self) -> tuple[str, int | str]:
        """Return the source and the sample in it, as they are kept in checkpoints."""
        return masked(self.source), masked(self.sample) if isinstance(self.sample, str) else self.sample

    def line(self) -> str:
        """Return the sample as a line of JSON; paths in tables are addresses with credentials at times."""
        written = {name: value for name, value in asdict(self).items() if name != "its_turn"}
        shown = {name: masked(value) if isinstance(value, str) else value for name, value in written.items()}
        return json.dumps(shown, ensure_ascii=False) + "\n"


class UnusableData(DataError):
    """A sample that stops the run; only the process that met it knows."""

    on_every_process = False


class BadSampleLog:
    """Counts unusable samples over all processes, lists each once, and stops the run above a ceiling.

    `counts` has the different ones by reason. The share of a ceiling is that of the places in the order whose own
    sample was unusable, anew in every epoch: those that are met in search of a replacement would count twice.
    """

    def __init__(self, file: Path, max_bad_fraction: float) -> None:
        self.file, self.max_bad_fraction = file, max_bad_fraction
        self.pending: list[BadSample] = []
        self.listed: dict[tuple[str, int | str], None] = {}  # a dictionary keeps the order, a set does not
        self.num_seen, self.num_met, self.num_missing = 0, 0, 0
        self.knows_the_root = False
        self.counts: Counter[str] = Counter()

    def take_in(self, samples: tuple[BadSample, ...], num_seen: int) -> None:
        """Take note of a batch's unusable samples and of the pairs that all processes saw in it."""
        self.num_seen += num_seen
        self.pending.extend(samples)

    def collect(self, accelerator: Accelerator) -> None:
        """Count and list what all processes have met since the last call; every process must call it."""
        everyone, self.pending = gather_object(self.pending), []
        new = []
        for bad in everyone:
            self.num_met += bad.its_turn
            self.num_missing += bad.its_turn and may_be_the_root(bad)
            place = bad.place()
            if place not in self.listed:
                self.listed[place] = None
                self.counts[bad.reason] += 1
                new.append(bad)
        if new and accelerator.is_main_process:
            self.write(new)

    def write(self, samples: list[BadSample]) -> None:
        """Append samples to the file; raises `StorageError`."""
        try:
            with self.file.open("a", encoding="utf-8", errors="backslashreplace") as lines:
                lines.writelines(bad.line() for bad in samples)
        except OSError as error:
            raise StorageError(f"{self.file}: {error}") from error

    def check(self, epoch_ended: bool) -> None:
        """Raise `DataError` when too large a share of the samples seen is unusable; at an epoch's end, say how many.

        The ceiling is looked at after 1,000 samples and at every epoch's end; after the first 100 samples, or the
        first epoch if it is shorter, whether more than half of them are missing files. All processes know the same.
        """
        if not self.knows_the_root and (epoch_ended or self.num_seen >= SAMPLES_TO_KNOW_THE_ROOT):
            self.knows_the_root = True
            if self.num_missing > self.num_seen / 2:
                raise DataError(
                    f"{self.num_missing} of the first {self.num_seen} samples are missing files, see {self.file}: "
                    f"{IS_THE_ROOT_RIGHT}"
                )
        if not (epoch_ended or self.num_seen >= SAMPLES_BEFORE_FIRST_LOOK):
            return
        if self.num_met > self.max_bad_fraction * self.num_seen:
            raise DataError(
                f"{self.num_met} of {self.num_seen} samples are unusable ({self.summary()}), more than "
                f"data.max_bad_fraction = {self.max_bad_fraction} allows: see {self.file}, or raise the setting"
            )
        if epoch_ended and self.counts:
            console.say(f"unusable samples so far: {self.summary()}; each was replaced by another")

    def summary(self) -> str:
        """Return how many different samples there were by reason."""
        return by_reason(self.counts)

    def state_dict(self) -> dict[str, Any]:
        """Return what has been counted and listed, for a checkpoint, as plain JSON."""
        return {
            "counts": dict(self.counts),
            "num_seen": self.num_seen,
            "num_met": self.num_met,
            "num_missing": self.num_missing,
            "knows_the_root": self.knows_the_root,
            "listed": [list(each) for each in self.listed],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint; whoever restores it cuts off the lines that were written after it."""
        self.pending, self.counts = [], Counter(state["counts"])
        self.num_seen, self.num_met, self.num_missing = state["num_seen"], state["num_met"], state["num_missing"]
        self.knows_the_root = state["knows_the_root"]
        self.listed = dict.fromkeys((source, sample) for source, sample in state["listed"])

    def forget_list(self) -> None:
        """List every sample anew when it is met again: those listed so far stand in the file of another run."""
        self.listed, self.counts = {}, Counter()


def by_reason(counts: Mapping[str, int]) -> str:
    """Return counts in words, such as `no_caption 2, unreadable 1`."""
    return ", ".join(f"{reason} {count}" for reason, count in sorted(counts.items()))


def too_few_usable(what: str, problems: Sequence[BadSample | UnusableSample]) -> DataError:
    """Return an error that says what cannot be done, the reasons, an example, and what it may come from."""
    question = f"; {IS_THE_ROOT_RIGHT}" if missing_too_many(problems, len(problems)) else ""
    return DataError(f"{what}: {reasons_of(problems)}{question}")


def missing_too_many(problems: Iterable[BadSample | UnusableSample], num_seen: int) -> bool:
    """Return whether so many samples are missing files that the folder may be the wrong one: more than half."""
    return sum(map(may_be_the_root, problems)) > num_seen / 2


def may_be_the_root(problem: BadSample | UnusableSample) -> bool:
    """Return whether a problem is a file that another root might have: none in a shard, or at an address."""
    is_elsewhere = problem.path is not None and NOT_FROM_THE_ROOT.search(problem.path) is not None
    return problem.reason == MISSING and problem.detail != WITHOUT_PICTURE and not is_elsewhere


def reasons_of(problems: Sequence[BadSample | UnusableSample]) -> str:
    """Return how many problems there are by reason, and the first of them."""
    first = problems[0]
    example = f"{first.path}: {first.detail}" if first.path else first.detail
    return f"{by_reason(Counter(problem.reason for problem in problems))}; the first is {example}"
