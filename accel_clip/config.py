"""Every setting, its unit, its default and why: one dataclass a section."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Annotated, Any, get_type_hints

from accel_clip.faults import ConfigError
from accel_clip.typed import LARGEST_WHOLE, Range, WrongValue, fit, range_of, require_ordinary_numbers, shown_value

FROM_SCRATCH_LR, FROM_SCRATCH_DECAY = 5e-4, 0.2  # as CLIP's ViT-B (arXiv 2103.00020, table 19 and 20)
GIB = 2**30
"""bytes in the unit of settings that end in _gib"""

Steps = Annotated[int, Range(1, 10**12)]
Rows = Annotated[int, Range(1, 2**24)]
PairRows = Annotated[int, Range(2, 2**24)]
Gib = Annotated[float, Range(0, 2**20)]
Share = Annotated[float, Range(0, 1)]
Factor = Annotated[float, Range(0, 1e6)]
ABOVE_ZERO = Range(0, 1e6, is_open=True)
PositiveFactor = Annotated[float, ABOVE_ZERO]


def require(holds: bool, key: str, value: object, rule: str) -> None:
    """Raise `ConfigError` naming the setting, its value and the rule unless the rule holds."""
    if not holds:
        raise ConfigError(f"{key}: {shown_value(value)} does not work: {rule}")


def require_ranges(section: Any, prefix: str) -> None:
    """Raise `ConfigError` for a number that is not in the range declared beside its setting; prefix: ends in a dot.

    The numbers in settings that are dictionaries of options must be finite.
    """
    hints = get_type_hints(type(section), include_extras=True)
    try:
        for each in fields(section):
            if range_of(hints[each.name]) is not None:
                fit(getattr(section, each.name), hints[each.name], prefix + each.name)
            elif isinstance(getattr(section, each.name), dict):
                require_ordinary_numbers(getattr(section, each.name), prefix + each.name)
    except WrongValue as error:
        raise ConfigError(str(error)) from error


def require_words(caption_key: list[str] | dict[str, float] | str | None) -> None:
    """Raise `ConfigError` for a column with captions whose name is a number."""
    for column in caption_key if isinstance(caption_key, dict) else ():
        require(isinstance(column, str), "data.caption_key", column, "columns are words: put a number in quotes")


@dataclass(frozen=True)
class SourceConfig:
    """One source of pairs with settings of its own, which win over those of the `data` section."""

    source: str
    """a file, a folder, hf:org/name, a saved dataset, demo, or name:argument of a registered source"""
    image_key: str | None = None
    """column with the picture"""
    caption_key: list[str] | dict[str, PositiveFactor] | str | None = None
    """column(s) with captions, or {column: weight}"""
    image_root: str | None = None
    """folder that picture paths start from and must stay in"""
    weight: PositiveFactor | None = None
    """share of every training batch beside the weights of the other sources, where one without counts 1; without any
    the sources are shown one after the other as one"""


@dataclass(frozen=True)
class DataConfig:
    """Data: where the pairs come from and how they reach the model."""

    train: list[str | SourceConfig] = field(default_factory=lambda: ["demo"])
    """one source or a list; an item is a string (a table .csv .tsv .jsonl .json .parquet, a folder, a saved dataset,
    hf:org/name[:config][:split], demo, demo:pairs) or {source, image_key, caption_key, image_root, weight}"""
    val: list[str | SourceConfig] | None = None
    """held-out source(s), written like data.train but without weights; null = a part of data.train is held out"""
    val_fraction: Share = 0.05
    """share of data.train that is held out when data.val is null, chosen by a hash of the picture; 0 = none"""
    image_key: str | None = None
    """column with the picture; null = found by the usual names"""
    caption_key: list[str] | dict[str, PositiveFactor] | None = None
    """column(s) with captions, or endings of files beside pictures, such as caption; folder = the names of folders; of
    several one is drawn anew every epoch, with {title: 1, alt: 3} alt three times as often as title where a pair has
    both; null = found by the usual names"""
    image_root: str | None = None
    """folder that picture paths start from and must stay in, links resolved ('/' allows all);
    null = the table's folder"""
    encoding: str | None = None
    """text encoding of tables and .txt captions, such as gb18030; null = by byte-order mark, UTF-8, else detected and
    said"""
    quoting: str = "auto"
    """quotes in delimited tables: auto = they hold cells together, and one that swallows rows is refused; standard =
    without that look; none = they are signs like others"""
    caption_lines: bool | None = None
    """whether each line of a .txt beside a picture, in a folder or in shards, is a caption of its own; null = it is,
    but a text with a blank line in it is one caption"""
    replacement: bool = False
    """draw samples with replacement: every batch draws anew from all samples, instead of each once an epoch"""
    workers: Annotated[int, Range(0, 1024)] | None = None
    """loader processes per training process; null = chosen from the cores, 0 = load in the training process"""
    shuffle_buffer: Annotated[int, Range(1, 10**9)] = 4096
    """pairs of a stream that are read ahead, over all processes, and shuffled; its shards are shuffled besides"""
    prefetch: Annotated[int, Range(1, 10_000)] = 2
    """batches each worker prepares ahead"""
    max_bad_fraction: Share = 0.01
    """stop with exit code 3 when a larger share of the samples seen is unusable; looked at after 1,000 samples and at
    every epoch's end"""
    max_pixels: Annotated[float, Range(1, math.inf)] = 50e6
    """largest picture that is decoded, in pixels; .inf = no limit, for pictures that you trust"""
    augmentation: str = "crop"
    """crop = a random 90 to 100 % of the picture, anew every epoch; none = resized and cropped as in evaluation"""
    transforms: list[str | dict[str, Any]] = field(default_factory=list)
    """further augmentations of training, in this order, on 8-bit pixels at the model's size, after crop as after none:
    classes of torchvision.transforms.v2 such as RandomHorizontalFlip or {ColorJitter: {brightness: 0.4}}, and timm's
    policies such as rand-m9-mstd0.5-inc1, augmix-m3-w3 or original-mstd0.5"""
    image_cache_gib: Gib = 0.0
    """GiB in the run folder for decoded pictures, memory-mapped and shared by all workers and processes of a machine:
    from the second epoch on nothing is decoded; used only when all pictures fit; 0 = off"""

    def __post_init__(self) -> None:
        require(len(self.train) > 0, "data.train", self.train, "name at least one source")
        require(not isinstance(self.train, str), "data.train", self.train, "it must be a list")
        require(self.val is None or len(self.val) > 0, "data.val", self.val, "name at least one source, or null")
        items = [item for item in (*self.train, *(self.val or [])) if isinstance(item, SourceConfig)]
        for caption_key in (self.caption_key, *(item.caption_key for item in items)):
            require_words(caption_key)
        require_ranges(self, "data.")
        require(self.val_fraction != 1, "data.val_fraction", self.val_fraction, "it must be below 1")
        quoting = ("auto", "standard", "none")
        require(self.quoting in quoting, "data.quoting", self.quoting, "it must be auto, standard or none")
        known = ("crop", "none")
        require(self.augmentation in known, "data.augmentation", self.augmentation, "it must be crop or none")
        for source in items:
            require_ranges_of(source)
        for item in self.val or []:
            refuse_weight(item, "data.val")

    @property
    def source_weights(self) -> list[float] | None:
        """Return the weights of the sources to train on, None where they are shown as one."""
        given = [item.weight if isinstance(item, SourceConfig) else None for item in self.train]
        if len(given) == 1 or given.count(None) == len(given):
            return None
        return [1.0 if weight is None else weight for weight in given]


