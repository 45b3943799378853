"""Every setting, its unit, its default and why: one dataclass a section."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from accel_clip.faults import ConfigError

GIB = 2**30
"""bytes in the unit of settings that end in _gib"""


def require(holds: bool, key: str, value: object, rule: str) -> None:
    """Raise `ConfigError` naming the setting, its value and the rule unless the rule holds."""
    if not holds:
        raise ConfigError(f"{key}: {value!r} does not work: {rule}")


def require_weights(caption_key: list[str] | dict[str, float] | str | None) -> None:
    """Raise `ConfigError` unless the weights of columns with captions, where there are some, are above 0."""
    for column, weight in caption_key.items() if isinstance(caption_key, dict) else ():
        require(isinstance(column, str), "data.caption_key", column, "columns are words: put a number in quotes")
        require(positive(weight), f"data.caption_key.{column}", weight, "it must be above 0")


@dataclass(frozen=True)
class SourceConfig:
    """One source of pairs with settings of its own, which win over those of the `data` section."""

    source: str
    """a file, a folder, hf:org/name, a saved dataset, demo, or name:argument of a registered source"""
    image_key: str | None = None
    """column with the picture"""
    caption_key: list[str] | dict[str, float] | str | None = None
    """column(s) with captions, or {column: weight}"""
    image_root: str | None = None
    """folder that picture paths start from and must stay in"""
    weight: float | None = None
    """share of every training batch beside the weights of the other sources, where one without counts 1; without any
    the sources are shown one after the other as one"""


@dataclass(frozen=True)
class DataConfig:
    """Data: where the pairs come from and how they reach the model."""

    train: list[str | SourceConfig] = field(default_factory=lambda: ["demo"])
    """one source or a list; an item is a string (a table .csv .tsv .jsonl .parquet, a folder, hf:org/name[:split],
    a saved dataset, demo, demo:pairs) or {source, image_key, caption_key, image_root, weight}"""
    val: list[str | SourceConfig] | None = None
    """held-out source(s), written like data.train but without weights; null = a part of data.train is held out"""
    val_fraction: float = 0.05
    """share of data.train that is held out when data.val is null, chosen by a hash of the picture; 0 = none"""
    image_key: str | None = None
    """column with the picture; null = found by the usual names"""
    caption_key: list[str] | dict[str, float] | None = None
    """column(s) with captions; of several one is drawn anew every epoch, with {title: 1, alt: 3} alt three times as
    often as title where a pair has both; null = found by the usual names"""
    image_root: str | None = None
    """folder that picture paths start from and must stay in, links resolved ('/' allows all);
    null = the table's folder"""
    encoding: str | None = None
    """text encoding of tables and .txt captions, such as gb18030; null = by byte-order mark, UTF-8, else detected and
    said"""
    replacement: bool = False
    """draw samples with replacement: every batch draws anew from all samples, instead of each once an epoch"""
    workers: int | None = None
    """loader processes per training process; null = chosen from the cores, 0 = load in the training process"""
    shuffle_buffer: int = 4096
    """pairs of a stream that are read ahead, over all processes, and shuffled; its shards are shuffled besides"""
    prefetch: int = 2
    """batches each worker prepares ahead"""
    max_bad_fraction: float = 0.01
    """stop with exit code 3 when a larger share of the samples seen is unusable; looked at after 1,000 samples and at
    every epoch's end"""
    max_pixels: float = 50e6
    """largest picture that is decoded, in pixels"""
    augmentation: str = "crop"
    """crop = a random 90 to 100 % of the picture, anew every epoch; none = resized and cropped as in evaluation"""
    transforms: list[str | dict[str, Any]] = field(default_factory=list)
    """further augmentations of training, in this order, on 8-bit pixels at the model's size, after crop as after none:
    classes of torchvision.transforms.v2 such as RandomHorizontalFlip or {ColorJitter: {brightness: 0.4}}, and timm's
    policies such as rand-m9-mstd0.5-inc1, augmix-m3-w3 or original-mstd0.5"""
    image_cache_gib: float = 0.0
    """GiB in the run folder for decoded pictures, memory-mapped and shared by all workers and processes of a machine:
    from the second epoch on nothing is decoded; used only when all pictures fit; 0 = off"""

    def __post_init__(self) -> None:
        require(len(self.train) > 0, "data.train", self.train, "name at least one source")
        require(not isinstance(self.train, str), "data.train", self.train, "it must be a list")
        require(self.val is None or len(self.val) > 0, "data.val", self.val, "name at least one source, or null")
        require(0 <= self.val_fraction < 1, "data.val_fraction", self.val_fraction, "it must be in [0, 1)")
        require(self.workers is None or self.workers >= 0, "data.workers", self.workers, "it must be 0 or more")
        require(self.shuffle_buffer >= 1, "data.shuffle_buffer", self.shuffle_buffer, "it must be at least 1")
        require(self.prefetch >= 1, "data.prefetch", self.prefetch, "it must be at least 1")
        items = [item for item in (*self.train, *(self.val or [])) if isinstance(item, SourceConfig)]
        for caption_key in (self.caption_key, *(item.caption_key for item in items)):
            require_weights(caption_key)
        bad = self.max_bad_fraction
        require(0 <= bad <= 1, "data.max_bad_fraction", bad, "it must be in [0, 1]")
        require(self.max_pixels >= 1, "data.max_pixels", self.max_pixels, "it must be at least 1")
        known = ("crop", "none")
        require(self.augmentation in known, "data.augmentation", self.augmentation, "it must be crop or none")
        room = self.image_cache_gib
        require(room == 0 or positive(room), "data.image_cache_gib", room, "it must be 0 or more")
        for item in self.train:
            require_weight(item)
        for item in self.val or []:
            refuse_weight(item, "data.val")

    @property
    def source_weights(self) -> list[float] | None:
        """Return the weights of the sources to train on, None where they are shown as one."""
        given = [item.weight if isinstance(item, SourceConfig) else None for item in self.train]
        if len(given) == 1 or given.count(None) == len(given):
            return None
        return [1.0 if weight is None else weight for weight in given]


