"""What is likely to go wrong in a run that can start, and what would make it faster: a line each."""

from __future__ import annotations

from collections.abc import Iterator

from accel_clip.commands.check.facts import DataFacts, DiskFacts, ModelFacts, RunFacts, SpeedFacts
from accel_clip.config import GIB, Config
from accel_clip.data.held_out import FEW_PAIRS, few_in_words, shared_in_words
from accel_clip.run.health import rate_warning

FEW_STEPS = 100
MUCH_WARMUP = 0.5  # of the run
MUCH_OF_THE_DATA = 0.5  # in one batch
STEPS_BETWEEN_EVALUATIONS = 10
MANY_REPEATED = 0.05  # of the pairs
MANY_CUT = 0.01
MANY_FILE_NAMES = 0.01
TOO_LARGE = 3  # times the model's side
WORTH_A_CHANGE = 1.15  # times the rate
CLOSE = 1.25


def warnings_about(
    config: Config,
    run: RunFacts,
    model: ModelFacts,
    data: DataFacts | None,
    speed: SpeedFacts | None,
    disk: DiskFacts | None,
) -> list[str]:
    """Return the warnings, the gravest first."""
    found = [*of_length(config, run), *of_training(config, model), *of_held_out(run)]
    if data is not None:
        found += of_data(config, model, data)
    if data is not None and speed is not None:
        found += of_speed(config, model, data, speed)
    if disk is not None:
        found += of_disk(config, disk)
    return found


def of_disk(config: Config, disk: DiskFacts) -> Iterator[str]:
    """Yield what will not be kept for lack of room that was given to it."""
    room = config.data.image_cache_gib
    if disk.pictures_bytes > room * GIB:
        yield (
            f"data.image_cache_gib: the decoded pictures would take about {disk.pictures_bytes / GIB:.3g} GiB, more "
            f"than {room:g}: they are decoded in every epoch"
        )


def of_length(config: Config, run: RunFacts) -> Iterator[str]:
    """Yield what is odd about the length of the run and its parts."""
    if run.num_steps < FEW_STEPS:
        setting = "train.epochs" if config.train.steps is None else "train.steps"
        yield f"{setting}: the run has {run.num_steps} steps, and below {FEW_STEPS} little is learnt"
    if run.num_warmup_steps > MUCH_WARMUP * run.num_steps:
        yield f"optim.warmup: {run.num_warmup_steps} of {run.num_steps} steps are warm-up; a tenth is usual"
    if run.num_pairs is not None and run.batch_size > MUCH_OF_THE_DATA * run.num_pairs:
        yield (
            f"train.batch_size: a batch of {run.batch_size} is more than half of the {run.num_pairs:,} pairs: every "
            "step sees nearly the same ones"
        )
    if run.num_held_out and run.steps_between_evaluations < STEPS_BETWEEN_EVALUATIONS:
        yield (
            f"eval.every: an evaluation every {run.steps_between_evaluations:.3g} steps; set it to "
            f"{max(STEPS_BETWEEN_EVALUATIONS, run.num_steps // 10)} or so"
        )
    if not run.num_held_out:
        key = "data.val_fraction" if run.num_pairs is not None else "data.val"
        yield f"{key}: no pairs are held out, so nothing shows whether the model gets better on others"


def of_held_out(run: RunFacts) -> Iterator[str]:
    """Yield what keeps the held-out pairs from saying how good the model is."""
    if run.num_held_out_trained:
        yield shared_in_words(run.num_held_out_trained, run.num_held_out)
    if 0 < run.num_held_out < FEW_PAIRS:
        yield few_in_words(run.num_held_out)


def of_training(config: Config, model: ModelFacts) -> Iterator[str]:
    """Yield what is odd about what is trained, and how fast."""
    if model.num_trained["image"] + model.num_trained["text"] == 0:
        yield "model.freeze: both towers are frozen: only the logit scale and the like are trained"
    high = rate_warning(config)
    if high is not None:
        yield high


def of_data(config: Config, model: ModelFacts, data: DataFacts) -> Iterator[str]:
    """Yield what is odd about the pairs."""
    if data.unusable_share > data.unusable_limit and not surely_too_many(data):
        yield f"data.max_bad_fraction: {data.unusable_share:.1%} of the sample is unusable, and the run may stop for it"
    for kind, number in (("picture", data.num_repeated_pictures), ("caption", data.num_repeated_captions)):
        if number > MANY_REPEATED * data.num_looked_at and "duplicates" not in config.loss.options:
            change = f": --loss.options '{{duplicates: positives, same: {kind}}}' changes that"
            yield (
                f"data.train: {number / data.num_looked_at:.0%} of the pairs repeat a {kind}, and those that meet in a "
                f"batch count as wrong answers{change if config.loss.name == 'clip' else ''}"
            )
    if data.num_file_names > MANY_FILE_NAMES * data.num_looked_at:
        yield (
            f"data.train: {data.num_file_names} of {data.num_looked_at} captions are names of picture files: name the "
            "column, the ending or the JSON key that holds captions by data.caption_key, or leave these pairs out"
        )
    if data.num_cut_captions > MANY_CUT * data.num_looked_at:
        yield (
            f"data.train: {data.num_cut_captions} of {data.num_looked_at} captions are longer than {data.token_limit} "
            "tokens: what follows is never read; put what matters first"
        )


def surely_too_many(data: DataFacts) -> bool:
    """Return whether the share of unusable pairs will stop the run: by two standard errors, unless all were counted."""
    share, number = data.unusable_share, data.num_looked_at
    doubt = 0 if number == data.num_pairs else 2 * (share * (1 - share) / number) ** 0.5
    return share - doubt > data.unusable_limit


def of_speed(config: Config, model: ModelFacts, data: DataFacts, speed: SpeedFacts) -> Iterator[str]:
    """Yield what would make the loader keep up with the step."""
    rate = speed.loader[speed.num_workers]
    if speed.bottleneck == "step":
        if speed.step <= rate < CLOSE * speed.step and config.data.prefetch < 4:
            yield f"data.prefetch: the loader is hardly faster than the step: {2 * config.data.prefetch} evens it out"
        return
    best = max(speed.loader, key=lambda workers: speed.loader[workers])
    cures = []
    if speed.loader[best] > WORTH_A_CHANGE * rate:
        cures.append(f"--data.workers {best} gives {speed.loader[best]:,.0f}")
    side = max(model.image_size)
    if data.picture_size is not None and min(data.picture_size) >= TOO_LARGE * side:
        width, height = data.picture_size
        cures.append(f"pictures of {width} x {height} are shrunk to {side} every time: shrink them once")
    if not cures:
        cures.append("more CPU cores, or smaller pictures on a faster disk, would help")
    yield (
        f"data.workers: the loader gives {rate:,.0f} pairs/s and the step takes {speed.step:,.0f}, so the step waits: "
        f"{'; '.join(cures)}"
    )