def require_ranges_of(item: SourceConfig) -> None:
    """Raise `ConfigError` for a number of a source that is not in its range; its weight is told with its name."""
    require_ranges(replace(item, weight=None), "data.")
    holds = item.weight is None or ABOVE_ZERO.holds(item.weight)
    require(holds, f"data.train: weight of {item.source}", item.weight, f"it must be {ABOVE_ZERO.words}")


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

    def __post_init__(self) -> None:
        require_ranges(self, "model.")

    @property
    def trains_weights(self) -> bool:
        """Return whether weights from elsewhere are trained: those of the model, or of a tower that is not frozen."""
        given = [side for side in ("image", "text") if self.options.get(f"pretrained_{side}_path")]
        whole = self.pretrained is not None or self.name.startswith(("hf-hub:", "local-dir:"))
        return whole or any(side not in self.freeze for side in given)


@dataclass(frozen=True)
class LossConfig:
    """Loss: what is minimised."""

    name: str = "clip"
    """entry of the loss registry (accel-clip list losses)"""
    options: dict[str, Any] = field(default_factory=dict)
    """arguments of the loss"""

    def __post_init__(self) -> None:
        require_ranges(self, "loss.")


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer and learning rate schedule."""

    name: str = "adamw"
    """adamw, sgd, or any optimizer of timm (accel-clip list optimizers)"""
    lr: PositiveFactor | None = None
    """highest learning rate; null = 5e-4, and 1e-5 where the model brings weights that are trained further"""
    weight_decay: Factor | None = None
    """decoupled weight decay; never applied to parameters below two dimensions; null = 0.2, and 0.1 for weights"""
    options: dict[str, Any] = field(default_factory=dict)
    """further arguments of the optimizer, such as {betas: [0.9, 0.98]}"""
    lr_by_name: dict[str, Factor] = field(default_factory=dict)
    """{pattern: learning rate}: image, text, or a parameter-name pattern with *; the first that matches decides"""
    schedule: str = "cosine"
    """cosine, constant, linear, cosine_restarts, wsd or a registered one"""
    schedule_options: dict[str, Any] = field(default_factory=dict)
    """arguments of the schedule, such as {period: 500, multiplier: 2} for cosine_restarts"""
    warmup: Annotated[float, Range(0, 10**12)] = 0.1
    """linear warm-up: a fraction of the run when below 1, else steps"""
    length: Steps | None = None
    """optimizer steps that the schedule is for; null = those of the run. A run that is lengthened keeps its curve, and
    goes on at the last rate of it, where this is its former length"""
    min_lr_ratio: Share = 0.0
    """the schedule's lowest learning rate, as a share of the highest"""
    grad_clip: PositiveFactor | None = 1.0
    """largest gradient norm; null = no clipping"""

    def __post_init__(self) -> None:
        require_ranges(self, "optim.")

    @property
    def peak_lr(self) -> float:
        """Return the highest learning rate, that of a run from scratch where it is left open."""
        return FROM_SCRATCH_LR if self.lr is None else self.lr

    @property
    def decay(self) -> float:
        """Return the weight decay, that of a run from scratch where it is left open."""
        return FROM_SCRATCH_DECAY if self.weight_decay is None else self.weight_decay