def require_weight(item: str | SourceConfig) -> None:
    """Raise `ConfigError` for a source to train on whose weight, where it has one, is not above 0."""
    if isinstance(item, SourceConfig) and item.weight is not None:
        require(positive(item.weight), f"data.train: weight of {item.source}", item.weight, "it must be above 0")


def refuse_weight(item: str | SourceConfig | None, key: str) -> None:
    """Raise `ConfigError` for a source with a weight where nothing is mixed."""
    if isinstance(item, SourceConfig) and item.weight is not None:
        require(False, f"{key}: weight of {item.source}", item.weight, "weights are for data.train alone: leave it out")


@dataclass(frozen=True)
class ModelConfig:
    """Model: what is trained, and which part of it."""

    name: str = "tiny"
    """open_clip name, tiny (built in, trains on a CPU), a JSON file, hf-hub:org/name or local-dir:folder"""
    pretrained: str | None = None
    """open_clip tag or a weights file; null = random initialisation (hf-hub: and local-dir: bring their weights)"""
    options: dict[str, Any] = field(default_factory=dict)
    """keyword arguments of open_clip.create_model, such as {force_image_size: 128}"""
    freeze: list[str] = field(default_factory=list)
    """image, text, or parameter-name patterns with * that are not trained"""


@dataclass(frozen=True)
class LossConfig:
    """Loss: what is minimised."""

    name: str = "clip"
    """entry of the loss registry (accel-clip list losses)"""
    options: dict[str, Any] = field(default_factory=dict)
    """arguments of the loss"""


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer and learning rate schedule."""

    name: str = "adamw"
    """adamw, sgd, or any optimizer of timm (accel-clip list optimizers)"""
    lr: float = 5e-4
    """highest learning rate"""
    weight_decay: float = 0.2
    """decoupled weight decay; never applied to parameters below two dimensions"""
    options: dict[str, Any] = field(default_factory=dict)
    """further arguments of the optimizer, such as {betas: [0.9, 0.98]}"""
    lr_by_name: dict[str, float] = field(default_factory=dict)
    """{pattern: learning rate}: image, text, or a parameter-name pattern with *; the first that matches decides"""
    schedule: str = "cosine"
    """cosine, constant, linear, cosine_restarts, wsd or a registered one"""
    schedule_options: dict[str, Any] = field(default_factory=dict)
    """arguments of the schedule, such as {period: 500, multiplier: 2} for cosine_restarts"""
    warmup: float = 0.1
    """linear warm-up: a fraction of the run when below 1, else steps"""
    min_lr_ratio: float = 0.0
    """the schedule's lowest learning rate, as a share of the highest"""
    grad_clip: float | None = 1.0
    """largest gradient norm; null = no clipping"""

    def __post_init__(self) -> None:
        require(positive(self.lr), "optim.lr", self.lr, "it must be above 0")
        require(self.weight_decay >= 0, "optim.weight_decay", self.weight_decay, "it must be 0 or more")
        for pattern, rate in self.lr_by_name.items():
            require(rate >= 0, f"optim.lr_by_name.{pattern}", rate, "it must be 0 or more")
        require(self.warmup >= 0, "optim.warmup", self.warmup, "it must be 0 or more")
        require(0 <= self.min_lr_ratio <= 1, "optim.min_lr_ratio", self.min_lr_ratio, "it must be in [0, 1]")
        clip = self.grad_clip
        require(clip is None or positive(clip), "optim.grad_clip", clip, "it must be above 0, or null to switch it off")


