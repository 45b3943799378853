"""A report as aligned lines for a person: sections, warnings, problems, and the verdict last."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from accel_clip.commands.check.facts import DataFacts, DiskFacts, ModelFacts, Report, RunFacts, SpeedFacts, counted

LABEL_WIDTH = 22
UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")
Row = tuple[str, str]


def lines_of(report: Report) -> list[str]:
    """Return the report as lines."""
    found: list[str] = []
    for title, rows in sections_of(report):
        found += [title, *(f"  {label:{LABEL_WIDTH}} {text}".rstrip() for label, text in rows), ""]
    for title, messages in (("warnings", report.warnings), ("problems", [each.message for each in report.problems])):
        if messages:
            found += [title, *(f"  {message}" for message in messages), ""]
    return [*found, f"verdict: {report.verdict}"]


def sections_of(report: Report) -> Iterator[tuple[str, list[Row]]]:
    """Yield the titles and rows of the sections that there are."""
    if report.run is not None:
        yield "run", list(run_rows(report.run))
    if report.model is not None:
        yield "model", list(model_rows(report.model))
    if report.data is not None:
        yield "data", list(data_rows(report.data))
    if report.speed is not None:
        yield "speed", list(speed_rows(report.speed))
    if report.disk is not None:
        yield "disk", list(disk_rows(report.disk))


def run_rows(run: RunFacts) -> Iterator[Row]:
    """Yield the rows about the length of the run."""
    processes = counted(run.num_processes, "process").replace("processs", "processes")
    yield "folder", run.output_dir + (": the run in it goes on" if run.goes_on else "")
    yield "device", f"{run.device}, {processes}, precision {run.precision}"
    number = "as many as streams bring" if run.num_pairs is None else f"{run.num_pairs:,}"
    yield "pairs", f"{number} to train on, {run.num_held_out:,} held out"
    averaged = f", {run.accumulate} averaged per step" if run.accumulate > 1 else ""
    yield "batch", f"{run.batch_size:,} pairs{averaged}"
    epochs = "" if run.num_epochs is None else f" = {run.num_epochs:.3g} epochs of {run.steps_per_epoch:.6g}"
    yield "steps", f"{run.num_steps:,}{epochs}"
    yield "warm-up", f"{run.num_warmup_steps:,} steps, {run.num_warmup_steps / run.num_steps:.0%} of the run"
    yield "evaluations", f"every {run.steps_between_evaluations:.6g} steps, at step 0 and at the end"
    logarithm = f" = ln({run.batch_size})" if math.isclose(run.starting_loss, math.log(run.batch_size)) else ""
    yield "starting loss", f"{run.starting_loss:.2f}{logarithm}, of features that have nothing to do with each other"


def model_rows(model: ModelFacts) -> Iterator[Row]:
    """Yield the rows about what is trained and the memory that it takes."""
    height, width = model.image_size
    yield "name", f"{model.name}, pictures of {width} x {height}"
    for side, number in model.num_parameters.items():
        yield f"{side} parameters", f"{model.num_trained[side]:,} of {number:,} trained"
    kept = ", ".join(f"{number} of {side}" for side, number in model.graphs_kept.items()) or "none"
    cut = f"{model.num_micro_batches} x {model.micro_batch_size:,} rows; graphs kept: {kept}"
    yield "micro-batches", cut
    total = model.weights_bytes + model.optimizer_bytes + model.graph_bytes
    parts = (("weights", model.weights_bytes), ("optimizer", model.optimizer_bytes), ("graphs", model.graph_bytes))
    yield "memory per process", f"{size_in_words(total)}: {', '.join(f'{n} {size_in_words(b)}' for n, b in parts)}"
    yield "memory for graphs", f"{size_in_words(model.free_bytes)} may be used"


def data_rows(data: DataFacts) -> Iterator[Row]:
    """Yield the rows about the sample, with an example of each kind of unusable pair."""
    where = "pairs, the first of streams" if data.num_pairs is None else f"of {data.num_pairs:,} pairs"
    yield "looked at", f"{data.num_looked_at:,} {where}, {1000 * data.decoding_seconds:.1f} ms each"
    for name, pairs in data.pairs_in_batch.items():
        yield "in a batch", f"{pairs:,.1f}".removesuffix(".0") + f" of {name}"
    number = sum(data.num_unusable.values())
    yield "unusable", f"{number} ({data.unusable_share:.1%}); a run stops above {data.unusable_limit:.1%}"
    for reason, count in data.num_unusable.items():
        if count:
            yield f"  {reason}", f"{count}, such as {data.examples[reason]}"
    for name, captions in data.captions.items():
        labels = ["captions" if len(data.captions) == 1 else f"captions of {name}", *[""] * len(captions)]
        yield from zip(labels, captions, strict=False)
    yield "repeated pictures", str(data.num_repeated_pictures)
    yield "repeated captions", str(data.num_repeated_captions)
    yield "captions cut", f"{data.num_cut_captions} over {data.token_limit} tokens"
    if data.picture_size is not None:
        width, height = data.picture_size
        yield "median picture", f"{width} x {height} pixels"


def speed_rows(speed: SpeedFacts) -> Iterator[Row]:
    """Yield the rows about what is slower, the loader or the step."""
    for workers, rate in sorted(speed.loader.items(), key=lambda each: each[0] != speed.num_workers):
        chosen = "" if workers == speed.num_workers else " (not the setting)"
        yield "loader alone", f"{rate_in_words(rate)} with {counted(workers, 'worker')}{chosen}"
    yield "step alone", f"{rate_in_words(speed.step)}, measured with {speed.step_pairs:,} pairs"
    yield "bottleneck", f"the {speed.bottleneck}"
    yield "training takes", f"{time_in_words(speed.training_seconds)} or more, without evaluations"


def disk_rows(disk: DiskFacts) -> Iterator[Row]:
    """Yield the rows about what the run writes."""
    yield "checkpoints", f"{disk.num_checkpoints} x {size_in_words(disk.checkpoint_bytes)} at most"
    yield "export", size_in_words(disk.export_bytes)
    if disk.features_bytes:
        yield "cached features", size_in_words(disk.features_bytes)
    if disk.pictures_bytes:
        yield "decoded pictures", f"about {size_in_words(disk.pictures_bytes)}"
    yield "needed", f"{size_in_words(disk.needed_bytes)} of {size_in_words(disk.available_bytes)} free"


def rate_in_words(rate: float) -> str:
    """Return pairs a second, small numbers with decimals."""
    return f"{rate:,.0f} pairs/s" if rate >= 10 else f"{rate:.2g} pairs/s"


def size_in_words(number: float) -> str:
    """Return a number of bytes in the largest unit that leaves at least one."""
    power = 0
    while abs(number) >= 1024 and power < len(UNITS) - 1:
        number, power = number / 1024, power + 1
    return f"{number:.0f} {UNITS[power]}" if power < 2 else f"{number:.1f} {UNITS[power]}"


def time_in_words(seconds: float) -> str:
    """Return a time in its two largest units."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    amounts: Mapping[str, int] = {"d": days, "h": hours, "min": minutes, "s": rest}
    words = [f"{amount} {unit}" for unit, amount in amounts.items() if amount]
    return " ".join(words[:2]) or "under a second"