@dataclass(frozen=True)
class TrainConfig:
    """Training: how long, how large, on what."""

    epochs: Annotated[int, Range(1, 10**9)] = 10
    """passes over the training data; train.steps decides when it is set"""
    steps: Steps | None = None
    """optimizer steps; null = train.epochs decides"""
    batch_size: PairRows = 256
    """pairs per contrastive batch over all processes"""
    micro_batch_size: Rows | None = None
    """rows that go through a tower at once, per process; changes memory and time, never the result; null = what fits"""
    activation_gib: Gib | None = None
    """GiB of activations kept between the two passes, per process; null = what is free, 0 = recompute all"""
    accumulate: Annotated[int, Range(1, 2**16)] = 1
    """contrastive batches averaged per optimizer step; this does not enlarge the set of negatives"""
    precision: str = "auto"
    """auto, no, bf16 or fp16; auto = the launcher's, else bf16 or fp16 by what the GPU does natively, no on a CPU"""
    threads: Annotated[int, Range(1, 1024)] | None = None
    """CPU threads per process; null = the machine's cores divided by its processes"""
    timeout: Annotated[float, Range(0, 1e8, is_open=True)] | None = 45.0
    """seconds without progress after the first step that end a process which hangs, with a word where (five times the
    longest recent step where that is more, 600 on streams or in a single process, of which only waiting counts, and
    1800 before the first step, in an evaluation or for a checkpoint); null = never"""
    compile: bool = False
    """compile the blocks of the towers by torch.compile: fewer, larger kernels after a start of a minute or more"""
    activation_checkpointing: bool = False
    """keep only the inputs of blocks and run each again in the backward pass: less memory, a quarter more work"""
    non_finite: str = "stop"
    """what a loss or gradient that is no finite number does: stop (exit code 4), skip the step, or rollback to the last
    checkpoint and go on past the batch"""
    non_finite_limit: Steps = 5
    """such steps in a row after which skip and rollback stop too"""
    max_logit_scale: PositiveFactor = 100.0
    """the logit scale (after exp) is clamped to this after every step"""
    cache_features: bool = False
    """features of the frozen tower are computed once and kept in the run folder: pictures are decoded once; needs
    model.freeze image, with data.augmentation none, or model.freeze text"""

    def __post_init__(self) -> None:
        require_ranges(self, "train.")
        policies = ("stop", "skip", "rollback")
        require(self.non_finite in policies, "train.non_finite", self.non_finite, f"one of {', '.join(policies)}")
        known = ("auto", "no", "bf16", "fp16")
        require(self.precision in known, "train.precision", self.precision, f"it must be one of {', '.join(known)}")


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation: retrieval both ways, validation loss and zero-shot classification."""

    every: Steps | None = None
    """steps between evaluations; null = once an epoch; step 0 and the last step are always evaluated"""
    batch_size: PairRows = 256
    """pairs per batch of val/loss, and pictures or captions encoded at once"""
    zero_shot: str | SourceConfig | None = None
    """labelled pictures: a folder per class, a table with a label column, or another source with labels"""
    label_key: str | None = None
    """column with the label; null = found by the usual names"""
    templates: list[str] = field(default_factory=lambda: ["a photo of a {}.", "a picture of a {}.", "{}"])
    """prompts for zero-shot classification; {} stands for the class name"""
    also: list[str | dict[str, Any]] = field(default_factory=list)
    """further evaluators, such as those of your plugins, by name or as {name: {option: value}} (accel-clip list
    evaluators); retrieval measures without being named where pairs are held out, zero_shot where eval.zero_shot is"""

    def __post_init__(self) -> None:
        require_ranges(self, "eval.")
        require(len(self.templates) > 0, "eval.templates", self.templates, "name at least one prompt")
        if isinstance(self.zero_shot, SourceConfig):
            require_ranges_of(self.zero_shot)
        refuse_weight(self.zero_shot, "eval.zero_shot")
        for template in self.templates:
            require("{}" in template, "eval.templates", template, "every prompt needs {} where the class name goes")


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints: how often a run is saved, and whether it goes on from there."""

    every: Steps | None = None
    """steps between checkpoints; null = by time alone; the end of a run and a stop asked for are always saved"""
    minutes: Annotated[float, Range(0, 1e8, is_open=True)] | None = 10.0
    """minutes between checkpoints by the first process's clock; null = by steps alone"""
    keep: Annotated[int, Range(1, 10**9)] = 3
    """newest checkpoints that are kept; the best one is kept beside them"""
    resume: str = "auto"
    """auto = the run in output_dir goes on; never = a run there is an error; or the path of a step-... folder to begin
    from, which goes on from its own checkpoints when it is started again"""

    def __post_init__(self) -> None:
        require_ranges(self, "checkpoint.")
        require(self.resume != "", "checkpoint.resume", self.resume, "it must be auto, never or a path")