@dataclass(frozen=True)
class TrainConfig:
    """Training: how long, how large, on what."""

    epochs: int = 10
    """passes over the training data; train.steps decides when it is set"""
    steps: int | None = None
    """optimizer steps; null = train.epochs decides"""
    batch_size: int = 256
    """pairs per contrastive batch over all processes"""
    micro_batch_size: int | None = None
    """rows that go through a tower at once, per process; changes memory and time, never the result; null = what fits"""
    activation_gib: float | None = None
    """GiB of activations kept between the two passes, per process; null = what is free, 0 = recompute all"""
    accumulate: int = 1
    """contrastive batches averaged per optimizer step; this does not enlarge the set of negatives"""
    precision: str = "auto"
    """auto, no, bf16 or fp16; auto = the launcher's, else bf16 or fp16 by what the GPU does natively, no on a CPU"""
    threads: int | None = None
    """CPU threads per process; null = the machine's cores divided by its processes"""
    timeout: float | None = 45.0
    """seconds without progress after the first step that end several processes which wait for each other (five times
    the longest recent step, and 600 on streams, where that is more); null = never"""
    compile: bool = False
    """compile the blocks of the towers by torch.compile: fewer, larger kernels after a start of a minute or more"""
    activation_checkpointing: bool = False
    """keep only the inputs of blocks and run each again in the backward pass: less memory, a quarter more work"""
    non_finite: str = "stop"
    """what a loss or gradient that is no finite number does: stop (exit code 4), skip the step, or rollback to the last
    checkpoint and go on past the batch"""
    non_finite_limit: int = 5
    """such steps in a row after which skip and rollback stop too"""
    max_logit_scale: float = 100.0
    """the logit scale (after exp) is clamped to this after every step"""
    cache_features: bool = False
    """features of the frozen tower are computed once and kept in the run folder: pictures are decoded once; needs
    model.freeze image, with data.augmentation none, or model.freeze text"""

    def __post_init__(self) -> None:
        for key in ("epochs", "batch_size", "accumulate"):
            value = getattr(self, key)
            require(value >= 1, f"train.{key}", value, "it must be at least 1")
        gib = self.activation_gib
        require(gib is None or gib >= 0, "train.activation_gib", gib, "it must be 0 or more, or null")
        for key in ("steps", "threads", "micro_batch_size"):
            value = getattr(self, key)
            require(value is None or value >= 1, f"train.{key}", value, "it must be at least 1, or null")
        require(self.batch_size >= 2, "train.batch_size", self.batch_size, "a contrastive batch needs at least 2 pairs")
        wait = self.timeout
        require(wait is None or positive(wait), "train.timeout", wait, "it must be above 0, or null")
        policies, limit = ("stop", "skip", "rollback"), self.non_finite_limit
        require(self.non_finite in policies, "train.non_finite", self.non_finite, f"one of {', '.join(policies)}")
        require(limit >= 1, "train.non_finite_limit", limit, "it must be at least 1")
        known = ("auto", "no", "bf16", "fp16")
        require(self.precision in known, "train.precision", self.precision, f"it must be one of {', '.join(known)}")
        scale = self.max_logit_scale
        require(positive(scale), "train.max_logit_scale", scale, "it must be above 0")


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation: retrieval both ways, validation loss and zero-shot classification."""

    every: int | None = None
    """steps between evaluations; null = once an epoch; step 0 and the last step are always evaluated"""
    batch_size: int = 256
    """pairs per batch of val/loss, and pictures or captions encoded at once"""
    zero_shot: str | SourceConfig | None = None
    """labelled pictures: a folder per class, a table with a label column, or another source with labels"""
    label_key: str | None = None
    """column with the label; null = found by the usual names"""
    templates: list[str] = field(default_factory=lambda: ["a photo of a {}.", "a picture of a {}.", "{}"])
    """prompts for zero-shot classification; {} stands for the class name"""

    def __post_init__(self) -> None:
        require(self.every is None or self.every >= 1, "eval.every", self.every, "it must be at least 1, or null")
        require(self.batch_size >= 2, "eval.batch_size", self.batch_size, "it must be at least 2")
        require(len(self.templates) > 0, "eval.templates", self.templates, "name at least one prompt")
        refuse_weight(self.zero_shot, "eval.zero_shot")
        for template in self.templates:
            require("{}" in template, "eval.templates", template, "every prompt needs {} where the class name goes")


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints: how often a run is saved, and whether it goes on from there."""

    every: int | None = None
    """steps between checkpoints; null = by time alone; the end of a run and a stop asked for are always saved"""
    minutes: float | None = 10.0
    """minutes between checkpoints by the first process's clock; null = by steps alone"""
    keep: int = 3
    """newest checkpoints that are kept; the best one is kept beside them"""
    resume: str = "auto"
    """auto = the run in output_dir goes on; never = a run there is an error; or the path of a step-... folder"""

    def __post_init__(self) -> None:
        require(self.every is None or self.every >= 1, "checkpoint.every", self.every, "it must be at least 1, or null")
        minutes = self.minutes
        require(minutes is None or positive(minutes), "checkpoint.minutes", minutes, "it must be above 0, or null")
        require(self.keep >= 1, "checkpoint.keep", self.keep, "it must be at least 1")
        require(self.resume != "", "checkpoint.resume", self.resume, "it must be auto, never or a path")


