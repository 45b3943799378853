"""The facts of each section of the report, from the parts of a run and from what a sample showed."""

from __future__ import annotations

import math
from pathlib import Path

from torch import nn
from torch.nn import functional

from accel_clip.checkpoint.snapshot import expected_bytes
from accel_clip.checkpoint.storage import available_bytes
from accel_clip.commands.check.facts import DataFacts, DiskFacts, ModelFacts, RunFacts
from accel_clip.commands.check.parts import PlannedParts
from accel_clip.commands.check.sample import PairSampler, Sample, known_part, look_at_sample
from accel_clip.config import GIB
from accel_clip.data.bad_samples import REASONS
from accel_clip.models.names import matches
from accel_clip.run.timetable import PARTS_WITHOUT_EPOCHS
from accel_clip.step.plan import STATE_BYTES, free_for_graphs, graph_bytes

BYTES_OF_A_FEATURE = 4
BYTES_OF_A_PIXEL = 3


def run_facts(parts: PlannedParts, goes_on: bool) -> RunFacts:
    """Return how long the run is and on what it runs; goes_on: the folder holds one, which is continued."""
    config, data = parts.config, parts.data
    num_steps, length = data.schedule.num_steps, data.feed.batches_per_epoch
    steps_per_epoch = None if length is None else length / config.train.accumulate
    steps_between = config.eval.every or steps_per_epoch or num_steps / PARTS_WITHOUT_EPOCHS
    return RunFacts(
        output_dir=config.output_dir,
        goes_on=goes_on,
        device=parts.accelerator.device.type,
        num_processes=parts.num_processes,
        precision=str(parts.accelerator.mixed_precision),
        num_pairs=data.num_pairs,
        num_held_out=0 if data.held_out is None else len(data.held_out),
        num_held_out_trained=data.pairs.num_shared,
        batch_size=config.train.batch_size,
        accumulate=config.train.accumulate,
        steps_per_epoch=steps_per_epoch,
        num_epochs=None if steps_per_epoch is None else num_steps / steps_per_epoch,
        num_steps=num_steps,
        num_warmup_steps=data.schedule.num_warmup_steps,
        steps_between_evaluations=float(steps_between),
        starting_loss=starting_loss(parts),
    )


def starting_loss(parts: PlannedParts) -> float:
    """Return the contrastive loss of a model that cannot tell pairs apart: ln(B), or that of the sigmoid loss.

    Features that have nothing to do with each other have a similarity of about 0.
    """
    batch_size, bias = parts.config.train.batch_size, parts.model.clip.logit_bias
    if not parts.loss.requires_bias() or bias is None:
        return math.log(batch_size)
    bias = bias.detach().float().cpu()
    return float(functional.softplus(-bias) + (batch_size - 1) * functional.softplus(bias))


