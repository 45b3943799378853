"""What would stop a run on its way: too many unusable pairs, too little room on the disk."""

from __future__ import annotations

from accel_clip.commands.check.advice import surely_too_many
from accel_clip.commands.check.facts import DataFacts, DiskFacts
from accel_clip.commands.check.layout import size_in_words
from accel_clip.data.bad_samples import IS_THE_ROOT_RIGHT
from accel_clip.faults import DataError, StorageError


def refuse_unusable(data: DataFacts) -> None:
    """Raise `DataError` for unusable pairs that will stop the run, unless the sample is too small to tell."""
    number, seen, share = sum(data.num_unusable.values()), data.num_looked_at, data.unusable_share
    if 2 * data.num_missing_files > seen:
        raise DataError(f"{data.num_missing_files} of {seen} pairs are missing files: {IS_THE_ROOT_RIGHT}")
    if surely_too_many(data):
        raise DataError(
            f"data.max_bad_fraction: {number} of {seen} pairs are unusable ({share:.1%}), and a run stops above "
            f"{data.unusable_limit:.1%}: mend them, or raise it"
        )


def refuse_full_disk(disk: DiskFacts, output_dir: str) -> None:
    """Raise `StorageError` unless everything that the run writes has room."""
    if disk.available_bytes < disk.needed_bytes:
        raise StorageError(
            f"output_dir: the run needs {size_in_words(disk.needed_bytes)} and {size_in_words(disk.available_bytes)} "
            f"are free at {output_dir}: free some space, lower checkpoint.keep, or choose another folder"
        )