@dataclass(frozen=True)
class TrackConfig:
    """Tracking: metrics.jsonl is always written, the rest is chosen here."""

    to: list[str] = field(default_factory=lambda: ["tensorboard"])
    """trackers beside metrics.jsonl (accel-clip list trackers); [] = none"""
    every: int = 10
    """steps between points"""

    def __post_init__(self) -> None:
        require(self.every >= 1, "track.every", self.every, "it must be at least 1")


@dataclass(frozen=True)
class StopConfig:
    """Early stopping, and what the best model is."""

    metric: str | None = None
    """a logged metric, such as val/loss or val/text_to_image_R@1; null = the last model is the one to export"""
    mode: str | None = None
    """min or max; null = min for losses, ranks and times, else max"""
    patience: int | None = None
    """evaluations without a better value before the run stops; null = never, only the best model is kept"""
    min_delta: float = 0.0
    """by how much a value must be better to count"""

    def __post_init__(self) -> None:
        require(self.mode in (None, "min", "max"), "stop.mode", self.mode, "it must be min, max or null")
        require(
            self.patience is None or self.patience >= 1,
            "stop.patience",
            self.patience,
            "it must be at least 1, or null",
        )
        require(self.min_delta >= 0, "stop.min_delta", self.min_delta, "it must be 0 or more")
        needed = self.metric is not None or self.patience is None
        require(needed, "stop.patience", self.patience, "it needs stop.metric, the value to watch")


@dataclass(frozen=True)
class Config:
    """All settings of a run."""

    output_dir: str = "runs/demo"
    """run folder: config, metrics, curves, exported model"""
    seed: int = 0
    """seed of everything: weights, order, augmentation, dropout"""
    plugins: list[str] = field(default_factory=list)
    """Python files that register your own losses, sources, optimizers and schedules"""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    track: TrackConfig = field(default_factory=TrackConfig)
    stop: StopConfig = field(default_factory=StopConfig)

    def __post_init__(self) -> None:
        require(self.seed >= 0, "seed", self.seed, "it must be 0 or more")
        require(self.output_dir != "", "output_dir", self.output_dir, "name a folder")
        if self.train.cache_features:
            rule = "train.cache_features keeps the features of one tower, frozen as a whole: freeze image or text"
            require(self.cached_tower is not None, "model.freeze", self.model.freeze, rule)
            rule = "train.cache_features needs pictures that stay the same: set it to none"
            stays = self.cached_tower != "image" or self.data.augmentation == "none"
            require(stays, "data.augmentation", self.data.augmentation, rule)
            rule = "train.cache_features needs pictures that stay the same: leave one of the two away"
            stays = self.cached_tower != "image" or not self.data.transforms
            require(stays, "data.transforms", self.data.transforms, rule)
            rule = "loss.options.teachers look at every picture, and none is decoded: leave one of the two away"
            looks = self.cached_tower == "image" and bool(self.loss.options.get("teachers"))
            require(not looks, "train.cache_features", True, rule)
            rule = "train.cache_features of the image tower keeps what comes after the pictures: set it to 0"
            needed = self.cached_tower != "image" or not self.data.image_cache_gib
            require(needed, "data.image_cache_gib", self.data.image_cache_gib, rule)

    @property
    def cached_tower(self) -> str | None:
        """Return the tower whose features are kept, image or text."""
        frozen = [side for side in ("image", "text") if side in self.model.freeze]
        return frozen[0] if self.train.cache_features and len(frozen) == 1 else None

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as nested plain dictionaries, as they stand in `config.yaml`."""
        return asdict(self)


def positive(value: float) -> bool:
    """Return whether a number is finite and above zero."""
    return math.isfinite(value) and value > 0