def model_facts(parts: PlannedParts) -> ModelFacts:
    """Return what is trained and what memory one process needs for it."""
    plan, clip = parts.plan, parts.model.clip
    parameters = parameters_by_tower(clip)
    counts = {side: sum(each.numel() for each in found) for side, found in parameters.items()}
    trained = {side: sum(each.numel() for each in found if each.requires_grad) for side, found in parameters.items()}
    graphs = graph_bytes(parts.trial, plan.micro_batch_size)
    num_chunks = -(-parts.pairs_per_process // plan.micro_batch_size)
    held = sum(number * plan.kept.get(side, 0) for side, number in graphs.items())
    recomputed = sum(number for side, number in graphs.items() if plan.kept.get(side, 0) < num_chunks)
    return ModelFacts(
        name=parts.config.model.name,
        num_parameters=counts,
        num_trained=trained,
        image_size=parts.model.picture_size,
        context_length=int(clip.context_length) if hasattr(clip, "context_length") else 0,
        micro_batch_size=plan.micro_batch_size,
        num_micro_batches=num_chunks,
        graphs_kept=dict(plan.kept),
        weights_bytes=sum(each.nbytes for each in clip.state_dict().values()),
        optimizer_bytes=STATE_BYTES * sum(trained.values()),
        graph_bytes=held + recomputed,
        free_bytes=int(free_for_graphs(parts.trial)),
    )


def parameters_by_tower(clip: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Return parameters by tower: image, text, and other, which is all that belongs to neither."""
    found: dict[str, list[nn.Parameter]] = {"image": [], "text": [], "other": []}
    for name, parameter in clip.named_parameters():
        found[next((side for side in ("image", "text") if matches(side, name)), "other")].append(parameter)
    return found


def take_sample(parts: PlannedParts, num_samples: int) -> Sample:
    """Return what a sample of the training pairs holds."""
    height, width = parts.model.picture_size
    tokenizer, config = parts.model.tokenizer, parts.config
    source = known_part(parts.data.feed, num_samples)
    sampler = PairSampler(source, tokenizer, (width, height), config.seed, config.data.max_pixels)
    return look_at_sample(sampler, num_samples)


def data_facts(parts: PlannedParts, sample: Sample) -> DataFacts:
    """Return what a sample shows, as the report has it."""
    sizes = sorted((pair.picture_size for pair in sample.pairs), key=math.prod)
    num_unusable, held = sum(sample.unusable.values()), parts.data.feed.pairs_in_batch
    return DataFacts(
        num_pairs=parts.data.num_pairs,
        num_looked_at=sample.num_looked_at,
        num_unusable={reason: sample.unusable[reason] for reason in REASONS},
        examples={reason: text for reason, (_, text) in sample.first.items()},
        num_missing_files=sample.num_missing_files,
        captions=sample.captions(),
        unusable_share=num_unusable / sample.num_looked_at,
        unusable_limit=parts.config.data.max_bad_fraction,
        num_repeated_pictures=sample.num_repeated("picture"),
        num_repeated_captions=sample.num_repeated("caption"),
        num_cut_captions=sum(pair.is_cut for pair in sample.pairs),
        num_file_names=sum(pair.is_file_name for pair in sample.pairs),
        token_limit=len(sample.pairs[0].tokens) if sample.pairs else 0,
        picture_size=sizes[len(sizes) // 2] if sizes else None,
        decoding_seconds=sample.seconds / sample.num_looked_at,
        pairs_in_batch=held if len(held) > 1 else {},
    )


def disk_facts(parts: PlannedParts, sample: Sample | None) -> DiskFacts:
    """Return what the run writes: checkpoints, one of them beside those that are kept, the export, cached features."""
    config, clip = parts.config, parts.model.clip
    optimizer = getattr(parts.optimizer, "optimizer", parts.optimizer)
    checkpoint_bytes = expected_bytes(clip, optimizer)
    num_checkpoints = config.checkpoint.keep + 1 + (config.stop.metric is not None)
    export_bytes = sum(each.nbytes for each in clip.state_dict().values())
    features_bytes, pictures_bytes = cached_features_bytes(parts), decoded_pictures_bytes(parts, sample)
    kept = pictures_bytes if pictures_bytes <= config.data.image_cache_gib * GIB else 0
    return DiskFacts(
        checkpoint_bytes=checkpoint_bytes,
        num_checkpoints=num_checkpoints,
        export_bytes=export_bytes,
        features_bytes=features_bytes,
        pictures_bytes=pictures_bytes,
        needed_bytes=checkpoint_bytes * num_checkpoints + export_bytes + features_bytes + kept,
        available_bytes=available_bytes(Path(config.output_dir)),
    )


def decoded_pictures_bytes(parts: PlannedParts, sample: Sample | None) -> int:
    """Return about what the decoded pictures take where they are to be kept, judged by a sample; every pair counts."""
    if not parts.config.data.image_cache_gib or sample is None or not sample.pairs:
        return 0
    sizes = [pair.decoded_size for pair in sample.pairs]
    if parts.config.data.augmentation == "none":
        sizes = [parts.model.picture_size]
    return round(BYTES_OF_A_PIXEL * sum(map(math.prod, sizes)) / len(sizes) * (parts.data.num_pairs or 0))


def cached_features_bytes(parts: PlannedParts) -> int:
    """Return what the features of a frozen tower take at most, where they are kept."""
    if parts.config.cached_tower is None:
        return 0
    return BYTES_OF_A_FEATURE * parts.model.model_config["embed_dim"] * (parts.data.num_pairs or 0)
