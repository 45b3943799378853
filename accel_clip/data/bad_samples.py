"""Samples that cannot be used: why, how many, and when there are too many."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import gather_object

from accel_clip.faults import DataError, StorageError

SAMPLES_BEFORE_FIRST_LOOK = 1000
REASONS = (
    *("unreadable", "too_large", "missing_file", "outside_root", "no_caption", "caption_encoding"),
    *("caption_too_large", "truncated_shard"),
)


class UnusableSample(Exception):
    """Raised where one sample turns out to be unusable, with its reason (one of `REASONS`) and a detail."""

    def __init__(self, reason: str, detail: str, path: str | None = None) -> None:
        assert reason in REASONS, reason
        super().__init__(reason, detail, path)
        self.reason, self.detail, self.path = reason, detail, path


@dataclass(frozen=True)
class BadSample:
    """One unusable sample, as it stands in `bad_samples.jsonl`."""

    source: str
    sample: int | str
    reason: str
    path: str | None
    detail: str
    epoch: int


class UnusableData(DataError):
    """A sample that stops the run; only the process that met it knows."""

    on_every_process = False


class BadSampleLog:
    """Counts unusable samples over all processes, lists each once, and stops the run above a ceiling.

    The ceiling is looked at after 1,000 samples and at every epoch's end. Until they can be replaced without a trace,
    samples that are bad for another reason than a missing caption stop the run at once.
    """

    def __init__(self, file: Path, max_bad_fraction: float) -> None:
        self.file, self.max_bad_fraction = file, max_bad_fraction
        self.pending: list[BadSample] = []
        self.listed: set[tuple[str, int | str]] = set()
        self.num_seen = 0
        self.num_met = 0
        self.counts: Counter[str] = Counter()

    def meet(self, samples: tuple[BadSample, ...], num_seen: int) -> None:
        """Take note of a batch's unusable samples and of the pairs that all processes saw in it."""
        self.num_seen += num_seen
        self.pending.extend(samples)
        for bad in samples:
            if bad.reason != "no_caption":
                raise UnusableData(f"{bad.path or bad.source}: sample {bad.sample} is {bad.reason}: {bad.detail}")

    def collect(self, accelerator: Accelerator) -> None:
        """Count and list what all processes have met since the last call; every process must call it."""
        everyone = gather_object(self.pending)
        self.pending = []
        self.num_met += len(everyone)
        new = [bad for bad in everyone if (bad.source, bad.sample) not in self.listed]
        self.counts.update(bad.reason for bad in new)
        self.listed.update((bad.source, bad.sample) for bad in new)
        if new and accelerator.is_main_process:
            try:
                with self.file.open("a", encoding="utf-8") as lines:
                    lines.writelines(json.dumps(asdict(bad), ensure_ascii=False) + "\n" for bad in new)
            except OSError as error:
                raise StorageError(f"{self.file}: {error}") from error

    def check(self, epoch_ended: bool) -> None:
        """Raise `DataError` when too large a share of the samples seen is unusable."""
        if not (epoch_ended or self.num_seen >= SAMPLES_BEFORE_FIRST_LOOK):
            return
        if self.num_met > self.max_bad_fraction * self.num_seen:
            raise DataError(
                f"{self.num_met} of {self.num_seen} samples are unusable ({self.summary()}), more than "
                f"data.max_bad_fraction = {self.max_bad_fraction} allows: see {self.file}, or raise the setting"
            )

    def summary(self) -> str:
        """Return how many different samples there were by reason."""
        return ", ".join(f"{reason} {count}" for reason, count in sorted(self.counts.items()))
