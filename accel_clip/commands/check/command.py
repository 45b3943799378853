"""The check itself: settings, names, parts, a sample of the data, speed and disk, each if those before it are sound."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from accel_clip.commands.check.advice import warnings_about
from accel_clip.commands.check.facts import Problem, Report
from accel_clip.commands.check.settings import settings_to_check
from accel_clip.commands.check.traces import without_traces
from accel_clip.config import Config
from accel_clip.console import say
from accel_clip.files.kinds import CONTACT_SHEET
from accel_clip.files.marked import require_own
from accel_clip.plugins import load_plugins
from accel_clip.process.environment import check_environment
from accel_clip.redaction import refuse_credentials
from accel_clip.run.preconditions import Start, locate_sources, name_checks
from accel_clip.run.problems import Problems
from accel_clip.run.resume import decide

if TYPE_CHECKING:
    from accel_clip.commands.check.parts import PlannedParts


@dataclass(frozen=True)
class CheckOptions:
    """What a report is asked for."""

    num_samples: int
    """training pairs to look at"""
    seconds: float
    """how long speed is measured, 0 for not at all"""
    num_processes: int
    """those that will train"""
    sheet: Path | None = None
    """the folder for a page that shows the first pairs, None for none"""


def check(arguments: list[str], description: str, options: CheckOptions) -> Report:
    """Return all that can be known of a run before it starts; nothing that is written stays, but for the page.

    arguments: as for training.
    """
    with without_traces() as index_folder:
        return report_on(arguments, description, options, index_folder)


def report_on(arguments: list[str], description: str, options: CheckOptions, index_folder: Path) -> Report:
    """Return the report; the indexes of shards that are made for it go to a folder of their own."""
    problems = Problems()
    if options.sheet is not None:
        problems.attempt(partial(require_own, options.sheet, CONTACT_SHEET, "--show"))
    start = look_at_everything_named(settings_to_check(arguments, description, problems), problems)
    if start is None:
        return Report(problems=listed(problems), exit_code=problems.exit_code)
    from accel_clip.commands.check.parts import planned_parts  # imports torch
    from accel_clip.process.accelerator import process_as_found

    with process_as_found():
        parts = planned_parts(start, options.num_processes, problems, index_folder)
        if parts is None:
            return Report(problems=listed(problems), exit_code=problems.exit_code)
        if options.sheet is not None and not problems:
            from accel_clip.commands.check.sheet import write_sheet

            problems.attempt(partial(write_sheet, parts, options.sheet))
        goes_on = start.decision.kind != "new"
        return measured(parts, goes_on, options.num_samples, options.seconds, problems)


def look_at_everything_named(config: Config, problems: Problems) -> Start | None:
    """Return the start of a run after taking in every folder, file and name that cannot be used.

    None where a plugin fails, since names that plugins register need them.
    """
    problems.attempt(partial(check_environment, os.environ, config.train))
    problems.attempt(partial(refuse_credentials, config.to_dict()))
    decision = decide(config)
    problems.attempt(decision.require_allowed)
    for file in config.plugins:
        problems.attempt(partial(load_plugins, [file]))
    if problems.concern("plugins"):
        return None
    locations = locate_sources(config, problems)
    for name_check in name_checks(config, decision.described):
        problems.attempt(name_check)
    return Start(decision.config, decision, locations)


def measured(parts: PlannedParts, goes_on: bool, num_samples: int, seconds: float, problems: Problems) -> Report:
    """Return the report on a run whose parts are there: what they are, then what measuring them shows."""
    from accel_clip.commands.check import limits, sections
    from accel_clip.commands.check.speed import measure_speed

    run, model = sections.run_facts(parts, goes_on), sections.model_facts(parts)
    known = run.num_pairs
    number, whole = (num_samples, "the") if known is None else (min(num_samples, known), f"{known:,}")
    say(f"looking at {number:,} of {whole} training pairs")
    sample = problems.attempt(partial(sections.take_sample, parts, num_samples))
    data = None if sample is None else sections.data_facts(parts, sample)
    if data is not None:
        problems.attempt(partial(limits.refuse_unusable, data))
    speed = None
    if sample is not None and sample.pairs and seconds > 0:
        say(f"measuring loader and step for about {seconds:.0f} seconds")
        speed = problems.attempt(partial(measure_speed, parts, sample.pairs, seconds))
    disk = problems.attempt(partial(sections.disk_facts, parts, sample))
    if disk is not None:
        problems.attempt(partial(limits.refuse_full_disk, disk, parts.config.output_dir))
    warnings = warnings_about(parts.config, run, model, data, speed, disk)
    return Report(run, model, data, speed, disk, warnings, listed(problems), problems.exit_code)


def listed(problems: Problems) -> list[Problem]:
    """Return the problems as the report has them."""
    return [Problem(error.exit_code, str(error)) for error in problems.errors]