@dataclass(frozen=True)
class TrackConfig:
    """Tracking: metrics.jsonl is always written, the rest is chosen here."""

    to: list[str] = field(default_factory=lambda: ["tensorboard"])
    """trackers beside metrics.jsonl (accel-clip list trackers); [] = none"""
    every: Steps = 10
    """steps between points"""

    def __post_init__(self) -> None:
        require_ranges(self, "track.")


@dataclass(frozen=True)
class StopConfig:
    """Early stopping, and what the best model is."""

    metric: str | None = None
    """a logged metric, such as val/loss or val/text_to_image_R@1; null = the last model is the one to export"""
    mode: str | None = None
    """min or max; null = min for losses, ranks and times, else max"""
    patience: Steps | None = None
    """evaluations without a better value before the run stops; null = never, only the best model is kept"""
    min_delta: Factor = 0.0
    """by how much a value must be better to count"""

    def __post_init__(self) -> None:
        require(self.mode in (None, "min", "max"), "stop.mode", self.mode, "it must be min, max or null")
        require_ranges(self, "stop.")
        needed = self.metric is not None or self.patience is None
        require(needed, "stop.patience", self.patience, "it needs stop.metric, the value to watch")


@dataclass(frozen=True)
class Config:
    """All settings of a run."""

    output_dir: str = "runs/demo"
    """run folder: config, metrics, curves, exported model"""
    seed: Annotated[int, Range(0, LARGEST_WHOLE)] = 0
    """seed of everything: weights, order, augmentation, dropout"""
    plugins: list[str] = field(default_factory=list)
    """Python files that register your own losses, sources, optimizers, schedules, evaluators and hooks"""
    hooks: list[str | dict[str, Any]] = field(default_factory=list)
    """what your plugins do after every step or evaluation, by name or as {name: {option: value}} (accel-clip list
    hooks)"""
    data: DataConfig = field(default_factory=DataConfig)
    """Data: where the pairs come from and how they reach the model"""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Model: what is trained, and which part of it"""
    loss: LossConfig = field(default_factory=LossConfig)
    """Loss: what is minimised"""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer and learning rate schedule"""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Training: how long, how large, on what"""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """Evaluation: retrieval both ways, validation loss and zero-shot classification"""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Checkpoints: how often a run is saved, and whether it goes on from there"""
    track: TrackConfig = field(default_factory=TrackConfig)
    """Tracking: metrics.jsonl is always written, the rest is chosen here"""
    stop: StopConfig = field(default_factory=StopConfig)
    """Early stopping, and what the best model is"""

    def __post_init__(self) -> None:
        require_ranges(self, "")
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
